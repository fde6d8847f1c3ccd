// SPDX-License-Identifier: GPL-2.0
//! A thread that registers and changes mappings. Thread 0 also makes the quiet points.

use crate::{
    memory::{Arena, DISK, Kind, MEMORY, UNITS},
    model::{self, Region},
    process::{COMMON, FIRST_RARE, OWN, Process, ROUNDS, STEPS, THREADS},
};
use rand::{RngExt, rngs::SmallRng, seq::IteratorRandom};
use rustix::{
    fs::{FallocateFlags, FlockOperation, Mode, OFlags, fallocate, flock, fsync, ftruncate, open},
    io::Errno,
    mm::MprotectFlags,
    process::{Signal, getpid, kill_process},
};
use std::{
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    ptr,
    rc::Rc,
    sync::atomic::Ordering::{Relaxed, SeqCst},
    thread,
};
use uverbs_mmu_notify::{
    Event, Mr, MrArgs,
    sys::{
        uapi::RDMA_DRIVER_SIW,
        verbs::{IBV_ACCESS_REMOTE_READ, IBV_WC_SUCCESS},
    },
};
use uverbs_mmu_notify_tests::*;

/// Regions of a thread. The first ones are of hugetlb, which has few pages,
const SLOTS: usize = 12;
pub const HUGE_SLOTS: usize = 3;
/// and the last one of thread 0 is that of the bell.
const BELL: usize = SLOTS - 1;
/// Seconds after which a process that has not reached its next quiet point is ended.
const LIMIT: u32 = 150;

/// While this exists nobody changes the files, or nobody else.
struct FileLock(Rc<OwnedFd>);

impl Drop for FileLock {
    fn drop(&mut self) {
        flock(&self.0, FlockOperation::Unlock).expect("flock");
    }
}

pub struct Thread<'a> {
    process: &'a Process,
    index: usize,
    /// Decides about operations,
    random: SmallRng,
    /// and about how they are checked.
    dice: SmallRng,
    /// None on soft-iWARP.
    peer: Option<Peer>,
    slots: [Option<(u64, Mr)>; SLOTS],
    cookie: u64,
    /// The file in memory, opened once more, so that this thread can lock it.
    file: Rc<OwnedFd>,
    nowhere: Map,
    token: u8,
}

impl<'a> Thread<'a> {
    pub fn new(process: &'a Process, index: usize, random: SmallRng, dice: SmallRng) -> Self {
        let path = format!("/proc/self/fd/{}", process.files.get(MEMORY).as_raw_fd());
        let file = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let has_peer = process.pd.context().driver_id() != RDMA_DRIVER_SIW;
        Self {
            process,
            index,
            random,
            dice,
            peer: has_peer.then(|| Peer::new(&process.pd)),
            slots: [const { None }; SLOTS],
            cookie: (index as u64) << 32,
            file: Rc::new(file.expect("open the file")),
            nowhere: Map::nowhere(),
            token: 0,
        }
    }

    pub fn run(&mut self) {
        if self.index == 0 {
            self.register(BELL, self.process.bell(), 0..1, COMMON, true);
        }
        let process = self.process;
        process.shared.started.fetch_add(1, SeqCst);
        for round in 1.. {
            for _ in 0..STEPS {
                if process.gone.load(SeqCst) {
                    break;
                }
                self.step();
                process.shared.operations.fetch_add(1, Relaxed);
            }
            process.barrier.wait();
            if self.index == 0 {
                self.quiet();
                process.over.store(process.gone.load(SeqCst), SeqCst);
                if round == ROUNDS && !process.shared.until_removal.load(Relaxed) {
                    self.end();
                }
                process.gate.set(false);
            }
            process.barrier.wait();
            if process.over.load(SeqCst) {
                return self.leave();
            }
        }
    }

    /// Makes an operation, which depends on the seed alone, not on what happened before.
    fn step(&mut self) {
        let (process, random) = (self.process, &mut self.random);
        let (coin, rare) = (random.random(), random.random_range(0..8) == 0);
        // Huge pages cost too much time to be as frequent.
        let all = THREADS * OWN.len();
        let arenas = match random.random_range(0..16) {
            0..8 => self.index * OWN.len()..(self.index + 1) * OWN.len(),
            8..15 => all..all + FIRST_RARE,
            _ => all + FIRST_RARE..process.bell().index,
        };
        let arena = &process.arenas[random.random_range(arenas)];
        let count = arena.kind.units();
        let start = random.random_range(0..count);
        let units = start..random.random_range(start + 1..=count.min(start + 5));
        let slot = random.random_range(0..BELL);
        let what = random.random_range(0..100_u8);
        let (pages, files) = (arena.pages(&units), &process.files);

        let unmap = |units: Range<usize>, change: &dyn Fn()| {
            let _lock = arena.lock.write().unwrap();
            process.change(arena, units, UNMAPPED, change);
        };
        let advise = |advice| {
            let _lock = arena.lock.read().unwrap();
            process.change(arena, units.clone(), MAYBE_STALE, || {
                arena.map.advise(pages.clone(), advice).expect("madvise");
            });
        };
        match what {
            0..22 => {
                let slot = match arena.kind.is_huge() {
                    true => slot % HUGE_SLOTS,
                    false => HUGE_SLOTS + slot % (BELL - HUGE_SLOTS),
                };
                self.deregister(slot);
                let queue = if coin { COMMON } else { self.index };
                let writable = !rare && arena.kind != Kind::Disk;
                self.register(slot, arena, units, queue, writable);
            }
            22..37 => self.deregister(slot),
            37..45 => unmap(units.clone(), &|| {
                arena.map.unmap(pages.clone());
                arena.map_over(units.clone(), files);
            }),
            45..52 => unmap(units.clone(), &|| arena.map_over(units.clone(), files)),
            52..57 => unmap(start..start + 1, &|| arena.move_away(start, coin, files)),
            57..60 => unmap(start..start + 1, &|| arena.move_over(start, files)),
            60..70 => advise(if rare {
                libc::MADV_DONTNEED_LOCKED
            } else {
                libc::MADV_DONTNEED
            }),
            70..72 if matches!(arena.kind, Kind::Private | Kind::Thp) => advise(libc::MADV_FREE),
            72..74 if matches!(arena.kind, Kind::Shared | Kind::SharedHuge) => {
                advise(libc::MADV_REMOVE)
            }
            74..76 if arena.kind == Kind::File => {
                let _lock = arena.lock.read().unwrap();
                self.change_file(MEMORY, units, || {
                    arena.map.advise(pages, libc::MADV_REMOVE).expect("madvise");
                });
            }
            // Write-back leaves the pages mapped: no lock, and nothing is due. ext2 cannot
            // punch holes.
            70..78 if arena.kind == Kind::Disk => {
                fsync(files.get(DISK)).expect("fsync");
            }
            70..78 => self.change_file(MEMORY, units.clone(), || {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let (start, len) = (units.start * PAGE, units.len() * PAGE);
                fallocate(files.get(MEMORY), mode, start as u64, len as u64).expect("fallocate");
            }),
            78..80 => {
                let which = arena.kind.file().unwrap_or(MEMORY);
                self.change_file(which, start..UNITS, || {
                    for pages in [start, UNITS] {
                        ftruncate(files.get(which), (pages * PAGE) as u64).expect("ftruncate");
                    }
                })
            }
            80..84 => {
                let _lock = arena.lock.write().unwrap();
                arena.map.protect(pages.clone(), MprotectFlags::READ);
                arena
                    .map
                    .protect(pages, MprotectFlags::READ | MprotectFlags::WRITE);
            }
            84..88 => {
                let _lock = arena.lock.read().unwrap();
                let _file = self.lock_file(FlockOperation::LockShared);
                for unit in units {
                    self.store(arena, unit);
                }
            }
            88..97 => self.check(),
            98 => {
                process.drain_sent(self.index, &mut self.dice);
            }
            99 if coin => self.fork(rare),
            97.. => {
                let read = read_raw(&process.queues[self.index].0, self.nowhere.at(0), PAGE);
                let error = read.expect_err("nothing can be written");
                let expected = [Errno::FAULT, Errno::AGAIN].map(Some);
                assert!(
                    expected.contains(&Errno::from_io_error(&error)) || process.is_gone(&error),
                    "{error}"
                );
            }
        }
    }

    fn register(
        &mut self,
        slot: usize,
        arena: &Arena,
        range: Range<usize>,
        queue: usize,
        writable: bool,
    ) {
        let process = self.process;
        self.cookie += 1;
        let cookie = self.cookie;
        let region = Region::new(arena, range.clone(), queue, writable);
        process.model().add(cookie, region);

        let mut args = MrArgs::new(arena.at(range.start), range.len() * arena.unit())
            .watched(&process.queues[queue].0, cookie);
        if !writable {
            args.access = IBV_ACCESS_REMOTE_READ;
        }
        // Others may unmap, protect or truncate it meanwhile.
        let may_fail = arena.kind.file().is_some() || arena.index >= THREADS * OWN.len();
        match try_reg(&process.pd, &args) {
            Ok(mr) => {
                process.model().registered(cookie, mr.rkey());
                process.shared.registered.fetch_add(1, Relaxed);
                self.slots[slot] = Some((cookie, mr));
            }
            Err(e) if process.is_gone(&e) => process.model().failed(cookie),
            Err(e) if may_fail && Errno::from_io_error(&e) == Some(Errno::FAULT) => {
                process.model().failed(cookie);
            }
            Err(e) => panic!("registering {args:x?} of {:?}: {e}", arena.kind),
        }
    }

    fn deregister(&mut self, slot: usize) {
        if let Some((cookie, mut mr)) = self.slots[slot].take() {
            let count = mr.destroy().expect("deregister");
            self.process.model().deregistered(cookie, count, self.index);
        }
    }

    fn lock_file(&self, operation: FlockOperation) -> FileLock {
        flock(&self.file, operation).expect("flock");
        FileLock(self.file.clone())
    }

    /// Takes pages of a file away, from all processes.
    fn change_file(&self, which: usize, units: Range<usize>, change: impl FnOnce()) {
        let _lock = self.lock_file(FlockOperation::LockExclusive);
        let Process {
            shared, counters, ..
        } = self.process;
        shared
            .file
            .make(which, model::units(units), counters, change);
    }

    /// The byte of a unit that no other thread of any process uses.
    fn byte(&self, arena: &Arena, unit: usize) -> *mut u8 {
        arena
            .at(unit)
            .wrapping_add(self.process.place * THREADS + self.index)
    }

    fn next_token(&mut self) -> u8 {
        self.token = self.token.wrapping_add(1);
        self.token
    }

    fn store(&mut self, arena: &Arena, unit: usize) -> u8 {
        let token = self.next_token();
        // SAFETY: It is mapped, and no reference points there.
        unsafe { self.byte(arena, unit).write_volatile(token) };
        token
    }

    /// Returns false if the removal of the device has begun: that drops events.
    fn drain(&mut self, queue: usize) -> bool {
        let page = &self.process.queues[queue].1;
        let before = page.load();
        self.process.drain(queue, &mut self.dice);
        if self.process.is_removed() {
            return false;
        }
        let model = self.process.model();
        model.expect_counter(queue, before, page.load());
        true
    }

    /// Drains this thread's queue, and looks at its regions of memory that only this thread
    /// changes.
    fn check(&mut self) {
        let _file = self.lock_file(FlockOperation::LockShared);
        if !self.drain(self.index) {
            return;
        }
        let (queue, arenas) = (
            self.index,
            self.index * OWN.len()..(self.index + 1) * OWN.len(),
        );
        let own = |region: &Region| region.queue == queue && arenas.contains(&region.arena);
        self.process.model().expect_settled(own);
        // RDMA is slow.
        if self.dice.random_range(0..4) == 0 {
            self.compare(own);
        }
    }

    /// Looks at one region by RDMA. An event must have come if it has another page than the
    /// one that is mapped.
    fn compare(&mut self, which: impl Fn(&Region) -> bool) {
        let Some(peer) = self.peer.take() else { return };
        let model = self.process.model();
        let regions = model.live().filter(|region| which(region));
        if let Some(region) = regions.choose(&mut self.dice) {
            let (unit, reported) = region.units().choose(&mut self.dice).expect("it has units");
            let (arena, rkey) = (&self.process.arenas[region.arena], region.rkey);
            let write = region.writable && self.dice.random();
            drop(model);

            let at = self.byte(arena, unit);
            let transfer = if write {
                let token = self.next_token();
                let written = peer.try_write(at, rkey, token);
                // SAFETY: As in `store`.
                written.map(|status| (status, unsafe { at.read_volatile() } == token))
            } else {
                let token = self.store(arena, unit);
                let read = peer.try_read(at, rkey);
                read.map(|(status, byte)| (status, byte == token))
            };
            let shared = self.process.shared;
            match transfer {
                Ok((IBV_WC_SUCCESS, same)) => {
                    assert!(
                        same || reported,
                        "stale at unit {unit} of {:?} memory, and no event says so: rkey {rkey:#x}",
                        arena.kind
                    );
                    shared.compared.fetch_add(1, Relaxed);
                    shared.stale.fetch_add((!same).into(), Relaxed);
                }
                failed => assert!(self.process.is_removed(), "RDMA: {failed:?}"),
            }
        }
        self.peer = Some(peer);
    }

    /// A child cannot read, and changes nothing of this process.
    fn fork(&self, exec: bool) {
        let exit = in_child(|| {
            let read = self.process.queues[COMMON].0.read(&mut [Event::default()]);
            expect_errno(read, Errno::PERM, "read() by a child");
            for arena in &self.process.arenas {
                arena.map.unmap(arena.pages(&(0..arena.kind.units())));
            }
            if exec { run_true() } else { 0 }
        });
        assert_eq!(exit, Exit::Code(0), "the child");
    }

    /// The other threads wait. Stops the readers too, and checks everything.
    fn quiet(&mut self) {
        let process = self.process;
        // SAFETY: The signal has no handler, and ends the process.
        unsafe { libc::alarm(LIMIT) };
        if process.gone.load(SeqCst) {
            return;
        }
        process.gate.set(true);
        while !process.gate.all_wait() {
            let map = process.bell().map;
            process.change(process.bell(), 0..1, MAYBE_STALE, || map.dont_need(0..1));
            thread::yield_now();
        }
        let _file = self.lock_file(FlockOperation::LockShared);
        for queue in 0..=COMMON {
            if !self.drain(queue) {
                return;
            }
        }
        process.model().expect_settled(|_| true);
        for _ in 0..8 {
            self.compare(|_| true);
        }
    }

    /// The device is gone. Nothing else comes from the queues, and each region can still be
    /// deregistered, which returns how many events were read. Thread 0 ends the process.
    fn leave(&mut self) {
        let process = self.process;
        while process.drain(self.index, &mut self.dice) {
            thread::yield_now();
        }
        process.end.wait();
        let counters = || process.queues.iter().map(|(_, page)| page.load());
        let before: Vec<_> = counters().collect();
        process.barrier.wait();
        (0..SLOTS).for_each(|slot| self.deregister(slot));
        process.barrier.wait();
        if self.index != 0 {
            return;
        }
        process.model().expect_end();
        assert!(counters().eq(before), "the generation after the removal");
        let end = &process.shared.ends[process.place];
        end.store(process.queues[COMMON].1.load(), SeqCst);
        // SAFETY: It has no preconditions.
        unsafe { libc::_exit(0) }
    }

    /// Ends the process. Each region of the common queue then gets an event, which nobody
    /// can read, and the queue is closed.
    fn end(&mut self) {
        let _file = self.lock_file(FlockOperation::LockShared);
        let page = &self.process.queues[COMMON].1;
        let generation = loop {
            let generation = page.load();
            self.drain(COMMON);
            // Nothing must be pending.
            if page.load() == generation {
                break generation;
            }
        };
        let model = self.process.model();
        let regions = model.live().filter(|region| region.queue == COMMON).count();
        let end = &self.process.shared.ends[self.process.place];
        end.store(generation + regions as u64 + 1, SeqCst);
        match self.random.random_range(0..3) {
            // SAFETY: It has no preconditions.
            0 => unsafe { libc::_exit(0) },
            1 => panic!("exec: {}", run_true()),
            _ => panic!("kill: {:?}", kill_process(getpid(), Signal::KILL)),
        }
    }
}

/// Executes another program. Returns only if that fails.
fn run_true() -> i32 {
    let path = c"/bin/true".as_ptr();
    // SAFETY: A path, and a list of arguments, which NULL ends.
    unsafe { libc::execv(path, [path, ptr::null()].as_ptr()) }
}

// SPDX-License-Identifier: GPL-2.0
//! A process, and its threads that read the common queue.

use crate::{
    Shared,
    file::Counters,
    memory::{Arena, Files, Kind},
    model::{Model, units},
    thread::{HUGE_SLOTS, Thread},
};
use io_uring::{IoUring, opcode::Read, types::Fd};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use rustix::{
    buffer::spare_capacity,
    event::epoll,
    io::Errno,
    process::{Signal, set_parent_process_death_signal},
};
use std::{
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    panic,
    sync::{
        Arc, Barrier, Condvar, Mutex, MutexGuard,
        atomic::{
            AtomicBool,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
};
use uverbs_mmu_notify::{Event, GenerationPage, NotifyQueue, Pd};
use uverbs_mmu_notify_tests::*;

/// Threads that register and change mappings. Each has a queue that only it reads.
pub const THREADS: usize = 3;
/// The queue that all of them use, and the threads that read it.
pub const COMMON: usize = THREADS;
const READERS: usize = 3;
/// What a thread does between two quiet points, and how many of these there are.
pub const STEPS: usize = 100;
pub const ROUNDS: usize = 8;
/// The operations of a process.
pub const OPERATIONS: u64 = (THREADS * STEPS * ROUNDS) as u64;

/// Each thread has an arena of each of these, whose mapping nobody else changes,
pub const OWN: [Kind; 6] = [
    Kind::Private,
    Kind::Shared,
    Kind::File,
    Kind::Copied,
    Kind::Disk,
    Kind::DiskCopied,
];
/// and all use these, those from FIRST_RARE on not as often.
const ALL: [Kind; 6] = [
    Kind::Private,
    Kind::File,
    Kind::Disk,
    Kind::Thp,
    Kind::Huge,
    Kind::SharedHuge,
];
pub const FIRST_RARE: usize = 3;
const _: () = assert!(matches!(ALL[FIRST_RARE], Kind::Thp));

/// Pages of hugetlb that a process needs: two for each region, for each mapping, for what is
/// mapped over it, and for a child of each thread.
pub const HUGE_PAGES: usize = 2 * (THREADS * (HUGE_SLOTS + 1) + 4);

/// Stops the readers of the common queue.
#[derive(Default)]
pub struct Gate {
    /// Whether it is closed, and how many wait.
    state: Mutex<(bool, usize)>,
    opened: Condvar,
}

impl Gate {
    /// A reader that has ended waits for ever.
    fn leave(&self) {
        self.state.lock().unwrap().1 += 1;
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        state = self
            .opened
            .wait_while(state, |(closed, _)| *closed)
            .unwrap();
        state.1 -= 1;
    }

    pub fn set(&self, closed: bool) {
        self.state.lock().unwrap().0 = closed;
        self.opened.notify_all();
    }

    pub fn all_wait(&self) -> bool {
        self.state.lock().unwrap().1 == READERS
    }
}

pub struct Process {
    /// Its place among the processes that run at once.
    pub place: usize,
    pub shared: &'static Shared,
    pub files: Files,
    pub pd: Arc<Pd>,
    pub queues: Vec<(NotifyQueue, GenerationPage)>,
    pub arenas: Vec<Arena>,
    model: Mutex<Model>,
    pub counters: Counters,
    pub gate: Gate,
    pub barrier: Barrier,
    /// Whether a call has said that the device is gone, and whether the threads know.
    pub gone: AtomicBool,
    pub over: AtomicBool,
    /// All threads wait here when it is.
    pub end: Barrier,
}

/// Runs a process until it ends in some way. Its common queue is sent to `socket`.
pub fn live(
    place: usize,
    seed: u64,
    shared: &'static Shared,
    files: Files,
    huge: bool,
    socket: &OwnedFd,
) -> ! {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        default(info);
        eprintln!("to repeat what this process did: UVERBS_STRESS_SEED={seed}");
        // SAFETY: It has no preconditions.
        unsafe { libc::_exit(101) }
    }));
    set_parent_process_death_signal(Some(Signal::KILL)).expect("prctl");

    let pd = uverbs_mmu_notify_tests::open();
    let queue = |index| {
        let queue = NotifyQueue::alloc(pd.context()).expect("make a queue");
        queue.set_nonblocking(index != COMMON).expect("fcntl");
        let page = queue.generation_page().expect("map the counter page");
        (queue, page)
    };
    let queues: Vec<_> = (0..=COMMON).map(queue).collect();
    shared.places[place].publish(queues.iter().map(|(queue, _)| queue));
    send(socket, &queues[COMMON].0);
    let own = OWN.iter().cycle().take(THREADS * OWN.len());
    let all = ALL.iter().filter(|&&kind| huge || !kind.is_huge());
    let kinds = own.chain(all).chain(&[Kind::Private]).enumerate();
    let process = Process {
        place,
        shared,
        arenas: kinds
            .map(|(index, &kind)| Arena::new(index, kind, &files))
            .collect(),
        files,
        model: Mutex::new(Model::new(place, queues.len(), &shared.file)),
        counters: Counters::new(&shared.places),
        queues,
        pd,
        gate: Gate::default(),
        barrier: Barrier::new(THREADS),
        gone: AtomicBool::new(false),
        over: AtomicBool::new(false),
        end: Barrier::new(THREADS + READERS),
    };
    let mut seeds = SmallRng::seed_from_u64(seed);
    let mut fork = || SmallRng::from_rng(&mut seeds);
    thread::scope(|scope| {
        for index in 0..THREADS {
            let (process, random, dice) = (&process, fork(), fork());
            scope.spawn(move || Thread::new(process, index, random, dice).run());
        }
        for read in [Process::read, Process::read_epoll, Process::read_uring] {
            let (process, dice) = (&process, fork());
            scope.spawn(move || {
                read(process, dice);
                process.gate.leave();
                process.end.wait();
            });
        }
    });
    unreachable!("a thread ends the process");
}

/// The most events that are read at once, and the room for them.
const EVENTS: usize = 19;
const BUFFER: usize = EVENTS * size_of::<Event>();

/// Lengths of two buffers for some events, of which one may straddle them.
fn pieces(dice: &mut SmallRng) -> [usize; 2] {
    let len = dice.random_range(1..=EVENTS) * size_of::<Event>();
    let first = dice.random_range(1..len);
    [first, len - first]
}

impl Process {
    pub fn model(&self) -> MutexGuard<'_, Model> {
        let mut model = self.model.lock().unwrap();
        model.follow_file();
        model
    }

    /// Wakes the readers. Only thread 0 changes it.
    pub fn bell(&self) -> &Arena {
        self.arenas.last().expect("there are arenas")
    }

    /// Makes a change that must be reported.
    pub fn change(&self, arena: &Arena, range: Range<usize>, reason: u32, change: impl FnOnce()) {
        let number = self.model().begin(arena.index, units(range), reason);
        change();
        let counters: Vec<_> = self.queues.iter().map(|(_, page)| page.load()).collect();
        self.model().end(number, &counters);
    }

    fn apply(&self, queue: usize, bytes: &[u8]) {
        let events: Vec<_> = bytes.chunks(size_of::<Event>()).map(event).collect();
        let counter = self.queues[queue].1.load();
        self.model().apply(queue, &events, counter);
        self.shared.events.fetch_add(events.len() as u64, Relaxed);
    }

    /// Whether the removal of the device may have begun.
    pub fn is_removed(&self) -> bool {
        self.shared.removed.load(SeqCst)
    }

    /// Whether the device is gone, which no call may say before it is removed.
    pub fn is_gone(&self, e: &io::Error) -> bool {
        let gone = Errno::from_io_error(e) == Some(Errno::IO);
        if gone {
            assert!(self.is_removed(), "{e}, and the device is there");
            self.gone.store(true, SeqCst);
        }
        gone
    }

    /// Reads until EAGAIN. Returns false if the device is gone.
    pub fn drain(&self, queue: usize, dice: &mut SmallRng) -> bool {
        let fd = &self.queues[queue].0;
        self.drain_by(queue, || read_pieces(fd, &pieces(dice), libc::RWF_NOWAIT))
    }

    /// As `drain`, by an FD that was sent over a socket. It uses plain read(), so the queue must be
    /// nonblocking.
    pub fn drain_sent(&self, queue: usize, dice: &mut SmallRng) -> bool {
        let (ours, theirs) = sockets();
        send(&ours, &self.queues[queue].0);
        let fd = receive(&theirs);
        let mut buffer = [0; BUFFER];
        self.drain_by(queue, || {
            let len = pieces(dice).iter().sum();
            let len = rustix::io::read(&fd, &mut buffer[..len])?;
            Ok(buffer[..len].to_vec())
        })
    }

    /// Calls `read` until EAGAIN. Returns false if the device is gone.
    fn drain_by(&self, queue: usize, mut read: impl FnMut() -> io::Result<Vec<u8>>) -> bool {
        loop {
            match read() {
                Ok(bytes) => self.apply(queue, &bytes),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if self.is_gone(&e) => return false,
                Err(e) => panic!("read: {e}"),
            }
        }
    }

    // These read the common queue until the device is gone.
    fn read(&self, mut dice: SmallRng) {
        loop {
            match read_pieces(&self.queues[COMMON].0, &pieces(&mut dice), 0) {
                Ok(bytes) => self.apply(COMMON, &bytes),
                Err(e) if self.is_gone(&e) => return,
                Err(e) => panic!("read: {e}"),
            }
            self.gate.pass();
        }
    }

    fn read_epoll(&self, mut dice: SmallRng) {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll_create");
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&epoll, &self.queues[COMMON].0, data, flags).expect("epoll_ctl");
        let mut ready = Vec::with_capacity(1);
        loop {
            ready.clear();
            epoll::wait(&epoll, spare_capacity(&mut ready), None).expect("epoll_wait");
            if !self.drain(COMMON, &mut dice) {
                return;
            }
            self.gate.pass();
        }
    }

    fn read_uring(&self, mut dice: SmallRng) {
        let mut ring = IoUring::new(1).expect("make a ring");
        let mut buffer = [0; BUFFER];
        let fd = Fd(self.queues[COMMON].0.as_fd().as_raw_fd());
        loop {
            let len: usize = pieces(&mut dice).iter().sum();
            let read = Read::new(fd, buffer.as_mut_ptr(), len as u32).build();
            // SAFETY: The buffer lives until the request is complete.
            unsafe { ring.submission().push(&read) }.expect("room in the ring");
            ring.submit_and_wait(1).expect("submit");
            let done = ring.completion().next().expect("it waited for one");
            match usize::try_from(done.result()) {
                Ok(len) => self.apply(COMMON, &buffer[..len]),
                Err(_) => {
                    let e = io::Error::from_raw_os_error(-done.result());
                    assert!(self.is_gone(&e), "read by io_uring: {e}");
                    return;
                }
            }
            self.gate.pass();
        }
    }
}

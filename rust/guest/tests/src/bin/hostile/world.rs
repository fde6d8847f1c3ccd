// SPDX-License-Identifier: GPL-2.0
//! The objects that the calls are about, and what is known of them.

use crate::{
    guide::Choices,
    memory::{Answer, Room, sys},
    report::{Op, Report},
};
use io_uring::IoUring;
use rand::{RngExt, seq::IndexedRandom};
use std::{
    fs,
    ops::Range,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};
use uverbs_mmu_notify::{Context, Event, Pd, sys::uapi::*};
use uverbs_mmu_notify_tests::*;

/// Fails with the seed and the call, unless a condition holds.
macro_rules! ensure {
    ($condition:expr, $call:expr, $($message:tt)*) => {
        if !$condition {
            panic!("{}: {:#x?}", format_args!($($message)*), $call)
        }
    };
}
pub(crate) use ensure;

/// More handles or FDs than a context, or the process, has here.
const FEW: u64 = 4096;
const REGIONS: usize = 40;
const QUEUES: usize = 8;
/// Pages that are registered and whose mapping changes.
pub const PAGES: usize = 32;

/// A context and its PDs.
pub struct Side {
    pub fd: i64,
    pub driver: u32,
    pub pds: Vec<u64>,
    keep: Option<(Arc<Context>, Vec<Arc<Pd>>)>,
}

impl Side {
    fn new(pds: usize) -> Self {
        let context = Context::open(&device()).expect("open the device");
        let pds: Vec<_> = (0..pds)
            .map(|_| Pd::alloc(&context).expect("allocate a PD"))
            .collect();
        Self {
            fd: context.as_fd().as_raw_fd().into(),
            driver: context.driver_id(),
            pds: pds.iter().map(|pd| pd.handle().into()).collect(),
            keep: Some((context, pds)),
        }
    }

    /// The context, for another thread.
    pub fn context(&self) -> Arc<Context> {
        self.keep.as_ref().expect("it is open").0.clone()
    }
}

/// A notification FD, and its page.
pub struct Queue {
    pub fd: OwnedFd,
    pub number: i64,
    side: usize,
    id: u32,
    /// Made in this address space.
    pub ours: bool,
    pub page: Page,
    newest: u64,
}

/// A mapping of the page of a queue.
pub struct Page(pub u64);

impl Page {
    pub fn load(&self) -> u64 {
        // SAFETY: It is mapped until this is dropped, and aligned.
        unsafe { (self.0 as *const u64).read_volatile() }
    }

    /// Nothing but the generation may be there.
    pub fn check(&self) {
        let rest = self.0 as *const u64;
        // SAFETY: As above.
        let zero = (1..PAGE / 8).all(|word| unsafe { rest.add(word).read_volatile() } == 0);
        assert!(zero, "the page of the generation has something else");
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        sys(libc::SYS_munmap, &[self.0, PAGE as u64]).expect("munmap");
    }
}

/// A region.
#[derive(Debug)]
struct Region {
    side: usize,
    handle: u64,
    /// The queue, unless it is not watched.
    queue: Option<u32>,
    cookie: u64,
    range: Range<u64>,
    reads: u32,
}

/// What a registration asked for.
#[derive(Clone, Debug)]
pub struct Asked {
    pub pd: u64,
    pub addr: u64,
    pub length: u64,
    pub iova: u64,
    pub access: u64,
    pub notify: Option<(i64, u64)>,
}

pub struct World {
    pub random: Choices,
    pub room: Room,
    pub report: &'static Report,
    pub sides: [Side; 2],
    pub queues: Vec<Queue>,
    regions: Vec<Region>,
    dead: Vec<u64>,
    pub memory: Map,
    pub spare: Map,
    pub others: Vec<OwnedFd>,
    pub ring: Option<IoUring>,
    /// Numbers of FDs that another thread opens and closes meanwhile: not everything is known.
    pub racing: Range<i64>,
    next_id: u32,
}

impl World {
    pub fn new(random: Choices, report: &'static Report) -> Self {
        let pipe = rustix::pipe::pipe().expect("make a pipe");
        let null = fs::File::open("/dev/null").expect("open /dev/null");
        let others = vec![
            pipe.0,
            pipe.1,
            null.into(),
            memfd(1, rustix::fs::MemfdFlags::empty()),
            rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC)
                .expect("make an epoll"),
        ];
        let mut world = Self {
            random,
            room: Room::new(),
            report,
            // The second one has handles that the first one never has.
            sides: [Side::new(2), Side::new(2 * REGIONS)],
            queues: Vec::new(),
            regions: Vec::new(),
            dead: Vec::new(),
            memory: Map::new(PAGES),
            spare: Map::new(8),
            others,
            ring: IoUring::new(8).ok(),
            racing: 0..0,
            next_id: 0,
        };
        for side in [0, 0, 1] {
            world.make_queue(side);
        }
        world
    }

    fn make_queue(&mut self, side: usize) {
        let context = self.sides[side].context();
        let queue = uverbs_mmu_notify::NotifyQueue::alloc(&context).expect("make a queue");
        self.add_queue(side, queue.into(), true);
    }

    pub fn exact(&self) -> bool {
        self.racing.is_empty()
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u32) -> bool {
        self.random.random_ratio(1, n)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *from.choose(&mut self.random).expect("something to choose")
    }

    /// A context, more often the first one.
    pub fn side(&mut self) -> usize {
        usize::from(self.one_in(8))
    }

    /// Enters an answer into the report.
    #[track_caller]
    pub fn enter(&self, op: Op, answer: Answer, call: &dyn std::fmt::Debug) {
        self.report.enter(op, answer);
        if let Err(errno) = answer {
            let known = op.errnos().contains(&errno) || !self.exact() && Op::any(errno);
            ensure!(known, call, "{op:?} failed with errno {errno}");
        }
        if let Some(at) = self.room.stray() {
            panic!("{op:?} changed byte {at:#x}, answer {answer:?}: {call:#x?}");
        }
    }

    // Numbers to use

    /// An FD of a queue of a context, or of any.
    pub fn queue_fd(&mut self, side: Option<usize>) -> i64 {
        let fits = |queue: &&Queue| side.is_none_or(|side| queue.side == side);
        let numbers: Vec<_> = self.queues.iter().filter(fits).map(|q| q.number).collect();
        numbers.choose(&mut self.random).copied().unwrap_or(-1)
    }

    /// Any FD, or none.
    pub fn odd_fd(&mut self) -> i64 {
        if !self.exact() && self.random.random() {
            return self.random.random_range(self.racing.clone());
        }
        let some = self.queue_fd(None);
        let other = self.random.random_range(0..self.others.len());
        match self.random.random_range(0..8) {
            0 => some,
            1 => some | 1 << 32,
            2 => some | i64::MIN,
            3 => self.others[other].as_raw_fd().into(),
            4 => self.sides[self.random.random_range(0..2)].fd,
            5 => i32::MAX.into(),
            6 => -1,
            _ => 1000,
        }
    }

    pub fn live_handle(&mut self, side: usize) -> Option<u64> {
        let mine = self.regions.iter().filter(|region| region.side == side);
        let handles: Vec<_> = mine.map(|region| region.handle).collect();
        handles.choose(&mut self.random).copied()
    }

    pub fn odd_handle(&mut self, side: usize) -> u64 {
        let some = self.live_handle(1 - side).unwrap_or(7);
        let dead = self.dead.choose(&mut self.random).copied().unwrap_or(3);
        match self.random.random_range(0..7) {
            0 => dead,
            1 | 2 => some,
            3 => self.sides[side].pds[0],
            4 => some | 1 << self.random.random_range(31..64),
            5 => u32::MAX.into(),
            _ => self.random.random_range(0..200),
        }
    }

    pub fn odd_number(&mut self) -> u64 {
        match self.random.random_range(0..7) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => u64::MAX - self.random.random_range(0..2 * PAGE as u64),
            4 => 1 << self.random.random_range(0..64),
            5 => self.random.random_range(0..4 * PAGE as u64),
            _ => self.random.random(),
        }
    }

    /// What registers some of the memory.
    pub fn some_region(&mut self, side: usize) -> Asked {
        let start = self.random.random_range(0..PAGES);
        let end = self.random.random_range(start..PAGES);
        let (first, last) = match self.one_in(3) {
            true => (self.random.random_range(0..PAGE / 2), PAGE / 2 + 1),
            false => (0, PAGE),
        };
        let addr = self.memory.at(start) as u64 + first as u64;
        let length = self.memory.at(end) as u64 + last as u64 - addr;
        let pds = self.sides[side].pds.clone();
        let watched = !self.one_in(8);
        let fd = self.queue_fd(Some(side));
        Asked {
            pd: self.pick(&pds),
            addr,
            length,
            iova: addr,
            access: self.pick(&[0, 1, 3, 7]),
            notify: (watched && fd >= 0).then(|| (fd, self.random.random())),
        }
    }

    pub fn odd_addr(&mut self) -> u64 {
        match self.random.random_range(0..4) {
            0 => self.queues.first().map_or(0, |queue| queue.page.0),
            1 => self.room.odd_pointer(&mut self.random),
            _ => self.odd_number(),
        }
    }

    pub fn odd_access(&mut self, access: u64) -> u64 {
        match self.random.random_range(0..3) {
            0 => self.odd_number(),
            1 => access ^ 1 << self.random.random_range(0..32),
            _ => access | u64::from(IB_UVERBS_ACCESS_ON_DEMAND),
        }
    }

    /// Makes one of the numbers of a command odd.
    pub fn mutate(&mut self, asked: &mut Asked) {
        match self.random.random_range(0..5) {
            0 => {
                asked.addr = self.odd_addr();
                asked.iova = asked.addr;
            }
            1 => asked.length = self.odd_number(),
            2 => asked.iova = self.odd_number(),
            3 => asked.access = self.odd_access(asked.access),
            _ => asked.notify = Some((self.odd_fd(), self.random.random())),
        }
    }

    // What a success means

    pub fn created(&mut self, side: usize, number: u64, call: &dyn std::fmt::Debug) {
        let known = self
            .queues
            .iter()
            .any(|queue| queue.number as u64 == number);
        ensure!(number < FEW && !known, call, "the new FD is {number:#x}");
        // SAFETY: The kernel has just made it, and nobody else knows the number.
        let fd = unsafe { OwnedFd::from_raw_fd(number as i32) };
        self.add_queue(side, fd, true);
    }

    fn add_queue(&mut self, side: usize, fd: OwnedFd, ours: bool) {
        let number = i64::from(fd.as_raw_fd());
        let mode = rustix::fs::fcntl_getfl(&fd).expect("F_GETFL");
        assert_eq!(
            mode & rustix::fs::OFlags::RWMODE,
            rustix::fs::OFlags::RDONLY
        );
        rustix::fs::fcntl_setfl(&fd, rustix::fs::OFlags::NONBLOCK).expect("F_SETFL");
        let protection = libc::PROT_READ as u64;
        let args = [
            0,
            PAGE as u64,
            protection,
            libc::MAP_SHARED as u64,
            number as u64,
            0,
        ];
        let page = Page(sys(libc::SYS_mmap, &args).expect("map the page"));
        page.check();
        let newest = 0;
        let id = self.next_id;
        self.next_id += 1;
        self.queues.push(Queue {
            fd,
            number,
            side,
            id,
            ours,
            page,
            newest,
        });
        while self.queues.len() > QUEUES {
            let oldest = self.random.random_range(0..QUEUES);
            self.queues.swap_remove(oldest);
        }
    }

    pub fn registered(
        &mut self,
        side: usize,
        handle: u64,
        asked: &Asked,
        call: &dyn std::fmt::Debug,
    ) {
        let taken = |region: &Region| region.side == side && region.handle == handle;
        let known = self.regions.iter().any(taken) || self.sides[side].pds.contains(&handle);
        ensure!(
            handle < FEW && !known,
            call,
            "the new handle is {handle:#x}"
        );
        let pd_is_known = self.sides[side].pds.contains(&asked.pd);
        ensure!(
            pd_is_known,
            call,
            "accepted the PD {:#x} of another context",
            asked.pd
        );
        let end = asked.addr.checked_add(asked.length);
        // ib_umem_get() pins the page around an empty range, unless that is at its start.
        let empty =
            asked.length == 0 && (asked.notify.is_some() || asked.addr.is_multiple_of(PAGE as u64));
        ensure!(end.is_some() && !empty, call, "accepted the range");
        let same_offset = (asked.addr ^ asked.iova) & (PAGE as u64 - 1) == 0;
        ensure!(same_offset, call, "accepted the iova");
        let odp = u64::from(IB_UVERBS_ACCESS_ON_DEMAND);
        ensure!(asked.access & odp == 0, call, "accepted on-demand paging");
        let mut queue = None;
        let mut cookie = 0;
        if let Some((fd, given)) = asked.notify {
            let found = self.queues.iter().find(|queue| queue.number == fd);
            match found {
                Some(found) => {
                    ensure!(
                        found.side == side,
                        call,
                        "accepted the FD of another context"
                    );
                    ensure!(found.ours, call, "accepted the FD of another address space");
                    queue = Some(found.id);
                }
                None => ensure!(self.racing.contains(&fd), call, "accepted FD {fd:#x}"),
            }
            cookie = given;
        }
        let range = asked.addr..asked.addr + asked.length;
        // One of two with the same cookie goes: their events could not be told apart.
        let is_twin =
            |other: &Region| queue.is_some() && other.queue == queue && other.cookie == cookie;
        let twin = self.regions.iter().position(is_twin);
        self.regions.push(Region {
            side,
            handle,
            queue,
            cookie,
            range,
            reads: 0,
        });
        let too_many = self.regions.len() > REGIONS;
        let random = too_many.then(|| self.random.random_range(0..REGIONS));
        if let Some(victim) = twin.or(random) {
            let (side, handle) = (self.regions[victim].side, self.regions[victim].handle);
            let context = self.sides[side].context();
            let count = destroy_handle(&context, handle as u32, 99);
            let why = if twin.is_some() {
                "it has a twin"
            } else {
                "too many regions"
            };
            self.deregistered(side, handle, Some(count), &why);
        }
    }

    pub fn is_live(&self, side: usize, handle: u64) -> bool {
        let mut regions = self.regions.iter();
        regions.any(|region| region.side == side && region.handle == handle)
    }

    pub fn deregistered(
        &mut self,
        side: usize,
        handle: u64,
        count: Option<u32>,
        call: &dyn std::fmt::Debug,
    ) {
        let is_it = |region: &Region| region.side == side && region.handle == handle;
        let at = self.regions.iter().position(is_it);
        ensure!(at.is_some(), call, "accepted the handle {handle:#x}");
        let region = self.regions.swap_remove(at.expect("it was checked"));
        if let Some(count) = count.filter(|_| self.exact()) {
            ensure!(count == region.reads, call, "count {count} of {region:#x?}");
        }
        if self.dead.len() > 16 {
            self.dead.clear();
        }
        self.dead.push(handle);
    }

    /// What QUERY_MR says of a region: the keys, the length and the iova.
    pub fn query(&self, side: usize, handle: u64) -> Option<(u32, u32, u64, u64)> {
        let (mut lkey, mut rkey, mut length, mut iova) = (0_u32, 0_u32, 0_u64, 0_u64);
        let context = self.sides[side].context();
        let queried = uverbs_mmu_notify::Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_QUERY_MR)
            .object(UVERBS_ATTR_QUERY_MR_HANDLE, handle as i64)
            .output(UVERBS_ATTR_QUERY_MR_RESP_LKEY, &mut lkey)
            .output(UVERBS_ATTR_QUERY_MR_RESP_RKEY, &mut rkey)
            .output(UVERBS_ATTR_QUERY_MR_RESP_LENGTH, &mut length)
            .output(UVERBS_ATTR_QUERY_MR_RESP_IOVA, &mut iova)
            .call(&*context, context.driver_id());
        queried.is_ok().then_some((lkey, rkey, length, iova))
    }

    /// Events that were read from a queue.
    pub fn delivered(&mut self, number: i64, bytes: &[u8], call: &dyn std::fmt::Debug) {
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.number == number) else {
            ensure!(self.racing.contains(&number), call, "read FD {number}");
            return;
        };
        ensure!(queue.ours, call, "read the queue of another address space");
        ensure!(
            bytes.len().is_multiple_of(size_of::<Event>()),
            call,
            "{} bytes",
            bytes.len()
        );
        for event in bytes.chunks_exact(size_of::<Event>()) {
            // SAFETY: An event is valid whatever its bytes are.
            let event = unsafe { event.as_ptr().cast::<Event>().read_unaligned() };
            let known = UNMAPPED | MAYBE_STALE;
            let reasons = event.reasons != 0 && event.reasons & !known == 0;
            ensure!(reasons && event.reserved == 0, call, "read {event:x?}");
            let newest = queue.page.load();
            let fits = event.generation <= newest
                && (event.generation > queue.newest || !self.racing.is_empty());
            ensure!(
                fits,
                call,
                "generation of {event:x?}, of the page: {newest:#x}"
            );
            queue.newest = event.generation;
            if !self.racing.is_empty() {
                continue;
            }
            let watches = |region: &&mut Region| {
                region.queue == Some(queue.id) && region.cookie == event.cookie
            };
            let region = self.regions.iter_mut().find(watches);
            ensure!(
                region.is_some(),
                call,
                "no region has the cookie of {event:x?}"
            );
            let region = region.expect("it was checked");
            let inside = event.start >= region.range.start && event.end <= region.range.end;
            ensure!(
                event.start < event.end && inside,
                call,
                "{event:x?} of {region:x?}"
            );
            region.reads += 1;
        }
    }

    // Other steps

    /// Changes the mapping of some pages.
    pub fn change(&mut self) {
        let start = self.random.random_range(0..PAGES);
        let pages = start..self.random.random_range(start..PAGES.min(start + 4)) + 1;
        match self.random.random_range(0..3) {
            0 => self.memory.dont_need(pages.clone()),
            1 => self.memory.map_over(pages.clone()),
            _ => self.memory.protect(
                pages.clone(),
                rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
            ),
        }
        pages.for_each(|page| self.memory.store(page, 0x22));
    }

    /// Closes one of many queues.
    pub fn close_one(&mut self) {
        if self.queues.len() > 3 {
            let at = self.random.random_range(0..self.queues.len());
            let queue = self.queues.swap_remove(at);
            queue.page.check();
            // In either order.
            if self.random.random() {
                drop(queue.page);
                drop(queue.fd);
            }
        }
        if !(0..2).all(|side| {
            self.queues
                .iter()
                .any(|queue| queue.side == side && queue.ours)
        }) {
            (0..2).for_each(|side| self.make_queue(side));
        }
    }

    /// This is a forked child: nothing that was made before is of this address space.
    pub fn enter_child(&mut self) {
        // It has no mapping of the pages.
        for Queue { side, fd, page, .. } in std::mem::take(&mut self.queues) {
            std::mem::forget(page);
            self.add_queue(side, fd, false);
        }
        self.ring = IoUring::new(8).ok();
        self.random.enter_child();
    }

    /// No region may be left that is not known, and no FD. Destroys all regions, or none.
    pub fn finish(&mut self, fds: usize) {
        self.room.check_read_only();
        self.queues.iter().for_each(|queue| queue.page.check());
        if !self.exact() {
            return;
        }
        if self.random.random() {
            for region in std::mem::take(&mut self.regions) {
                let context = self.sides[region.side].context();
                let count = destroy_handle(&context, region.handle as u32, 99);
                assert_eq!(count, region.reads, "count of {region:#x?}");
            }
        }
        for side in 0..2 {
            for handle in 0..4 * REGIONS as u64 {
                let found = self.query(side, handle).is_some();
                let known = self.is_live(side, handle);
                assert_eq!(found, known, "region {handle} of context {side}");
            }
        }
        assert_eq!(count_fds(), fds + self.queues.len(), "FDs");
    }

    /// Closes the contexts: the FDs that remain fail with EIO.
    pub fn disconnect(&mut self) {
        for side in &mut self.sides {
            side.keep = None;
            side.fd = -1;
        }
    }
}

pub fn count_fds() -> usize {
    fs::read_dir("/proc/self/fd").expect("list the FDs").count()
}

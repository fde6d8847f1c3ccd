// SPDX-License-Identifier: GPL-2.0
//! read() that waits, poll() and epoll.

use libc::c_int;
use rustix::{
    event::{
        PollFlags,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    io::Errno,
    process::Signal,
};
use std::{
    io, mem,
    ops::Range,
    os::fd::OwnedFd,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};
use uverbs_mmu_notify::{Event, Mr, NotifyQueue};
use uverbs_mmu_notify_tests::*;

const READ: &[libc::c_long] = &[libc::SYS_read];
const RECORD: usize = size_of::<Event>();

/// A queue that blocks, and one watched region of `pages`.
fn blocking(pages: Range<usize>) -> (Fixture, Arc<NotifyQueue>, Map, Mr) {
    let fixture = Fixture::new();
    let queue = Arc::new(NotifyQueue::alloc(&fixture.context).unwrap());
    let map = Map::new(pages.len());
    let args = fixture.args(map, pages, 7).watched(&queue, 7);
    let mr = reg(&fixture.pd, &args);
    (fixture, queue, map, mr)
}

fn read_one(queue: &Arc<NotifyQueue>) -> impl FnOnce() -> io::Result<Record> + Send + use<> {
    let queue = queue.clone();
    move || {
        let mut events = [Event::default(); 2];
        let count = queue.read(&mut events)?;
        assert_eq!(count, 1, "events read");
        Ok(events[0].into())
    }
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_: c_int) {
    SIGNALS.fetch_add(1, Ordering::SeqCst);
}

fn handle_signal(flags: c_int) {
    // SAFETY: The handler only adds to an atomic.
    let ret = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = count_signal as extern "C" fn(c_int) as usize;
        action.sa_flags = flags;
        libc::sigaction(libc::SIGUSR1, &action, ptr::null_mut())
    };
    assert_eq!(ret, 0, "sigaction");
}

/// Interface: read() does not wait if an event is pending.
#[test]
fn read_of_what_is_there() {
    let (_fixture, queue, map, _mr) = blocking(0..1);
    map.unmap(0..1);
    let record = read_one(&queue)().expect("read");
    assert_eq!(record, Record::new(map, 0..1, 7, 1, UNMAPPED));
}

/// Readers that sleep, with room for one event each.
struct Readers {
    queue: Arc<NotifyQueue>,
    asleep: Vec<Blocked<io::Result<u64>>>,
    sleeps: Vec<usize>,
}

impl Readers {
    fn new(queue: &Arc<NotifyQueue>, count: usize) -> Self {
        let mut readers = Self {
            queue: queue.clone(),
            asleep: Vec::new(),
            sleeps: Vec::new(),
        };
        (0..count).for_each(|_| readers.add());
        readers
    }

    fn add(&mut self) {
        let queue = self.queue.clone();
        let reader = Blocked::spawn(READ, move || {
            let mut events = [Event::default(); 1];
            queue.read(&mut events).map(|_| events[0].cookie)
        });
        self.sleeps.push(reader.sleeps());
        self.asleep.push(reader);
    }

    /// Waits until all but `left` have returned, and returns the cookies that they have
    /// read. The others must not have been woken.
    #[track_caller]
    fn expect_left(&mut self, left: usize) -> Vec<u64> {
        let finished = || self.asleep.iter().filter(|reader| reader.is_finished());
        within("read()", || {
            while self.asleep.len() - finished().count() > left {
                thread::yield_now();
            }
        });
        let mut cookies = Vec::new();
        let (mut asleep, mut sleeps) = (Vec::new(), Vec::new());
        for (reader, slept) in mem::take(&mut self.asleep).into_iter().zip(&self.sleeps) {
            if reader.is_finished() {
                cookies.push(reader.join().expect("read"));
                continue;
            }
            reader.wait_asleep();
            assert_eq!(reader.sleeps(), *slept, "how often a reader slept");
            asleep.push(reader);
            sleeps.push(*slept);
        }
        assert_eq!(asleep.len(), left, "readers that still wait");
        (self.asleep, self.sleeps) = (asleep, sleeps);
        cookies.sort();
        cookies
    }
}

/// A queue that blocks, and a watched region of each of `pages` pages.
fn blocking_each(pages: usize) -> (Fixture, Arc<NotifyQueue>, Map, Vec<Mr>) {
    let fixture = Fixture::new();
    let queue = Arc::new(NotifyQueue::alloc(&fixture.context).unwrap());
    let map = Map::new(pages);
    let watch = |page| {
        let args = fixture.args(map, page..page + 1, 0);
        reg(&fixture.pd, &args.watched(&queue, page as u64))
    };
    let mrs = (0..pages).map(watch).collect();
    (fixture, queue, map, mrs)
}

/// G6: an event wakes one reader, and lets the others sleep.
#[test]
fn one_event_wakes_one_reader() {
    let (_fixture, queue, map, _mrs) = blocking_each(3);
    let mut readers = Readers::new(&queue, 3);
    for page in 0..3 {
        // Not unmapped: a thread's stack may come there, and go.
        map.map_over(page..page + 1);
        assert_eq!(readers.expect_left(2 - page), [page as u64], "cookies");
    }
}

/// G4: each of several events at once wakes a reader when several wait. One that has no
/// room for the next event wakes the next reader.
#[test]
fn several_readers_are_woken() {
    let (_fixture, queue, map, _mrs) = blocking_each(3);
    let mut readers = Readers::new(&queue, 4);
    map.map_over(0..3);
    assert_eq!(readers.expect_left(1), [0, 1, 2], "cookies");
}

/// G4: G6: a reader that waits for its buffer hands over to the next one.
#[test]
fn reader_that_faults_hands_over() {
    let (_fixture, queue, map, _mrs) = blocking_each(3);
    let buffer = Map::untouched(1);
    let fault = Userfault::missing(buffer, 0..1);
    let first = {
        let queue = queue.clone();
        Blocked::spawn(READ, move || read_raw(&*queue, buffer.at(0), RECORD))
    };
    let mut others = Readers::new(&queue, 2);
    map.map_over(0..1);
    let faulted = within("the wait for the page fault", || fault.wait_for_fault());
    assert_eq!(faulted, buffer.at(0) as u64, "what faults");
    for page in 0..2 {
        assert_eq!(others.expect_left(1 - page), [page as u64], "cookies");
        map.map_over(page + 1..page + 2);
    }
    fault.fill(buffer, 0..1);
    let read = within("read()", || first.join());
    assert_eq!(read.expect("read"), RECORD, "bytes read");
}

/// G4: so does one that fails.
#[test]
fn reader_that_fails_hands_over() {
    let (_fixture, queue, map, _mrs) = blocking_each(1);
    let nowhere = Map::nowhere();
    let first = {
        let queue = queue.clone();
        Blocked::spawn(READ, move || read_raw(&*queue, nowhere.at(0), RECORD))
    };
    let mut others = Readers::new(&queue, 1);
    map.map_over(0..1);
    expect_errno(within("read()", || first.join()), Errno::FAULT, "read()");
    assert_eq!(others.expect_left(0), [0], "cookies");
}

/// G4: a signal interrupts a waiting read(), which consumes nothing.
#[test]
fn read_is_interrupted() {
    let (_fixture, queue, map, mut mr) = blocking(0..1);
    handle_signal(0);
    let reader = Blocked::spawn(READ, read_one(&queue));
    reader.signal(Signal::USR1);
    expect_errno(reader.join(), Errno::INTR, "read() with a signal");
    assert_eq!(
        SIGNALS.load(Ordering::SeqCst),
        1,
        "calls of the signal handler"
    );

    map.unmap(0..1);
    read_one(&queue)().expect("read");
    assert_eq!(mr.destroy().unwrap(), 1, "events reported");
}

/// Interface: a signal that is pending makes read() return after one batch. The other
/// events stay, and a non-blocking read() does not return EINTR.
#[test]
fn read_is_short_with_a_signal_pending() {
    /// The most events that the kernel copies at once.
    const BATCH: usize = 16;
    const EVENTS: usize = 2 * BATCH + 1;
    let child = Child::fork(|| {
        let fixture = Fixture::new();
        let map = Map::new(EVENTS);
        let mrs = fixture.watch_each(map, 0..EVENTS);
        map.map_over(0..EVENTS);
        let mut events = [Event::default(); EVENTS];
        stop_traced();
        let first = fixture.queue.read(&mut events).expect("read");
        assert_eq!(first, BATCH, "events read with a signal pending");
        let rest = fixture.queue.read(&mut events).expect("read");
        assert_eq!(rest, EVENTS - BATCH, "events read after that");
        for mut mr in mrs {
            assert_eq!(mr.destroy().unwrap(), 1, "events reported");
        }
        0
    });
    child.wait_stopped();
    child.interrupt(libc::SYS_read);
    assert_eq!(child.wait(), Exit::Code(0), "the child");
}

/// Interface: with SA_RESTART a signal does not interrupt read().
#[test]
fn read_is_restarted() {
    let (_fixture, queue, map, _mr) = blocking(0..1);
    handle_signal(libc::SA_RESTART);
    let reader = Blocked::spawn(READ, read_one(&queue));
    reader.signal(Signal::USR1);
    while SIGNALS.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    reader.wait_asleep();

    map.unmap(0..1);
    let record = reader.join().expect("read");
    assert_eq!(record, Record::new(map, 0..1, 7, 1, UNMAPPED));
}

/// Interface: O_NONBLOCK can be set and cleared later.
#[test]
fn nonblock_is_switched() {
    let (_fixture, queue, map, _mr) = blocking(0..1);
    queue.set_nonblocking(true).unwrap();
    let empty = within("read() with O_NONBLOCK", read_one(&queue));
    expect_errno(empty, Errno::AGAIN, "read() with O_NONBLOCK");
    queue.set_nonblocking(false).unwrap();
    let reader = Blocked::spawn(READ, read_one(&queue));
    map.unmap(0..1);
    reader.join().expect("read");
}

/// Interface: readv() is one read. It does not wait for more than the first event, and an
/// event may go to several pieces.
#[test]
fn readv_is_one_read() {
    let (_fixture, queue, map, mut mr) = blocking(0..3);
    let lengths = [[RECORD, RECORD], [8, 2 * RECORD - 8], [RECORD - 1, 1]];
    for (page, lengths) in lengths.iter().enumerate() {
        map.map_over(page..page + 1);
        let bytes = within("readv()", || read_pieces(&*queue, lengths, 0));
        let generation = page as u64 + 1;
        assert_eq!(
            event(&bytes.expect("readv")),
            Record::new(map, page..page + 1, 7, generation, UNMAPPED)
        );
    }
    let small = read_pieces(&*queue, &[RECORD / 2, RECORD / 2 - 1], 0);
    expect_errno(small, Errno::INVAL, "readv() with too little room");
    assert_eq!(mr.destroy().unwrap(), 3, "events reported");
}

/// Interface: RWF_NOWAIT does for one read what O_NONBLOCK does for all.
#[test]
fn nowait() {
    let (_fixture, queue, map, _mr) = blocking(0..1);
    let read = || read_pieces(&*queue, &[RECORD], libc::RWF_NOWAIT);
    let empty = within("preadv2()", read);
    expect_errno(empty, Errno::AGAIN, "RWF_NOWAIT of an empty queue");
    map.map_over(0..1);
    let bytes = read().expect("RWF_NOWAIT with an event pending");
    assert_eq!(event(&bytes), Record::new(map, 0..1, 7, 1, UNMAPPED));
}

/// Interface: poll() returns whether an event is pending.
#[test]
fn poll() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let mrs = fixture.watch_each(map, 0..2);
    let poll = || fixture.queue.poll(NOW).unwrap();
    assert_eq!(poll(), PollFlags::empty(), "before the changes");
    map.unmap(0..2);
    assert_eq!(poll(), PollFlags::IN, "after the changes");
    fixture.queue.read(&mut [Event::default()]).unwrap();
    assert_eq!(poll(), PollFlags::IN, "with one event read of two");
    drop(mrs);
    assert_eq!(poll(), PollFlags::empty(), "after the deregistration");
}

fn epoll(queue: &NotifyQueue, flags: EventFlags) -> OwnedFd {
    let epoll = epoll::create(CreateFlags::CLOEXEC).unwrap();
    epoll::add(&epoll, queue, EventData::new_u64(0), EventFlags::IN | flags).unwrap();
    epoll
}

fn ready(epoll: &OwnedFd) -> Option<EventFlags> {
    let mut events = Vec::with_capacity(1);
    epoll::wait(
        epoll,
        rustix::buffer::spare_capacity(&mut events),
        NOW.as_ref(),
    )
    .unwrap();
    events.pop().map(|event: epoll::Event| event.flags)
}

/// Interface: level-triggered epoll returns for as long as an event is pending.
#[test]
fn epoll_level() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let _mrs = fixture.watch_each(map, 0..2);
    let epoll = epoll(&fixture.queue, EventFlags::empty());
    assert_eq!(ready(&epoll), None, "before the changes");
    map.unmap(0..2);
    for what in ["after the changes", "asked again"] {
        assert_eq!(ready(&epoll), Some(EventFlags::IN), "{what}");
    }
    fixture.queue.read(&mut [Event::default()]).unwrap();
    assert_eq!(ready(&epoll), Some(EventFlags::IN), "with one event left");
    fixture.queue.read(&mut [Event::default()]).unwrap();
    assert_eq!(ready(&epoll), None, "with none left");
    fixture.context.disconnect().unwrap();
    assert_eq!(ready(&epoll), Some(EventFlags::ERR), "after the end");
}

/// Interface: edge-triggered epoll returns once for a queue that becomes non-empty, and
/// again after a drain until EAGAIN. A merge is no edge.
#[test]
fn epoll_edge() {
    let fixture = Fixture::new();
    let map = Map::new(4);
    let _mr = fixture.watch(map, 0..4, 7);
    let epoll = epoll(&fixture.queue, EventFlags::ET);
    assert_eq!(ready(&epoll), None, "before the changes");
    for page in [0, 2] {
        map.unmap(page..page + 1);
        assert_eq!(ready(&epoll), Some(EventFlags::IN), "after {page}");
        assert_eq!(ready(&epoll), None, "asked again after {page}");
        map.unmap(page + 1..page + 2);
        assert_eq!(ready(&epoll), None, "after a merge into {page}");
        assert_eq!(read_all(&fixture.queue).len(), 1, "events");
        assert_eq!(ready(&epoll), None, "after draining {page}");
    }
}

/// Interface: a waiting epoll is woken.
#[test]
fn epoll_is_woken() {
    const EPOLL: &[libc::c_long] = &[
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
    ];
    let (_fixture, queue, map, _mr) = blocking(0..1);
    let epoll = epoll(&queue, EventFlags::ET);
    let waiter = Blocked::spawn(EPOLL, move || {
        let mut events = Vec::with_capacity(1);
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None).unwrap();
        events.pop().map(|event: epoll::Event| event.flags)
    });
    map.unmap(0..1);
    assert_eq!(waiter.join(), Some(EventFlags::IN), "after the change");
}

/// Interface: a pending signal interrupts the creation of the first FD of a process. It is
/// restarted.
#[test]
fn creation_is_restarted() {
    let child = Child::fork(|| {
        let pd = open();
        stop_traced();
        NotifyQueue::alloc(pd.context()).expect("make a queue");
        0
    });
    child.wait_stopped();
    child.interrupt(libc::SYS_ioctl);
    assert_eq!(child.wait(), Exit::Code(0), "the child");
}

/// Interface: it is not restarted if the signal has a handler without SA_RESTART.
#[test]
fn creation_is_interrupted() {
    for (flags, interrupted) in [(0, true), (libc::SA_RESTART, false)] {
        let child = Child::fork(|| {
            let pd = open();
            handle_signal(flags);
            stop_traced();
            let made = NotifyQueue::alloc(pd.context());
            assert_eq!(SIGNALS.load(Ordering::SeqCst), 1, "calls of the handler");
            match interrupted {
                true => expect_errno(made, Errno::INTR, "MMU_NOTIFY_ALLOC"),
                false => drop(made.expect("make a queue")),
            }
            NotifyQueue::alloc(pd.context()).expect("make a queue later");
            0
        });
        child.wait_stopped();
        child.interrupt_and_deliver(libc::SYS_ioctl);
        assert_eq!(child.wait(), Exit::Code(0), "SA_RESTART: {}", !interrupted);
    }
}

/// Interface: a pending signal does not interrupt REG_MR, not even the first one of a
/// process.
#[test]
fn registration_with_a_signal_pending() {
    let child = Child::fork(|| {
        let fixture = Fixture::new();
        let map = Map::new(1);
        let args = fixture.args(map, 0..1, 7);
        stop_traced();
        let mr = try_reg(&fixture.pd, &args).expect("register");
        map.unmap(0..1);
        fixture.expect(&[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
        mem::forget(mr);
        0
    });
    child.wait_stopped();
    child.interrupt(libc::SYS_ioctl);
    assert_eq!(child.wait(), Exit::Code(0), "the child");
}

// SPDX-License-Identifier: GPL-2.0
//! io_uring reads and polls.

use io_uring::{
    IoUring, cqueue,
    opcode::{AsyncCancel, PollAdd, Read},
    squeue::{Entry, Flags},
    types::Fd,
};
use libc::{POLLERR, POLLIN};
use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
};
use uverbs_mmu_notify::{Event, Mr, NotifyQueue};
use uverbs_mmu_notify_tests::*;

const RECORD: i32 = size_of::<Event>() as i32;
/// The user data of the request under test.
const TAG: u64 = 7;
/// A read is tried at once, or left to a worker.
const WAYS: [Flags; 2] = [Flags::empty(), Flags::ASYNC];

/// A queue that blocks, a region of two pages, a ring, and a buffer.
struct Setup {
    ring: IoUring,
    buffer: Map,
    map: Map,
    mr: Mr,
    fixture: Fixture,
}

impl Setup {
    fn new() -> Self {
        Self::with(IoUring::new(8).expect("make a ring"))
    }

    fn with(ring: IoUring) -> Self {
        let fixture = Fixture::new();
        fixture.queue.set_nonblocking(false).unwrap();
        let map = Map::new(2);
        Self {
            mr: fixture.watch(map, 0..2, 7),
            ring,
            buffer: Map::new(1),
            map,
            fixture,
        }
    }

    fn fd(&self) -> Fd {
        Fd(self.fixture.queue.as_fd().as_raw_fd())
    }

    /// A read with room for two events.
    fn to_read(&self) -> Read {
        Read::new(self.fd(), self.buffer.at(0), 2 * RECORD as u32)
    }

    /// The same, ready to be submitted.
    fn read(&self) -> Entry {
        self.to_read().build().user_data(TAG)
    }

    fn submit(&mut self, entry: &Entry) {
        // SAFETY: The buffer is a map, and stays mapped.
        unsafe { self.ring.submission().push(entry) }.expect("room in the ring");
        self.ring.submit().expect("submit");
    }

    /// Nothing is complete yet.
    #[track_caller]
    fn expect_waits(&mut self) {
        self.ring.submit().expect("enter the kernel");
        let entry = self.ring.completion().next();
        assert!(entry.is_none(), "expected it to wait: {entry:?}");
    }

    #[track_caller]
    fn completion(&mut self) -> cqueue::Entry {
        within("the request", || self.ring.submit_and_wait(1)).expect("wait");
        self.ring.completion().next().expect("it waited for one")
    }

    /// The request completes with `result`, of which an errno is negative.
    #[track_caller]
    fn expect_completion(&mut self, result: i32) {
        let entry = self.completion();
        assert_eq!((entry.user_data(), entry.result()), (TAG, result));
    }

    /// The request has read the event of `page`, of this generation.
    #[track_caller]
    fn expect_event(&mut self, page: usize, generation: u64) {
        self.expect_completion(RECORD);
        // SAFETY: The kernel has written an event there.
        let event = unsafe { self.buffer.at(0).cast::<Event>().read_unaligned() };
        let expected = Record::new(self.map, page..page + 1, 7, generation, UNMAPPED);
        assert_eq!(Record::from(event), expected);
    }

    #[track_caller]
    fn expect_count(&mut self, count: u32) {
        assert_eq!(self.mr.destroy().unwrap(), count, "events reported");
    }

    /// No request takes the next event.
    #[track_caller]
    fn expect_not_taken(&mut self) {
        self.map.unmap(1..2);
        self.fixture.queue.set_nonblocking(true).unwrap();
        self.fixture
            .expect(&[Record::new(self.map, 1..2, 7, 1, UNMAPPED)]);
        self.expect_count(1);
    }
}

fn has_thread(name: &str) -> bool {
    fs::read_dir("/proc/self/task").unwrap().any(|task| {
        let comm = task.unwrap().path().join("comm");
        fs::read_to_string(comm).is_ok_and(|comm| comm.starts_with(name))
    })
}

/// Interface: a pending event is read.
#[test]
fn read_of_what_is_there() {
    let mut setup = Setup::new();
    setup.map.unmap(0..1);
    setup.submit(&setup.read());
    setup.expect_event(0, 1);
    setup.expect_count(1);
}

/// Interface: a worker, which runs in the owner's mm, may read.
#[test]
fn read_by_a_worker() {
    let mut setup = Setup::new();
    setup.map.unmap(0..1);
    setup.submit(&setup.read().flags(Flags::ASYNC));
    setup.expect_event(0, 1);
    assert!(has_thread("iou-wrk-"), "no worker has read");
    setup.expect_count(1);
}

/// Interface: so may the thread that polls the ring.
#[test]
fn read_by_the_polling_thread() {
    let ring = IoUring::builder().setup_sqpoll(1000).build(8);
    let mut setup = Setup::with(ring.expect("make a ring"));
    setup.map.unmap(0..1);
    setup.submit(&setup.read());
    setup.expect_event(0, 1);
    assert!(has_thread("iou-sqp-"), "no thread polls the ring");
    setup.expect_count(1);
}

/// Interface: a read waits for an event, by the ring's poll or by a worker, also with
/// O_NONBLOCK (io_uring/rw.c: the file supports IOCB_NOWAIT).
#[test]
fn read_waits() {
    for (flags, nonblocking) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        let mut setup = Setup::new();
        setup.fixture.queue.set_nonblocking(nonblocking).unwrap();
        for page in 0..2 {
            setup.submit(&setup.read().flags(flags));
            setup.expect_waits();
            // Not unmapped: a thread's stack may come there, and go.
            setup.map.map_over(page..page + 1);
            setup.expect_event(page, page as u64 + 1);
        }
        setup.expect_count(2);
    }
}

/// Interface: with RWF_NOWAIT a read of an empty queue fails with EAGAIN.
#[test]
fn read_does_not_wait() {
    for flags in WAYS {
        let mut setup = Setup::new();
        let read = setup.to_read().rw_flags(libc::RWF_NOWAIT).build();
        let read = read.user_data(TAG).flags(flags);
        setup.submit(&read);
        setup.expect_completion(-libc::EAGAIN);
        setup.map.map_over(0..1);
        setup.submit(&read);
        setup.expect_event(0, 1);
        setup.expect_count(1);
    }
}

/// Interface: the end of the context completes a read that waits.
#[test]
fn read_waits_for_the_end() {
    let mut setup = Setup::new();
    setup.submit(&setup.read());
    setup.expect_waits();
    setup.fixture.context.disconnect().unwrap();
    setup.expect_completion(-libc::EIO);
    std::mem::forget(setup);
}

/// G4: a read that is cancelled consumes nothing.
#[test]
fn read_is_cancelled() {
    let mut setup = Setup::new();
    setup.submit(&setup.read());
    setup.expect_waits();
    setup.submit(&AsyncCancel::new(TAG).build());
    let mut results: Vec<_> = (0..2)
        .map(|_| setup.completion())
        .map(|entry| (entry.user_data(), entry.result()))
        .collect();
    results.sort();
    assert_eq!(results, [(0, 0), (TAG, -libc::ECANCELED)], "completions");
    setup.expect_not_taken();
}

/// G4: G8: the ring is closed while a read and a poll wait in it.
#[test]
fn ring_is_closed() {
    let mut setup = Setup::new();
    setup.submit(&setup.read());
    setup.submit(&PollAdd::new(setup.fd(), POLLIN as u32).multi(true).build());
    setup.expect_waits();
    setup.ring = IoUring::new(1).expect("make a ring");
    setup.expect_not_taken();
}

/// G4: a read whose buffer faults consumes nothing.
#[test]
fn buffer_faults() {
    let mut setup = Setup::new();
    setup.buffer.unmap(0..1);
    setup.submit(&setup.read());
    setup.map.unmap(0..1);
    setup.expect_completion(-libc::EFAULT);
    setup.fixture.queue.set_nonblocking(true).unwrap();
    let expected = Record::new(setup.map, 0..1, 7, 1, UNMAPPED);
    setup.fixture.expect(&[expected]);
    setup.expect_count(1);
}

/// G4: a forked child reads nothing through an inherited ring.
#[test]
fn child_uses_the_ring() {
    for flags in [Flags::empty(), Flags::ASYNC] {
        let mut setup = Setup::new();
        setup.map.unmap(0..1);
        let child = in_child(|| {
            setup.submit(&setup.read().flags(flags));
            -setup.completion().result()
        });
        assert_eq!(child, Exit::Code(libc::EPERM), "read by a child");
        setup.fixture.queue.set_nonblocking(true).unwrap();
        let expected = Record::new(setup.map, 0..1, 7, 1, UNMAPPED);
        setup.fixture.expect(&[expected]);
        setup.expect_count(1);
    }
}

/// Reads one event, and EAGAIN.
fn read_one(queue: &NotifyQueue) {
    queue.set_nonblocking(true).unwrap();
    assert_eq!(read_all(queue).len(), 1, "events read");
}

/// Interface: a poll completes by an event, at once if one is pending.
#[test]
fn poll() {
    let mut setup = Setup::new();
    let poll = PollAdd::new(setup.fd(), POLLIN as u32)
        .build()
        .user_data(TAG);
    for page in 0..2 {
        setup.submit(&poll);
        setup.expect_waits();
        setup.map.map_over(page..page + 1);
        setup.expect_completion(POLLIN.into());
        setup.submit(&poll);
        setup.expect_completion(POLLIN.into());
        read_one(&setup.fixture.queue);
    }
    setup.submit(&poll);
    setup.expect_waits();
    setup.fixture.context.disconnect().unwrap();
    setup.expect_completion(POLLERR.into());
    std::mem::forget(setup);
}

/// Interface: a multishot poll completes by the first event after each drain until EAGAIN,
/// and by the end.
#[test]
fn poll_multishot() {
    let mut setup = Setup::new();
    let poll = PollAdd::new(setup.fd(), POLLIN as u32).multi(true);
    setup.submit(&poll.build().user_data(TAG));
    for page in 0..2 {
        setup.expect_waits();
        setup.map.map_over(page..page + 1);
        let entry = setup.completion();
        let seen = (entry.user_data(), entry.result());
        assert_eq!(seen, (TAG, POLLIN.into()), "the completion");
        assert!(cqueue::more(entry.flags()), "more is to come");
        read_one(&setup.fixture.queue);
    }
    setup.expect_waits();
    setup.fixture.context.disconnect().unwrap();
    setup.expect_completion(POLLERR.into());
    std::mem::forget(setup);
}

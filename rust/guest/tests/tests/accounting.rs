// SPDX-License-Identifier: GPL-2.0
//! What is charged to whom.

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, setrlimit},
};
use uverbs_mmu_notify::{MrArgs, NotifyQueue};
use uverbs_mmu_notify_tests::*;

/// Interface: a stale region counts against RLIMIT_MEMLOCK until it is deregistered.
#[test]
fn stale_region_is_locked() {
    const PAGES: usize = 8;
    const USER: libc::uid_t = 65534;
    let child = in_child(|| {
        let fixture = Fixture::new();
        let (stale, other) = (Map::new(PAGES), Map::new(PAGES));
        let limit = Some((PAGES * PAGE) as u64);
        let limit = Rlimit {
            current: limit,
            maximum: limit,
        };
        setrlimit(Resource::Memlock, limit).expect("set RLIMIT_MEMLOCK");
        // SAFETY: It takes three numbers, and this process has one thread.
        let ret = unsafe { libc::setresuid(USER, USER, USER) };
        assert_eq!(ret, 0, "give up CAP_IPC_LOCK");

        let mut mr = fixture.watch(stale, 0..PAGES, 7);
        stale.unmap(0..PAGES);
        fixture.expect(&[Record::new(stale, 0..PAGES, 7, 1, UNMAPPED)]);
        let args = MrArgs::new(other.at(0), PAGE);
        let refused = try_reg(&fixture.pd, &args);
        expect_errno(refused, Errno::NOMEM, "REG_MR beyond the limit");
        assert_eq!(mr.destroy().unwrap(), 1, "events reported");
        drop(reg(&fixture.pd, &args));
        0
    });
    assert_eq!(child, Exit::Code(0), "the child");
}

/// Interface: watches are charged to the memory cgroup.
#[test]
fn watches_are_charged() {
    const WATCHES: usize = 1500;
    /// The least that a watch takes.
    const WATCH: usize = 192;
    in_group(|group| {
        let fixture = Fixture::new();
        let args = MrArgs::new(Map::new(1).at(0), 8).watched(&fixture.queue, 7);
        let register = || -> Vec<_> { (0..WATCHES).map(|_| reg(&fixture.pd, &args)).collect() };
        drop(group.adds("slab", WATCHES * WATCH, register));
    });
}

/// Interface: the queue and the page of an FD are charged to the memory cgroup.
#[test]
fn queues_are_charged() {
    const QUEUES: usize = 200;
    /// Less than an FD with its queue takes on the release kernel, where objects are smaller,
    /// and more than the rest of an FD on the debug kernel.
    const QUEUE: usize = 1280;
    in_group(|group| {
        let pd = open();
        let queue = |_| NotifyQueue::alloc(pd.context()).expect("make a queue");
        let make = || -> Vec<_> { (0..QUEUES).map(queue).collect() };
        let pages = || group.adds("vmalloc", QUEUES * PAGE, make);
        drop(group.adds("slab", QUEUES * QUEUE, pages));
    });
}

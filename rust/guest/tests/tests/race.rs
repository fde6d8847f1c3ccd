// SPDX-License-Identifier: GPL-2.0
//! Registration and teardown while the mapping is being changed. The tests' kernel module
//! and userfaultfd force the order of events.

use rustix::io::Errno;
use std::{io, mem, sync::Arc};
use uverbs_mmu_notify::{Mr, MrArgs, Pd, sys::verbs::*};
use uverbs_mmu_notify_tests::*;

const IOCTL: &[libc::c_long] = &[libc::SYS_ioctl];

/// Where the kernel waits for running invalidations before it pins, and before it stops a
/// watch.
const BEFORE_PIN: &str = "mmu_interval_read_begin";
const BEFORE_END: &str = "mmu_interval_notifier_remove";

/// Registers a page while `change` of its mapping is in flight: all registered notifiers
/// have been called, and the page is still mapped. Returns the result, and whether the
/// registration waited for the change.
fn in_flight(fixture: &Fixture, map: Map, change: fn(Map)) -> (io::Result<Mr>, bool) {
    let (pd, args) = (fixture.pd.clone(), fixture.args(map, 0..1, 7));
    let hold = Hold::new();
    // None can be made while mmap_lock is held.
    let registrar = Ready::new(move || try_reg(&pd, &args));
    let changer = Ready::new(move || change(map));

    hold.arm(map, 0..1);
    changer.go();
    hold.wait();
    registrar.go();
    let waited = registrar.reaches(BEFORE_PIN);
    hold.release();
    changer.join();
    (registrar.join(), waited)
}

/// The registration pins the page that is mapped, or an event reports it.
#[track_caller]
fn mapped_or_reported(change: fn(Map)) {
    let fixture = Fixture::new();
    let peer = Peer::new(&fixture.pd);
    let map = Map::new(1);
    let (mr, waited) = in_flight(&fixture, map, change);
    let mr = mr.expect("register");

    let events = read_all(&fixture.queue);
    let status = peer.write(map.at(0), mr.rkey(), 0x5a);
    assert_eq!(status, IBV_WC_SUCCESS, "the work completion");
    assert!(
        map.load(0) == 0x5a || !events.is_empty(),
        "RDMA does not reach what is mapped, and no event says so"
    );
    assert!(waited, "expected the registration to wait for the change");
}

/// G3: MADV_DONTNEED is in flight.
#[test]
fn madv_dontneed_in_flight() {
    mapped_or_reported(|map| map.dont_need(0..1));
}

/// G3: mmap over the pages is in flight.
#[test]
fn mmap_over_in_flight() {
    mapped_or_reported(|map| map.map_over(0..1));
}

/// G3: munmap is in flight. The registration fails, and reports nothing.
#[test]
fn munmap_in_flight() {
    let watches = Watches::new();
    let fixture = Fixture::new();
    let map = Map::new(1);
    let (mr, waited) = in_flight(&fixture, map, |map| map.unmap(0..1));
    expect_errno(mr, Errno::FAULT, "REG_MR of what is being unmapped");
    assert!(waited, "expected the registration to wait for the change");
    fixture.expect_quiet(0, "the failed registration");
    watches.expect_stopped(1);
}

/// Registers four pages of `map`. `change` is made when the first two are pinned, and the
/// kernel waits for the third.
#[track_caller]
fn stopped(pd: &Arc<Pd>, args: MrArgs, map: Map, change: impl FnOnce()) -> io::Result<Mr> {
    let from = Map::new(1);
    map.dont_need(2..3);
    let fault = Userfault::missing(map, 2..3);
    let pd = pd.clone();
    let registrar = Blocked::spawn(IOCTL, move || try_reg(&pd, &args));
    assert_eq!(
        fault.wait_for_fault(),
        map.at(2) as u64,
        "the page it is at"
    );
    change();
    fault.copy(map, 2, from);
    registrar.join()
}

/// The same. The change must not be reported before the kernel has the third page.
#[track_caller]
fn during_pin(fixture: &Fixture, map: Map, change: impl FnOnce()) -> io::Result<Mr> {
    let before = fixture.page.load();
    stopped(&fixture.pd, fixture.args(map, 0..4, 7), map, || {
        change();
        fixture.expect_quiet(before, "changes during the pin");
    })
}

/// The wait alone makes no region stale. The tests below rely on it.
#[test]
fn pin_waits() {
    let fixture = Fixture::new();
    let _mr = during_pin(&fixture, Map::new(4), || ()).expect("register");
    fixture.expect_quiet(0, "the registration");
}

/// G3: pages that are already pinned are purged and unmapped. When REG_MR returns there is
/// one event for both.
#[test]
fn invalidation_during_pin() {
    let fixture = Fixture::new();
    let map = Map::new(4);
    let mut mr = during_pin(&fixture, map, || {
        map.dont_need(0..1);
        map.unmap(1..2);
    })
    .expect("register");
    assert_eq!(fixture.page.load(), 1, "the generation at the return");
    fixture.expect(&[Record::new(map, 0..2, 7, 1, MAYBE_STALE | UNMAPPED)]);
    assert_eq!(mr.destroy().unwrap(), 1, "events reported");
}

/// G3: the same, but REG_MR then fails at an unmapped page. Nothing is reported.
#[test]
fn invalidation_during_failing_pin() {
    let watches = Watches::new();
    let fixture = Fixture::new();
    let map = Map::new(4);
    let mr = during_pin(&fixture, map, || {
        map.dont_need(0..1);
        map.unmap(3..4);
    });
    expect_errno(mr, Errno::FAULT, "REG_MR of what was unmapped");
    fixture.expect_quiet(0, "the failed registration");
    watches.expect_stopped(1);
    expect_no_regions();
    map.unmap(0..3);
    fixture.expect_quiet(0, "munmap of what was not registered");
}

/// G8: the queue is closed while REG_MR runs and an invalidation is remembered.
#[test]
fn queue_closed_during_the_pin() {
    let watches = Watches::new();
    let Fixture {
        context: _context,
        pd,
        queue,
        page,
    } = Fixture::new();
    drop(page);
    let map = Map::new(4);
    let args = MrArgs::new(map.at(0), 4 * PAGE).watched(&queue, 7);
    let mr = stopped(&pd, args, map, || {
        map.dont_need(0..1);
        drop(queue);
    });
    map.unmap(0..1);
    let reported = mr.expect("register").destroy().expect("deregister");
    assert_eq!(reported, 0, "events reported");
    watches.expect_stopped(1);
}

/// Closes the FD while its context is being destroyed, but the queue is not yet. Release
/// then finds the lock taken (uverbs_uobject_release()). `destroy` begins the destruction,
/// `stack` is its stack, `end` waits for it.
#[track_caller]
fn released_while_destroyed<T>(
    fixture: Fixture,
    destroy: impl FnOnce(&Fixture) -> T,
    stack: impl Fn(&T) -> &Stack,
    end: impl FnOnce(T),
) {
    let (watches, pages) = (Watches::new(), counter_pages());
    let map = Map::new(2);
    // The youngest object is destroyed first: before the queue.
    mem::forget(fixture.watch(map, 0..2, 7));
    let hold = Hold::new();
    let changer = Ready::new(move || map.dont_need(0..1));
    hold.arm(map, 0..1);
    changer.go();
    hold.wait();

    let destroyer = destroy(&fixture);
    let stuck = || {
        let stack = stack(&destroyer);
        stack.shows(BEFORE_END) && stack.shows("uverbs_destroy_ufile_hw")
    };
    while !stuck() {
        std::thread::yield_now();
    }
    let Fixture { queue, page, .. } = fixture;
    drop((page, queue));
    assert!(stuck(), "expected the destruction to go on");
    hold.release();
    changer.join();
    end(destroyer);
    watches.expect_stopped(1);
    assert_eq!(counter_pages(), pages - 1, "queues that are not freed");
}

/// G6: G8: the context is closed.
#[test]
fn released_while_the_context_is_closed() {
    let fixture = Fixture::new();
    let closer = |fixture: &Fixture| {
        let context = fixture.context.clone();
        let closer = Ready::new(move || context.disconnect());
        closer.go();
        closer
    };
    released_while_destroyed(fixture, closer, Ready::stack, |closer| {
        closer.join().expect("close the context");
    });
    expect_no_regions();
}

/// G6: G8: the device is removed.
#[test]
fn released_while_the_device_is_removed() {
    let device = Device::new("contended0", "rxe");
    let begin = |_: &Fixture| {
        let removal = device.begin_removal();
        let stack = Stack::of(&removal.id().to_string());
        (removal, stack)
    };
    released_while_destroyed(
        Fixture::on(device.name()),
        begin,
        |(_, stack)| stack,
        |(mut removal, _)| {
            assert!(removal.wait().expect("wait for rdma").success(), "rdma");
        },
    );
}

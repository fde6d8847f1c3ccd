// SPDX-License-Identifier: GPL-2.0
//! What deregistration returns.

use uverbs_mmu_notify::MrArgs;
use uverbs_mmu_notify_tests::*;

const UNWRITTEN: u32 = 0x5a5a;

/// G5: after `events` deliveries, and one more event that waits if `pending`.
#[track_caller]
fn count(events: usize, pending: bool) {
    let fixture = Fixture::new();
    let map = Map::new(events + 1);
    let mr = fixture.watch(map, 0..events + 1, 7);
    for page in 0..events {
        map.unmap(page..page + 1);
        assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
    }
    if pending {
        map.unmap(events..events + 1);
    }
    let before = fixture.page.load();

    let reported = destroy_handle(&fixture.context, mr.handle(), UNWRITTEN);
    std::mem::forget(mr);
    assert_eq!(reported, events as u32, "events reported");
    fixture.expect_quiet_since(before, "the deregistration");
}

/// G5: none.
#[test]
fn nothing_delivered() {
    count(0, false);
}

/// G5: one.
#[test]
fn one_delivered() {
    count(1, false);
}

/// G5: many.
#[test]
fn many_delivered() {
    count(50, false);
}

/// G5: an event that waits is dropped, and not counted.
#[test]
fn pending_and_undelivered() {
    count(0, true);
}

/// G5: the same after deliveries.
#[test]
fn pending_after_deliveries() {
    count(3, true);
}

/// G5: merged hits are one event.
#[test]
fn merged_hits_count_once() {
    let fixture = Fixture::new();
    let map = Map::new(3);
    let mut mr = fixture.watch(map, 0..3, 7);
    for page in 0..3 {
        map.unmap(page..page + 1);
    }
    assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
    assert_eq!(mr.destroy().unwrap(), 1, "events reported");
}

/// G5: counts are of the region, not of the cookie or the queue, and the end of
/// one region takes only its own event out of the queue.
#[test]
fn counts_are_separate() {
    let fixture = Fixture::new();
    let map = Map::new(4);
    let mut mrs: Vec<_> = (0..3).map(|_| fixture.watch(map, 0..4, 7)).collect();
    let mut inner = fixture.watch(map, 1..2, 7);
    map.unmap(0..1);
    assert_eq!(read_all(&fixture.queue).len(), 3, "events read");
    map.unmap(1..2);
    assert_eq!(mrs[1].destroy().unwrap(), 1, "reported: one of two read");
    assert_eq!(read_all(&fixture.queue).len(), 3, "events left and read");
    assert_eq!(mrs[0].destroy().unwrap(), 2, "reported by the first");
    assert_eq!(inner.destroy().unwrap(), 1, "reported by the inner");
    assert_eq!(mrs[2].destroy().unwrap(), 2, "reported by the last");
}

/// G5: after deregistration nothing is reported for the region, and others are.
#[test]
fn no_event_after_deregistration() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let mut gone = fixture.watch(map, 0..1, 1);
    let _kept = fixture.watch(map, 0..2, 2);
    gone.destroy().unwrap();
    let before = fixture.page.load();

    map.unmap(0..1);
    fixture.expect(&[Record::new(map, 0..1, 2, before + 1, UNMAPPED)]);
}

/// Interface: a region that is not watched reports 0.
#[test]
fn plain_region_reports_zero() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let mr = reg(&fixture.pd, &MrArgs::new(map.at(0), PAGE));
    let reported = destroy_handle(&fixture.context, mr.handle(), UNWRITTEN);
    std::mem::forget(mr);
    assert_eq!(reported, 0, "events reported");
}

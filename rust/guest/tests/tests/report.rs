// SPDX-License-Identifier: GPL-2.0
//! Which event a change of the mapping gives, and when.

use std::{ops::Range, thread};
use uverbs_mmu_notify::MrArgs;
use uverbs_mmu_notify_tests::*;

/// Pages 1..5 are watched, `pages` are unmapped, `reported` is in the event.
#[track_caller]
fn munmap(pages: Range<usize>, reported: Range<usize>) {
    let fixture = Fixture::new();
    let map = Map::new(6);
    let _mr = fixture.watch(map, 1..5, 7);
    let before = fixture.page.load();

    map.unmap(pages);
    fixture.expect(&[Record::new(map, reported, 7, before + 1, UNMAPPED)]);
}

/// G1, hull: all of it.
#[test]
fn munmap_of_the_whole() {
    munmap(1..5, 1..5);
}

/// G1, hull: its first pages.
#[test]
fn munmap_of_the_head() {
    munmap(1..3, 1..3);
}

/// G1, hull: pages in the middle.
#[test]
fn munmap_of_the_middle() {
    munmap(2..4, 2..4);
}

/// G1, hull: its last page.
#[test]
fn munmap_of_the_tail() {
    munmap(4..5, 4..5);
}

/// Interface: the hull is clipped to the region.
#[test]
fn munmap_beyond_both_ends() {
    munmap(0..6, 1..5);
}

/// G7: the pages next to a region are not the region's.
#[test]
fn munmap_of_the_neighbours() {
    let fixture = Fixture::new();
    let map = Map::new(6);
    let _mr = fixture.watch(map, 1..5, 7);
    let before = fixture.page.load();

    map.unmap(0..1);
    map.unmap(5..6);
    fixture.expect_quiet_since(before, "munmap of the neighbours");
}

/// Interface: a region need not begin or end with a page, and the hull does not
/// reach beyond it, though pages go as a whole.
#[test]
fn hull_is_clipped_within_a_page() {
    let fixture = Fixture::new();
    let map = Map::new(3);
    let (start, end) = (map.at(0) as u64 + 100, map.at(2) as u64 + 200);
    let args = MrArgs {
        addr: start,
        length: end - start,
        ..fixture.args(map, 0..3, 7)
    };
    let _mr = reg(&fixture.pd, &args);
    let before = fixture.page.load();
    let record = |range, generation| Record {
        cookie: 7,
        range,
        generation,
        reasons: UNMAPPED,
    };

    map.unmap(2..3);
    fixture.expect(&[record(map.at(2) as u64..end, before + 1)]);
    map.unmap(0..2);
    fixture.expect(&[record(start..map.at(2) as u64, before + 2)]);
}

/// G1: mapping over counts as unmapping.
#[test]
fn mmap_over() {
    let fixture = Fixture::new();
    let map = Map::new(3);
    let _mr = fixture.watch(map, 0..3, 7);
    let before = fixture.page.load();

    map.map_over(1..2);
    fixture.expect(&[Record::new(map, 1..2, 7, before + 1, UNMAPPED)]);
}

/// G1: pages that go without their mapping are reported as a maybe.
#[test]
fn madvise_dontneed() {
    let fixture = Fixture::new();
    let map = Map::new(3);
    let _mr = fixture.watch(map, 0..3, 7);
    let before = fixture.page.load();

    map.dont_need(1..3);
    fixture.expect(&[Record::new(map, 1..3, 7, before + 1, MAYBE_STALE)]);
}

/// G1: each region has its own event, with its own cookie and hull.
#[test]
fn two_regions_in_one_munmap() {
    let fixture = Fixture::new();
    let map = Map::new(6);
    let _mrs = [fixture.watch(map, 0..2, 1), fixture.watch(map, 3..6, 2)];
    let before = fixture.page.load();

    map.unmap(1..5);
    let records = read_all(&fixture.queue);
    let generations: Vec<_> = records.iter().map(|r| r.generation).collect();
    assert!(
        generations == [before + 1, before + 2] || generations == [before + 2, before + 1],
        "expected one bump for each region after {before}, got {generations:?}"
    );
    assert_eq!(
        records,
        [
            Record::new(map, 1..2, 1, generations[0], UNMAPPED),
            Record::new(map, 3..5, 2, generations[1], UNMAPPED),
        ]
    );
}

/// G1: regions may overlap, and share a cookie.
#[test]
fn one_region_inside_another() {
    let fixture = Fixture::new();
    let map = Map::new(6);
    let _mrs = [fixture.watch(map, 0..6, 7), fixture.watch(map, 2..4, 7)];
    let before = fixture.page.load();

    map.unmap(0..1);
    fixture.expect(&[Record::new(map, 0..1, 7, before + 1, UNMAPPED)]);

    map.unmap(2..3);
    let records = read_all(&fixture.queue);
    assert_eq!(records.len(), 2, "both have an event: {records:?}");
    for record in records {
        assert_eq!(
            record,
            Record::new(map, 2..3, 7, record.generation, UNMAPPED)
        );
    }
}

/// G2: the generation has changed when munmap() returns, before any read().
#[test]
fn generation_changes_before_the_return() {
    let fixture = Fixture::new();
    let map = Map::new(100);
    let _mr = fixture.watch(map, 0..100, 7);
    for page in 0..100 {
        let before = fixture.page.load();
        map.unmap(page..page + 1);
        assert_eq!(fixture.page.load(), before + 1, "after the munmap");
    }
}

/// G1, G2: the same when another thread unmaps, for whoever knows that it has.
#[test]
fn munmap_by_another_thread() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let _mr = fixture.watch(map, 0..1, 7);
    let before = fixture.page.load();

    thread::spawn(move || map.unmap(0..1)).join().unwrap();
    assert_eq!(fixture.page.load(), before + 1, "after the munmap");
    fixture.expect(&[Record::new(map, 0..1, 7, before + 1, UNMAPPED)]);
}

/// G4: hits merge into one event with the hull, all reasons and the newest
/// generation, and each bumps the counter.
#[test]
fn two_hits_merge() {
    let fixture = Fixture::new();
    let map = Map::new(6);
    let _mr = fixture.watch(map, 0..6, 7);
    let before = fixture.page.load();

    map.dont_need(1..2);
    map.unmap(3..5);
    assert_eq!(fixture.page.load(), before + 2, "one bump for each hit");
    let reasons = UNMAPPED | MAYBE_STALE;
    fixture.expect(&[Record::new(map, 1..5, 7, before + 2, reasons)]);
}

/// G4: what has been delivered is not merged into the next event.
#[test]
fn delivery_begins_anew() {
    let fixture = Fixture::new();
    let map = Map::new(6);
    let _mr = fixture.watch(map, 0..6, 7);
    let before = fixture.page.load();

    map.dont_need(0..1);
    fixture.expect(&[Record::new(map, 0..1, 7, before + 1, MAYBE_STALE)]);
    map.unmap(4..5);
    fixture.expect(&[Record::new(map, 4..5, 7, before + 2, UNMAPPED)]);
}

/// Interface: contexts do not see each other's events, even for one range.
#[test]
fn two_contexts() {
    let (a, b) = (Fixture::new(), Fixture::new());
    let map = Map::new(3);
    let _mrs = [a.watch(map, 0..2, 1), b.watch(map, 1..3, 2)];
    let (before_a, before_b) = (a.page.load(), b.page.load());

    map.unmap(0..1);
    a.expect(&[Record::new(map, 0..1, 1, before_a + 1, UNMAPPED)]);
    b.expect_quiet_since(before_b, "a hit of the other context");

    map.unmap(1..2);
    a.expect(&[Record::new(map, 1..2, 1, before_a + 2, UNMAPPED)]);
    b.expect(&[Record::new(map, 1..2, 2, before_b + 1, UNMAPPED)]);

    map.unmap(2..3);
    a.expect_quiet_since(before_a + 2, "a hit of the other context");
    b.expect(&[Record::new(map, 2..3, 2, before_b + 2, UNMAPPED)]);
}

/// Interface: one context may have several queues.
#[test]
fn two_queues_of_one_context() {
    let fixture = Fixture::new();
    let other = uverbs_mmu_notify::NotifyQueue::alloc(&fixture.context).unwrap();
    other.set_nonblocking(true).unwrap();
    let map = Map::new(2);
    let _first = fixture.watch(map, 0..1, 1);
    let before = fixture.page.load();
    let args = MrArgs::new(map.at(1), PAGE).watched(&other, 2);
    let _second = reg(&fixture.pd, &args);

    map.unmap(1..2);
    fixture.expect_quiet_since(before, "a hit of the other queue");
    expect_records(&other, &[Record::new(map, 1..2, 2, 1, UNMAPPED)]);
}

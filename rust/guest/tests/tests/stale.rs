// SPDX-License-Identifier: GPL-2.0
//! Regions that are stale when they are born, and say so.

use uverbs_mmu_notify::{MrArgs, sys::verbs::*};
use uverbs_mmu_notify_tests::*;

/// G3: a registration of `map`, whose pages the pin has to replace, is stale
/// when it returns, says so, and can be used; the next one is clean.
#[track_caller]
fn born_stale(map: Map, access: u32) {
    let fixture = Fixture::new();
    let before = fixture.page.load();
    let args = MrArgs {
        access,
        ..fixture.args(map, 0..2, 7)
    };
    let mut mr = reg(&fixture.pd, &args);
    assert_eq!(
        fixture.page.load(),
        before + 1,
        "the generation at the return"
    );
    fixture.expect(&[Record::new(map, 0..2, 7, before + 1, MAYBE_STALE)]);
    let _again = reg(&fixture.pd, &args);
    fixture.expect_quiet_since(before + 1, "the second registration");
    assert_eq!(mr.destroy().unwrap(), 1, "events reported");
}

const WRITE: u32 = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
const READ: u32 = IBV_ACCESS_REMOTE_READ;

/// Two pages, each of them the zero page.
fn zero_pages() -> Map {
    let map = Map::untouched(2);
    assert_eq!((map.load(0), map.load(1)), (0, 0), "new memory");
    map
}

/// G3: the zero page, which the pin replaces.
#[test]
fn zero_page() {
    born_stale(zero_pages(), WRITE);
}

/// G3: also if the device only reads.
#[test]
fn zero_page_for_reading() {
    born_stale(zero_pages(), READ);
}

/// G3: pages shared with a child, which the pin copies.
#[test]
fn shared_with_a_child() {
    let map = Map::new(2);
    let child = Child::idle();
    born_stale(map, WRITE);
    child.kill();
}

/// G3: also if the device only reads.
#[test]
fn shared_with_a_child_for_reading() {
    let map = Map::new(2);
    let child = Child::idle();
    born_stale(map, READ);
    child.kill();
}

/// G3: a pin that only reads finds the zero page under memory that nothing has
/// accessed.
#[test]
fn untouched_for_reading() {
    born_stale(Map::untouched(2), READ);
}

/// G7: ordinary memory is not born stale, nor is untouched memory that the device
/// may write to.
#[test]
fn ordinary_memory_is_not_born_stale() {
    let fixture = Fixture::new();
    for (map, access) in [
        (Map::new(2), WRITE),
        (Map::new(2), READ),
        (Map::untouched(2), WRITE),
    ] {
        let before = fixture.page.load();
        let args = MrArgs {
            access,
            ..fixture.args(map, 0..2, 7)
        };
        let _mr = reg(&fixture.pd, &args);
        fixture.expect_quiet_since(before, &format!("registering, access {access:#x}"));
    }
}

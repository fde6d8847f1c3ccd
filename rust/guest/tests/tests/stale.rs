// SPDX-License-Identifier: GPL-2.0
//! What is reported is stale, or may be, and what is not is not.

use rustix::mm::MprotectFlags;
use uverbs_mmu_notify::{Mr, MrArgs, sys::verbs::*};
use uverbs_mmu_notify_tests::*;

/// What RDMA-writes of `peer` to `mr` do to the first page of `map`, which is
/// the region's.
#[track_caller]
fn expect_rdma(peer: &Peer, map: Map, mr: &Mr, reaches: bool) {
    let before = map.load(0);
    let byte = before.wrapping_add(1);
    let status = peer.write(map.at(0), mr.rkey(), byte);
    assert_eq!(status, IBV_WC_SUCCESS, "the work completion");
    let expected = if reaches { byte } else { before };
    assert_eq!(map.load(0), expected, "the byte that was written by RDMA");
}

/// G1: RDMA through a registration that `change` makes stale succeeds, but does
/// not reach what is mapped, and that was reported.
#[track_caller]
fn becomes_stale(change: impl FnOnce(Map), reasons: u32) {
    let fixture = Fixture::new();
    let peer = Peer::new(&fixture.pd);
    let map = Map::new(1);
    let mr = fixture.watch(map, 0..1, 7);
    let before = fixture.page.load();
    expect_rdma(&peer, map, &mr, true);
    fixture.expect_quiet_since(before, "RDMA");

    change(map);
    fixture.expect(&[Record::new(map, 0..1, 7, before + 1, reasons)]);
    expect_rdma(&peer, map, &mr, false);

    let renewed = fixture.watch(map, 0..1, 8);
    let _ = read_all(&fixture.queue);
    expect_rdma(&peer, map, &renewed, true);
}

/// munmap and mmap at the same address.
#[test]
fn unmapped_and_mapped_again() {
    becomes_stale(
        |map| {
            map.unmap(0..1);
            map.map_over(0..1);
        },
        UNMAPPED,
    );
}

/// mmap over it.
#[test]
fn mapped_over() {
    becomes_stale(|map| map.map_over(0..1), UNMAPPED);
}

/// The pages are given up, the mapping stays.
#[test]
fn given_up() {
    becomes_stale(|map| map.dont_need(0..1), MAYBE_STALE);
}

/// G7: `change` is not reported, and RDMA still reaches what is mapped.
#[track_caller]
fn stays_fresh(change: impl FnOnce(Map)) {
    let fixture = Fixture::new();
    let peer = Peer::new(&fixture.pd);
    let map = Map::new(2);
    let mr = fixture.watch(map, 0..2, 7);
    let before = fixture.page.load();
    change(map);
    fixture.expect_quiet_since(before, "the change");
    expect_rdma(&peer, map, &mr, true);
    fixture.expect_quiet_since(before, "RDMA");
}

/// G7: changes of the protection.
#[test]
fn protected() {
    stays_fresh(|map| {
        for protection in [MprotectFlags::READ, MprotectFlags::empty()] {
            map.protect(0..1, protection);
        }
        map.protect(0..2, MprotectFlags::READ | MprotectFlags::WRITE);
        map.store(0, 0x33);
    });
}

/// G7: fork in the parent, with stores on both sides, and the child's end.
#[test]
fn forked() {
    stays_fresh(|map| {
        let child = Child::idle();
        map.store(0, 0x33);
        child.kill();
        let child = in_child(|| {
            map.store(0, 0x44);
            0
        });
        assert_eq!(child, Exit::Code(0), "the child");
    });
}

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

/// G7: ordinary memory is not born stale, written to or never accessed.
#[test]
fn ordinary_memory_is_not_born_stale() {
    let fixture = Fixture::new();
    for map in [Map::new(2), Map::untouched(2)] {
        for access in [WRITE, READ] {
            let before = fixture.page.load();
            let args = MrArgs {
                access,
                ..fixture.args(map, 0..2, 7)
            };
            let _mr = reg(&fixture.pd, &args);
            fixture.expect_quiet_since(before, &format!("registering, access {access:#x}"));
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! What a forked child, which shares the open files, can do.

use std::io;
use uverbs_mmu_notify::{Event, MrArgs, NotifyQueue};
use uverbs_mmu_notify_tests::*;

/// The result of a system call as an exit code: the errno, or 0.
fn code<T>(result: io::Result<T>) -> i32 {
    result.map_or_else(|e| e.raw_os_error().unwrap_or(102), |_| 0)
}

const EPERM: Exit = Exit::Code(libc::EPERM);

/// Interface, G4: a child's read() is refused, and takes no event away.
#[test]
fn child_cannot_read() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let mut mr = fixture.watch(map, 0..1, 7);
    let read = || code(fixture.queue.read(&mut [Event::default()]));
    assert_eq!(in_child(read), EPERM, "read() of nothing");
    map.unmap(0..1);
    assert_eq!(in_child(read), EPERM, "read() of an event");

    fixture.expect(&[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
    assert_eq!(mr.destroy().unwrap(), 1, "events reported");
}

/// Interface: a child cannot watch its own memory with its parent's queue.
#[test]
fn child_cannot_register() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let args = fixture.args(map, 0..1, 7);
    let before = fixture.page.load();
    assert_eq!(
        in_child(|| code(try_reg(&fixture.pd, &args))),
        EPERM,
        "REG_MR"
    );

    fixture.expect_quiet_since(before, "a child's registration");
    let _mr = reg(&fixture.pd, &args);
    map.unmap(0..1);
    fixture.expect(&[Record::new(map, 0..1, 7, before + 1, UNMAPPED)]);
}

/// Interface: a child can make a queue of its own in the inherited context.
#[test]
fn child_has_its_own_queue() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let _mr = fixture.watch(map, 0..1, 1);
    let before = fixture.page.load();
    let child = in_child(|| {
        let queue = NotifyQueue::alloc(&fixture.context).expect("make a queue");
        queue.set_nonblocking(true).expect("make it non-blocking");
        let args = MrArgs::new(map.at(0), PAGE).watched(&queue, 2);
        let _mr = reg(&fixture.pd, &args);
        map.unmap(0..1);
        expect_records(&queue, &[Record::new(map, 0..1, 2, 1, UNMAPPED)]);
        0
    });
    assert_eq!(child, Exit::Code(0), "the child");
    fixture.expect_quiet_since(before, "the child's munmap");
}

/// G7: what a child does to its own copy of the memory is not reported.
#[test]
fn child_changes_its_own_mapping() {
    let fixture = Fixture::new();
    let map = Map::new(4);
    let mut mr = fixture.watch(map, 0..4, 7);
    let before = fixture.page.load();
    let child = in_child(|| {
        map.store(0, 0x22);
        map.unmap(1..2);
        map.dont_need(2..3);
        0
    });
    assert_eq!(child, Exit::Code(0), "the child");
    fixture.expect_quiet_since(before, "what the child did, and its exit");
    assert_eq!(mr.destroy().unwrap(), 0, "events reported");
}

/// G5, G8: a child may deregister what it has inherited, and the count is that
/// of the parent's reads.
#[test]
fn child_deregisters() {
    let fixture = Fixture::new();
    let map = Map::new(3);
    let mr = fixture.watch(map, 0..3, 7);
    for page in 0..2 {
        map.unmap(page..page + 1);
        assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
    }
    let (before, handle) = (fixture.page.load(), mr.handle());
    let child = in_child(|| destroy_handle(&fixture.context, handle, 99) as i32);
    assert_eq!(child, Exit::Code(2), "events reported to the child");
    std::mem::forget(mr);
    map.unmap(2..3);
    fixture.expect_quiet_since(before, "a munmap after the deregistration");
}

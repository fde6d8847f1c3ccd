// SPDX-License-Identifier: GPL-2.0
//! What a forked child, which shares open files, can do.

use uverbs_mmu_notify::{MrArgs, NotifyQueue};
use uverbs_mmu_notify_tests::*;

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
    fixture.expect_quiet(before, "the child's munmap");
}

/// G5: G8: a child can deregister an inherited region, and gets the count of the events
/// that the parent has read.
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
    fixture.expect_quiet(before, "a munmap after the deregistration");
}

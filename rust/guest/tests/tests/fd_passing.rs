// SPDX-License-Identifier: GPL-2.0
//! What another process can do with a notification FD.

use rustix::{event::PollFlags, io::Errno};
use std::mem;
use uverbs_mmu_notify::{Event, NotifyQueue};
use uverbs_mmu_notify_tests::*;

const POLL: &[libc::c_long] = &[libc::SYS_poll, libc::SYS_ppoll];

#[track_caller]
fn expect_refused(queue: &NotifyQueue) {
    let read = queue.read(&mut [Event::default()]);
    expect_errno(read, Errno::PERM, "read() of another process's queue");
}

/// Waits for the owner's event, and must not be able to read it.
fn watch_the_owner(queue: &NotifyQueue) -> i32 {
    let page = queue.generation_page().expect("map the counter page");
    assert_eq!(page.load(), 0, "generation");
    assert_eq!(queue.poll(NOW).unwrap(), PollFlags::empty(), "poll()");
    expect_refused(queue);
    // The owner waits for this call to sleep.
    assert_eq!(
        queue.poll(None).unwrap(),
        PollFlags::IN,
        "poll() after a change"
    );
    assert_eq!(page.load(), 1, "generation after the change");
    expect_refused(queue);
    assert_eq!(queue.poll(NOW).unwrap(), PollFlags::IN, "poll() again");
    0
}

/// The owner, whose `child` runs [`watch_the_owner`].
#[track_caller]
fn is_watched(fixture: &Fixture, child: Child) {
    let map = Map::new(2);
    let mut mr = fixture.watch(map, 0..2, 7);
    child.wait_asleep(POLL);
    map.unmap(0..1);
    assert_eq!(child.wait(), Exit::Code(0), "the other process");
    fixture.expect(&[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
    map.unmap(1..2);
    fixture.expect(&[Record::new(map, 1..2, 7, 2, UNMAPPED)]);
    assert_eq!(mr.destroy().unwrap(), 2, "events reported");
}

/// G4: an FD sent over a socket can be polled and mapped, but not read.
#[test]
fn scm_rights() {
    let (ours, theirs) = sockets();
    let child = Child::fork(|| watch_the_owner(&receive(&theirs)));
    let fixture = Fixture::new();
    send(&ours, &fixture.queue);
    is_watched(&fixture, child);
    drop(fixture);
    expect_no_regions();
}

/// G4: so can an inherited one.
#[test]
fn inherited_by_fork() {
    let fixture = Fixture::new();
    let child = Child::fork(|| watch_the_owner(&fixture.queue));
    is_watched(&fixture, child);
    drop(fixture);
    expect_no_regions();
}

/// G1: G2: G8: exit of the owner advances the generation, for its memory and for its
/// context.
#[test]
fn outlives_its_owner() {
    let (ours, theirs) = sockets();
    let child = Child::fork(|| {
        let fixture = Fixture::new();
        let map = Map::new(2);
        let mr = fixture.watch(map, 0..2, 7);
        send(&theirs, &fixture.queue);
        stop();
        map.unmap(0..1);
        stop();
        assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
        mem::forget((fixture, mr));
        0
    });
    child.wait_stopped();
    let queue = receive(&ours);
    let page = queue.generation_page().expect("map the counter page");
    assert_eq!(page.load(), 0, "generation");
    child.resume();
    child.wait_stopped();
    assert_eq!(page.load(), 1, "generation after the change");
    assert_eq!(
        queue.poll(NOW).unwrap(),
        PollFlags::IN,
        "poll() after a change"
    );
    child.resume();
    assert_eq!(child.wait(), Exit::Code(0), "the owner");

    // Once for its memory, and once for its context.
    assert_eq!(page.load(), 3, "generation after the end");
    assert_eq!(queue.poll(NOW).unwrap(), PollFlags::ERR, "poll()");
    expect_refused(&queue);
    expect_no_regions();
    drop(queue);
    assert_eq!(page.load(), 3, "generation without the FD");
}

/// G4: G8: events stay pending while the only FD is in a socket.
#[test]
fn scm_rights_received_late() {
    let (ours, theirs) = sockets();
    let Fixture {
        context,
        pd,
        queue,
        page,
    } = Fixture::new();
    let map = Map::new(2);
    let fixture_args = uverbs_mmu_notify::MrArgs::new(map.at(0), 2 * PAGE).watched(&queue, 7);
    let mut mr = reg(&pd, &fixture_args);
    send(&ours, &queue);
    drop((queue, page));
    map.unmap(0..1);
    let queue = receive(&theirs);
    expect_records(&queue, &[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
    map.unmap(1..2);
    expect_records(&queue, &[Record::new(map, 1..2, 7, 2, UNMAPPED)]);
    assert_eq!(mr.destroy().unwrap(), 2, "events reported");
    drop(context);
}

/// G8: the only FD is in a socket when everything else ends, and is never received.
#[test]
fn scm_rights_never_received() {
    let (ours, theirs) = sockets();
    let fixture = Fixture::new();
    let map = Map::new(1);
    let mr = fixture.watch(map, 0..1, 7);
    map.unmap(0..1);
    send(&ours, &fixture.queue);
    drop((mr, fixture));
    expect_no_regions();
    drop((ours, theirs));
}

// SPDX-License-Identifier: GPL-2.0
//! read() that does not wait.

use rustix::{
    fs::{SeekFrom, seek},
    io::{Errno, pread, write},
    mm::MprotectFlags,
};
use std::ptr;
use uverbs_mmu_notify::{Event, Mr};
use uverbs_mmu_notify_tests::*;

const RECORD: usize = size_of::<Event>();

/// `count` regions of one page each, all hit; cookies are 0..count.
fn hit(count: usize) -> (Fixture, Vec<Mr>) {
    let fixture = Fixture::new();
    let map = Map::new(count);
    let mrs = fixture.watch_each(map, 0..count);
    map.unmap(0..count);
    (fixture, mrs)
}

/// What is still in the queue, together with `events`, is each region once, and
/// deregistration says so too.
#[track_caller]
fn expect_all(fixture: &Fixture, events: &[Event], mrs: &mut [Mr]) {
    let mut cookies: Vec<_> = events.iter().map(|event| event.cookie).collect();
    cookies.extend(read_all(&fixture.queue).iter().map(|record| record.cookie));
    cookies.sort();
    let all: Vec<_> = (0..mrs.len() as u64).collect();
    assert_eq!(cookies, all, "the cookies that were read");
    for mr in mrs {
        assert_eq!(mr.destroy().unwrap(), 1, "events reported");
    }
}

fn events_at(addr: *mut u8, count: usize) -> Vec<Event> {
    (0..count)
        // SAFETY: The kernel has written that many events there.
        .map(|n| unsafe { addr.cast::<Event>().add(n).read_unaligned() })
        .collect()
}

/// Interface: EAGAIN when there is nothing, at first and after all was read.
#[test]
fn empty_queue() {
    let (fixture, _mrs) = hit(1);
    let fresh = Fixture::new();
    let mut events = [Event::default(); 2];
    expect_errno(fresh.queue.read(&mut events), Errno::AGAIN, "a new queue");
    assert_eq!(fixture.queue.read(&mut events).unwrap(), 1, "events");
    expect_errno(
        fixture.queue.read(&mut events),
        Errno::AGAIN,
        "a queue that was read",
    );
}

/// Interface: a buffer is filled before the queue is left with something, also
/// beyond what the kernel copies at once, and a short count means empty.
#[test]
fn batches() {
    for (count, room) in [(40, 7), (40, 17), (40, 40), (40, 41), (32, 16)] {
        let (fixture, mut mrs) = hit(count);
        let mut read = Vec::new();
        loop {
            let mut events = vec![Event::default(); room];
            let got = match fixture.queue.read(&mut events) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => 0,
                got => got.expect("read"),
            };
            let left = count - read.len();
            assert_eq!(got, room.min(left), "events of {left} for room of {room}");
            read.extend_from_slice(&events[..got]);
            if got < room {
                break;
            }
        }
        assert_eq!(read.len(), count, "events up to the short count");
        expect_all(&fixture, &read, &mut mrs);
    }
}

/// Interface: whole records only; the rest of the buffer is not touched.
#[test]
fn buffer_is_not_a_multiple_of_the_record() {
    let (fixture, mut mrs) = hit(3);
    let buffer = Map::new(1);
    let mut last = buffer.at(0).wrapping_add(2 * RECORD);
    // SAFETY: It is in the map, and not referenced.
    unsafe { last.write_bytes(0xee, RECORD) };

    let got = read_raw(&fixture.queue, buffer.at(0), 3 * RECORD - 1);
    assert_eq!(got.unwrap(), 2 * RECORD, "bytes read");
    for _ in 0..RECORD {
        // SAFETY: As above.
        assert_eq!(unsafe { last.read() }, 0xee, "a byte behind the records");
        last = last.wrapping_add(1);
    }
    expect_all(&fixture, &events_at(buffer.at(0), 2), &mut mrs);
}

/// Interface, G4: EINVAL when no record fits, and nothing is consumed.
#[test]
fn buffer_is_too_small() {
    let (fixture, mut mrs) = hit(2);
    let buffer = Map::new(1);
    for len in [0, 1, RECORD - 1] {
        let read = read_raw(&fixture.queue, buffer.at(0), len);
        expect_errno(read, Errno::INVAL, &format!("a buffer of {len}"));
    }
    expect_all(&fixture, &[], &mut mrs);

    let read = read_raw(&fixture.queue, buffer.at(0), RECORD - 1);
    expect_errno(
        read,
        Errno::INVAL,
        "a buffer too small, with nothing to read",
    );
}

/// G4: reads into a buffer that faults consume nothing.
#[track_caller]
fn faults(prepare: impl Fn(Map)) {
    let (fixture, mut mrs) = hit(20);
    let buffer = Map::new(1);
    prepare(buffer);
    let before = fixture.page.load();
    for count in [1, 20] {
        let read = read_raw(&fixture.queue, buffer.at(0), count * RECORD);
        expect_errno(read, Errno::FAULT, "a buffer that faults");
    }
    assert_eq!(fixture.page.load(), before, "generation");
    expect_all(&fixture, &[], &mut mrs);
}

/// G4: the buffer is not mapped.
#[test]
fn buffer_is_unmapped() {
    faults(|buffer| buffer.unmap(0..1));
}

/// G4: the buffer cannot be accessed.
#[test]
fn buffer_is_inaccessible() {
    faults(|buffer| buffer.protect(0..1, MprotectFlags::empty()));
}

/// G4: the buffer cannot be written.
#[test]
fn buffer_is_read_only() {
    faults(|buffer| buffer.protect(0..1, MprotectFlags::READ));
}

/// G4: the buffer is an address of the kernel.
#[test]
fn buffer_is_in_the_kernel() {
    let (fixture, mut mrs) = hit(1);
    let addr = ptr::without_provenance_mut(usize::MAX - 0xffff);
    let read = read_raw(&fixture.queue, addr, RECORD);
    expect_errno(read, Errno::FAULT, "a kernel address");
    expect_all(&fixture, &[], &mut mrs);
}

/// Interface, G4: from `room` bytes before an inaccessible page the records that
/// fit are read, the rest stays.
#[track_caller]
fn faults_after(room: usize) {
    let (fixture, mut mrs) = hit(40);
    let buffer = Map::untouched(2);
    buffer.protect(1..2, MprotectFlags::empty());
    let addr = buffer.at(1).wrapping_sub(room);

    let read = read_raw(&fixture.queue, addr, 40 * RECORD);
    let fit = room / RECORD;
    if fit == 0 {
        expect_errno(read, Errno::FAULT, "no record fits");
        expect_all(&fixture, &[], &mut mrs);
    } else {
        assert_eq!(read.unwrap(), fit * RECORD, "bytes read");
        expect_all(&fixture, &events_at(addr, fit), &mut mrs);
    }
}

/// The fault is between two records.
#[test]
fn buffer_faults_between_records() {
    faults_after(5 * RECORD);
}

/// The fault is in a record.
#[test]
fn buffer_faults_in_a_record() {
    faults_after(5 * RECORD + 13);
}

/// The fault is in the first record.
#[test]
fn buffer_faults_in_the_first_record() {
    faults_after(RECORD - 1);
}

/// The fault is beyond what is copied at once.
#[test]
fn buffer_faults_in_a_later_batch() {
    faults_after(33 * RECORD + 1);
}

/// Interface: pages that the kernel has to fault in are no reason for a short
/// count, which would be taken for an empty queue.
#[test]
fn buffer_is_not_populated() {
    let count = 3 * PAGE / RECORD;
    let (fixture, mut mrs) = hit(count);
    let buffer = Map::untouched(3);
    let read = read_raw(&fixture.queue, buffer.at(0), 3 * PAGE);
    assert_eq!(read.unwrap(), count * RECORD, "bytes read");
    expect_all(&fixture, &events_at(buffer.at(0), count), &mut mrs);
}

/// Interface: there is no write and no position.
#[test]
fn no_other_file_operations() {
    let (fixture, mut mrs) = hit(1);
    let queue = &fixture.queue;
    let mut buffer = [0; RECORD];
    let error = |errno: Result<_, Errno>| errno.map_err(Into::into);
    expect_errno(
        error(write(queue, &buffer).map(drop)),
        Errno::BADF,
        "write()",
    );
    let position = seek(queue, SeekFrom::Start(0)).map(drop);
    expect_errno(error(position), Errno::SPIPE, "lseek()");
    let read = pread(queue, &mut buffer, 0).map(drop);
    expect_errno(error(read), Errno::SPIPE, "pread()");
    expect_all(&fixture, &[], &mut mrs);
}

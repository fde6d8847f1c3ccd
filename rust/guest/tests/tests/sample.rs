// SPDX-License-Identifier: GPL-2.0
//! The C program of Documentation/uapi.md, which build.rs compiles, and what the manual tells
//! 32-bit processes.

use rustix::{
    mm::{MapFlags, ProtFlags, mmap},
    param::page_size,
};
use std::{
    process::Command,
    ptr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    thread,
};
use uverbs_mmu_notify_tests::*;

/// Interface: it sees a change, and the count is that of the events it has read.
#[test]
fn program_of_uapi_md() {
    let output = Command::new(concat!(env!("OUT_DIR"), "/sample"))
        .arg(device())
        .output()
        .expect("run the program");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<_> = said.lines().collect();
    let [generation, event, count] = lines[..] else {
        panic!("three lines: {said}");
    };
    assert_eq!(generation, "generation: 0 -> 1");
    assert!(
        event.starts_with("cookie 42: ") && event.ends_with(" may be stale"),
        "{event}"
    );
    assert_eq!(count, "events reported: 1, seen: 1");
}

/// Reads a counter in halves, as the manual tells 32-bit processes to do.
fn in_halves(low: &AtomicU32, high: &AtomicU32) -> u64 {
    loop {
        let before = high.load(Ordering::Acquire);
        let low = low.load(Ordering::Acquire);
        if before == high.load(Ordering::Acquire) {
            return u64::from(before) << 32 | u64::from(low);
        }
    }
}

/// G2: a counter whose high half advances can be read in halves. That of a queue takes too
/// long to get there.
#[test]
fn high_half_advances() {
    let counter = AtomicU64::new(0);
    let halves = (&raw const counter).cast::<AtomicU32>();
    // SAFETY: Both halves are aligned, and only accessed as atomics.
    let [low, high] = [0, 1].map(|half| unsafe { &*halves.add(half) });
    thread::scope(|scope| {
        let counting = scope.spawn(|| {
            for _ in 0..1_000_000 {
                counter.fetch_add(0x5000_0001, Ordering::Release);
            }
        });
        while !counting.is_finished() {
            let before = counter.load(Ordering::Acquire);
            let read = in_halves(low, high);
            assert!((before..=counter.load(Ordering::Acquire)).contains(&read));
        }
    });
}

/// G2: the generation can be read in halves while it advances.
#[test]
fn generation_in_halves() {
    const EVENTS: u64 = 200;
    let fixture = Fixture::new();
    let len = page_size();
    let flags = (ProtFlags::READ, MapFlags::SHARED);
    // SAFETY: A new mapping, at an address of the kernel's choice.
    let page = unsafe { mmap(ptr::null_mut(), len, flags.0, flags.1, &fixture.queue, 0) };
    let page = page.expect("map the page").cast::<AtomicU32>();
    // SAFETY: The generation is at the begin of the page, which stays mapped.
    let [low, high] = [0, 1].map(|half| unsafe { &*page.add(half) });
    let halves = || in_halves(low, high);

    thread::scope(|scope| {
        let events = scope.spawn(|| {
            let map = Map::new(1);
            let _mr = fixture.watch(map, 0..1, 0);
            for generation in 1..=EVENTS {
                map.dont_need(0..1);
                assert_eq!(read_all(&fixture.queue).len(), 1, "event {generation}");
            }
        });
        while !events.is_finished() {
            let before = fixture.page.load();
            let generation = halves();
            assert!((before..=fixture.page.load()).contains(&generation));
        }
    });
    assert_eq!(halves(), EVENTS);
}

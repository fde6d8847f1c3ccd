// SPDX-License-Identifier: GPL-2.0
//! The C program of Documentation/uapi.md, which build.rs compiles, and what the manual tells
//! 32-bit processes.

use rustix::{
    fs::MemfdFlags,
    mm::{MapFlags, ProtFlags, mmap},
    param::page_size,
};
use std::{
    hint,
    process::Command,
    ptr,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
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
        // Long enough for a carry. Without the second look it would be seen.
        (0..20).for_each(|_| hint::spin_loop());
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
    const READS: usize = 20_000;
    // Two mappings, since an atomic may not be accessed in two sizes at once.
    let file = memfd(1, MemfdFlags::empty());
    let [whole, halves] = [0, 1].map(|_| Map::of_file(&file, 1, MapFlags::SHARED).at(0));
    // SAFETY: The maps stay, and all that is there are atomics.
    let counter = unsafe { &*whole.cast::<AtomicU64>() };
    let halves = halves.cast::<AtomicU32>();
    // SAFETY: As above.
    let [low, high] = [0, 1].map(|half| unsafe { &*halves.add(half) });
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                counter.fetch_add(0x1000_0001, Ordering::Release);
            }
        });
        for _ in 0..READS {
            let before = counter.load(Ordering::Acquire);
            let read = in_halves(low, high);
            let after = counter.load(Ordering::Acquire);
            if !(before..=after).contains(&read) {
                stop.store(true, Ordering::Relaxed);
                panic!("{read:#x} is not in {before:#x}..={after:#x}");
            }
        }
        stop.store(true, Ordering::Relaxed);
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

// SPDX-License-Identifier: GPL-2.0
//! G6: threads that use a queue do not multiply the time of an invalidation. Needs four
//! CPUs and queued spinlocks, see [`Contention`].

use rustix::fs::{MemfdFlags, ftruncate};
use std::{fs, thread};
use uverbs_mmu_notify_tests::*;

const REGIONS: usize = 50;
const REPEATS: usize = 4;

/// While other threads do `work`, a process truncates a file of which one page has
/// [`REGIONS`] watched regions. Returns how many of these invalidations, of which each
/// truncation makes two for each region, found two or more others at a spinlock.
#[track_caller]
fn queued(work: Work) -> usize {
    let threads = thread::available_parallelism().unwrap().get() - 1;
    assert!(threads >= 3, "this test needs four CPUs: GUEST_CPUS=4");
    let cpus = fs::read_to_string("/proc/cpuinfo").expect("read about the CPUs");
    assert!(
        !cpus.contains(" hypervisor "),
        "this test needs queued spinlocks: GUEST_QEMU='-cpu max,hypervisor=off'"
    );
    let file = memfd(1, MemfdFlags::empty());
    let holder = Holder::new(Kind::Watched, REGIONS, &file, threads);
    let contention = Contention::here();
    (0..REPEATS)
        .map(|_| {
            holder.order(Work::Nothing, 0);
            let before = holder.order(work, threads);
            contention.take();
            ftruncate(&file, 0).expect("ftruncate");
            let queued = contention.take();
            ftruncate(&file, PAGE as u64).expect("ftruncate");
            let done = holder.order(work, threads) - before;
            eprintln!("{work:?}: queued {queued} times, while the threads worked {done} times");
            assert!(done > threads, "expected the threads to work");
            queued
        })
        .sum()
}

/// The most that may queue: one invalidation in ten.
const FEW: usize = 2 * REGIONS * REPEATS / 10;

/// G6: at most one reader is at the lock.
#[test]
fn readers() {
    let queued = queued(Work::Read);
    assert!(queued < FEW, "invalidations behind two readers: {queued}");
}

/// G6: poll() takes no lock that an invalidation takes.
#[test]
fn pollers() {
    let queued = queued(Work::Poll);
    assert!(queued < FEW, "invalidations behind two pollers: {queued}");
}

// SPDX-License-Identifier: GPL-2.0
//! What a process with many regions of a file's page costs another process that truncates
//! the file.
//!
//! On one CPU: the time of ftruncate(), of which each region gets two invalidations, by
//! the number of regions and of threads that read the queue of the regions all the time,
//! into memory that cannot be written. Under QEMU's `-icount shift=0,sleep=off` a
//! nanosecond is an instruction.
//!
//! On more CPUs: how many of these invalidations had to queue for a spinlock behind two
//! or more other CPUs, while threads use the queue of the regions. An invalidation that
//! queues waits for as many critical sections. Emulation makes the times themselves
//! worthless: a CPU that holds a lock may not run.

use rustix::{
    fs::{MemfdFlags, ftruncate},
    thread::ClockId,
    time::clock_gettime,
};
use std::{os::fd::OwnedFd, thread};
use uverbs_mmu_notify_tests::*;

fn cpu_time() -> u64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Truncates the file to nothing, and returns what that took. It has a page again then.
fn truncate(file: &OwnedFd) -> u64 {
    let start = cpu_time();
    ftruncate(file, 0).expect("ftruncate");
    let time = cpu_time() - start;
    ftruncate(file, PAGE as u64).expect("ftruncate");
    time
}

fn main() {
    match thread::available_parallelism().unwrap().get() {
        1 => by_regions(),
        cpus => by_threads(cpus),
    }
}

fn by_regions() {
    println!("instructions of ftruncate() for each region of the page");
    println!(
        "{:9}{:>8}{:>9}{:>14}{:>14}",
        "regions", "number", "threads", "first time", "again"
    );
    for (kind, most) in [(Kind::Watched, 8), (Kind::OnDemand, 0)] {
        for regions in [0, 2000, 20_000, 100_000] {
            for threads in [0, 1, 3, 8].into_iter().filter(|threads| *threads <= most) {
                let file = memfd(1, MemfdFlags::empty());
                let holder = Holder::new(kind, regions, &file, threads);
                // The first one makes events pending, into which the second one merges.
                let [first, again] = [(); 2].map(|()| {
                    holder.order(Work::Read, threads);
                    truncate(&file)
                });
                let each = |time: u64| time as f64 / regions.max(1) as f64;
                let kind = format!("{kind:?}");
                println!(
                    "{kind:9}{regions:8}{threads:9}{:14.0}{:14.0}",
                    each(first),
                    each(again)
                );
            }
        }
    }
}

fn by_threads(cpus: usize) {
    const REGIONS: usize = 50;
    const REPEATS: usize = 5;
    println!("{cpus} CPUs, {REGIONS} regions: invalidations that had to queue for a spinlock");
    println!("{:9}{:>8}{:>10}", "work", "threads", "queued");
    for work in [
        Work::Other,
        Work::Read,
        Work::Poll,
        Work::Purge,
        Work::Drain,
    ] {
        for threads in [1, 3, 8] {
            let file = memfd(1, MemfdFlags::empty());
            let holder = Holder::new(Kind::Watched, REGIONS, &file, threads);
            let contention = Contention::here();
            let queued: usize = (0..REPEATS)
                .map(|_| {
                    holder.order(Work::Nothing, 0);
                    holder.order(work, threads);
                    contention.take();
                    truncate(&file);
                    contention.take()
                })
                .sum();
            let part = queued as f64 / (2 * REGIONS * REPEATS) as f64;
            println!("{:9}{threads:8}{:9.1}%", format!("{work:?}"), part * 100.0);
        }
    }
}

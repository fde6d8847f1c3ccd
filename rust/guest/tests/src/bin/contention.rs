// SPDX-License-Identifier: GPL-2.0
//! What a process with N watched regions of a file's page, and with T threads that use
//! their queue, costs another process that truncates the file.
//!
//! A count of instructions would hide what is wanted: with `-icount` the CPUs take turns.
//! So this is CPU time of the truncating thread, on CPUs that run at once, as a ratio to
//! the time beside as many threads that do not use the queue: those take the host's CPUs
//! away as well. The number of times that the thread had to queue for a spinlock behind
//! two or more others is a count, and tells the same.

use rustix::{
    fs::{MemfdFlags, ftruncate},
    thread::ClockId,
    time::clock_gettime,
};
use std::{env, thread};
use uverbs_mmu_notify_tests::*;

const REPEATS: usize = 5;
const THREADS: [usize; 3] = [1, 3, 8];

fn cpu_time() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

/// The middle one of some figures.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn main() {
    let mut counts: Vec<usize> = env::args()
        .skip(1)
        .map(|word| word.parse().expect("a number of regions"))
        .collect();
    if counts.is_empty() {
        counts = vec![2000, 20000, 100_000];
    }
    println!("{} CPUs", thread::available_parallelism().unwrap());
    println!(
        "{:9}{:>8} {:7}{:>8}{:>12}{:>12}{:>8}{:>9}",
        "regions", "N", "work", "threads", "ms", "beside", "ratio", "queued"
    );
    for kind in [Kind::Watched, Kind::OnDemand] {
        for &count in &counts {
            measure(kind, count);
        }
    }
}

fn measure(kind: Kind, regions: usize) {
    let file = memfd(1, MemfdFlags::empty());
    let holder = Holder::new(kind, regions, &file, THREADS[2]);
    let contention = Contention::here();
    // The CPU time of ftruncate() while threads do `work`, and how often it queued.
    let truncate = |work, threads| {
        holder.order(Work::Nothing, 0);
        if work != Work::Nothing {
            holder.order(work, threads);
        }
        contention.take();
        let start = cpu_time();
        ftruncate(&file, 0).expect("ftruncate");
        let time = cpu_time() - start;
        let queued = contention.take() as f64;
        ftruncate(&file, PAGE as u64).expect("ftruncate");
        (time, queued)
    };
    truncate(Work::Nothing, 0);
    let works: &[Work] = match kind {
        Kind::Watched => &[Work::Read, Work::Poll, Work::Purge, Work::Drain],
        Kind::OnDemand => &[Work::Purge],
    };
    let show = |work: &str, threads, time: Vec<f64>, beside: Vec<f64>, queued| {
        let (time, beside) = (median(time), median(beside));
        println!(
            "{:9}{regions:8} {work:7}{threads:8}{time:12.2}{beside:12.2}{:8.2}{:9.0}",
            format!("{kind:?}"),
            time / beside,
            median(queued)
        );
    };
    let (alone, queued): (Vec<_>, Vec<_>) =
        (0..REPEATS).map(|_| truncate(Work::Nothing, 0)).unzip();
    show("-", 0, alone.clone(), alone, queued);
    for &work in works {
        for threads in THREADS {
            let mut figures = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..REPEATS {
                figures.1.push(truncate(Work::Other, threads).0);
                let (time, queued) = truncate(work, threads);
                figures.0.push(time);
                figures.2.push(queued);
            }
            let work = format!("{work:?}");
            show(&work, threads, figures.0, figures.1, figures.2);
        }
    }
}

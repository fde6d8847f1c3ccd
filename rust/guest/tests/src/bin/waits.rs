// SPDX-License-Identifier: GPL-2.0
//! How long REG_MR and MR_DESTROY of a plain and of a watched region take while other
//! threads of the process purge memory with MADV_DONTNEED, and how often they sleep.

use std::{
    env,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};
use uverbs_mmu_notify::MrArgs;
use uverbs_mmu_notify_tests::*;

/// The pages of the region, and those that a thread purges at once.
const PAGES: usize = 16;

/// What one call took, and whether it slept.
struct Call {
    microseconds: f64,
    slept: bool,
}

/// Makes a call.
fn timed<T>(call: impl FnOnce() -> T) -> (T, Call) {
    let before = sleeps("thread-self");
    let start = Instant::now();
    let result = call();
    let microseconds = start.elapsed().as_nanos() as f64 / 1e3;
    let slept = sleeps("thread-self") != before;
    (
        result,
        Call {
            microseconds,
            slept,
        },
    )
}

fn show(threads: usize, name: &str, mut calls: Vec<Call>) {
    calls.sort_by(|a, b| a.microseconds.total_cmp(&b.microseconds));
    let at = |part: f64| calls[((calls.len() - 1) as f64 * part) as usize].microseconds;
    let slept = calls.iter().filter(|call| call.slept).count();
    println!(
        "{threads:7}  {name:18}{:10.0}{:10.0}{:10.0}{:10.0}{:9.1}%",
        at(0.5),
        at(0.9),
        at(0.99),
        at(1.0),
        slept as f64 * 100.0 / calls.len() as f64
    );
}

fn main() {
    let count = env::args()
        .nth(1)
        .map_or(500, |word| word.parse().expect("a number"));
    println!("{} CPUs", thread::available_parallelism().unwrap());
    println!(
        "{:7}  {:18}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "threads", "call, microseconds", "median", "90 %", "99 %", "maximum", "slept"
    );
    for threads in [0, 1, 16, 32] {
        measure(threads, count);
    }
}

fn measure(threads: usize, count: usize) {
    let fixture = Fixture::new();
    let map = Map::new(PAGES);
    let stop = Arc::new(AtomicBool::new(false));
    let purges = Arc::new(AtomicUsize::new(0));
    let purgers: Vec<_> = (0..threads)
        .map(|_| {
            let (own, stop, purges) = (Map::new(PAGES), stop.clone(), purges.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    (0..PAGES).for_each(|page| own.store(page, 1));
                    own.dont_need(0..PAGES);
                    purges.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();

    let plain = MrArgs::new(map.at(0), PAGES * PAGE);
    let kinds = [
        ("plain", plain),
        ("watched", plain.watched(&fixture.queue, 0)),
    ];
    let mut calls = [(); 2].map(|()| (Vec::new(), Vec::new()));
    for _ in 0..count {
        for ((_, args), calls) in kinds.iter().zip(&mut calls) {
            let (mut mr, registered) = timed(|| reg(&fixture.pd, args));
            let (_, destroyed) = timed(|| mr.destroy().expect("deregister"));
            calls.0.push(registered);
            calls.1.push(destroyed);
        }
    }
    stop.store(true, Ordering::Relaxed);
    purgers
        .into_iter()
        .for_each(|purger| purger.join().expect("purge"));
    for ((name, _), (registered, destroyed)) in kinds.iter().zip(calls) {
        show(threads, &format!("REG_MR {name}"), registered);
        show(threads, &format!("MR_DESTROY {name}"), destroyed);
    }
    println!("{threads:7}  purges: {}", purges.load(Ordering::Relaxed));
}

// SPDX-License-Identifier: GPL-2.0
//! Counting instructions. Under QEMU's `-icount shift=0` an instruction takes a
//! nanosecond of the guest, and the guest's time-stamp counter counts nanoseconds.

use anyhow::{Result, ensure};
use std::arch::asm;

/// How often something is repeated within a sample. Few enough that most samples are
/// without an interrupt of the timer.
pub const BATCH: usize = 32;
pub const SAMPLES: usize = 15;

/// The instructions executed so far.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: Every x86-64 has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Fails unless the clock counts instructions, and there is one CPU.
pub fn check_clock() -> Result<()> {
    let cpus = std::thread::available_parallelism()?;
    ensure!(cpus.get() == 1, "there are {cpus} CPUs, and it takes one");
    let known = median((0..SAMPLES).map(|_| {
        count(|| {
            // SAFETY: NOPs.
            unsafe { asm!(".rept 1000", "nop", ".endr", options(nomem, nostack)) }
        })
    }));
    ensure!(
        (1000.0..1020.0).contains(&known),
        "1000 instructions took {known} ticks: run this by scripts/bench, under -icount shift=0"
    );
    Ok(())
}

/// The instructions of `run`.
#[inline(always)]
pub fn count(run: impl FnOnce()) -> f64 {
    let start = now();
    run();
    (now() - start) as f64
}

/// The instructions of each of `times` calls.
#[inline(always)]
pub fn each(times: usize, mut run: impl FnMut(usize)) -> f64 {
    count(|| (0..times).for_each(&mut run)) / times as f64
}

/// The median of what `sample` returns, after a warm-up.
pub fn sample(mut sample: impl FnMut() -> f64) -> f64 {
    samples(SAMPLES, || [sample()])[0]
}

/// The medians of several figures that `sample` counts in one go.
pub fn samples<const N: usize>(times: usize, mut sample: impl FnMut() -> [f64; N]) -> [f64; N] {
    sample();
    let samples: Vec<_> = (0..times).map(|_| sample()).collect();
    std::array::from_fn(|n| median(samples.iter().map(|sample| sample[n])))
}

/// What something takes of a plain MR, and what more it takes of a watched one.
#[derive(Clone, Copy)]
pub struct Pair {
    pub plain: f64,
    pub more: f64,
}

/// The medians of figures of the two, and of their differences. They are sampled in turn,
/// so that what else changes with time is the same for both.
pub fn pairs<const N: usize>(times: usize, mut sample: impl FnMut(bool) -> [f64; N]) -> [Pair; N] {
    let mut both = |watched_first: bool| {
        let first = sample(watched_first);
        let second = sample(!watched_first);
        if watched_first {
            (second, first)
        } else {
            (first, second)
        }
    };
    both(false);
    let samples: Vec<_> = (0..times).map(|n| both(n % 2 == 1)).collect();
    std::array::from_fn(|n| Pair {
        plain: median(samples.iter().map(|(plain, _)| plain[n])),
        more: median(samples.iter().map(|(plain, watched)| watched[n] - plain[n])),
    })
}

pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

// SPDX-License-Identifier: GPL-2.0

//! Checks of the files of the kernel themselves, compiled against the shim in `src`.

// As the kernel does.
#![feature(arbitrary_self_types)]

extern crate kernel as pin_init;

#[rustfmt::skip]
#[path = "../../../kernel/uverbs_mmu_notify/queue.rs"]
mod queue;
#[rustfmt::skip]
#[path = "../../../kernel/uverbs_mmu_notify/state.rs"]
mod state;

/// The kernel's are of no interest here.
mod trace {
    use crate::{queue::Queue, state::Record};
    use core::ops::Range;
    use kernel::{check, mm::interval_notifier::Invalidation};

    pub(crate) fn start(_: &Queue, _: u64, _: &Range<usize>) {
        check::might_sleep();
    }

    pub(crate) fn invalidate(_: &Queue, _: u64, _: &Invalidation, _: Option<u64>) {
        check::might_sleep();
    }

    pub(crate) fn deliver(_: &Queue, _: &[Record]) {
        check::might_sleep();
    }

    pub(crate) fn stop(_: &Queue, _: u64, _: u32) {
        check::might_sleep();
    }
}

mod concurrent;
mod sequential;
mod shim;
mod single;

use core::ptr::NonNull;
use kernel::{
    check,
    page::PAGE_SIZE,
    sync::{
        Arc,
        atomic::{Acquire, Atomic},
    }, //
};
use proptest::test_runner::{Config, FileFailurePersistence, RngAlgorithm, RngSeed};
use queue::{CounterPage, Queue};
use std::{
    env,
    hash::{BuildHasher, RandomState}, //
};

/// Returns how the random tests run, unless the environment says otherwise.
fn proptest_config() -> Config {
    let default = Config::default();
    let seed = match default.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => RandomState::new().hash_one(()),
    };

    // For a test that fails.
    println!("PROPTEST_RNG_SEED={seed}");
    Config {
        cases: env::var("PROPTEST_CASES").map_or(100_000, |_| default.cases),
        rng_seed: RngSeed::Fixed(seed),
        // Failures are kept, and tried first.
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        // The default one is slow without optimisation.
        rng_algorithm: RngAlgorithm::XorShift,
        max_local_rejects: u32::MAX,
        max_shrink_iters: 4096,
        ..default
    }
}

/// To be called when they have passed.
fn report_histories(config: &Config) {
    check::report(&format!(
        "{} histories, seed {}",
        config.cases, config.rng_seed
    ));
}

// One page, with the atomic of the kernel.
const _: () =
    assert!(size_of::<CounterPage>() == PAGE_SIZE - size_of::<u64>() + size_of::<Atomic<u64>>());

/// The generation as userspace loads it: from the page, without a lock.
struct Generation {
    page: NonNull<Atomic<u64>>,
    /// Keeps the page until it is released.
    _queue: Arc<Queue>,
}

// SAFETY: The atomic can be loaded by any thread, and the reference can be sent.
unsafe impl Send for Generation {}
// SAFETY: As above.
unsafe impl Sync for Generation {}

impl Generation {
    fn new(queue: &Arc<Queue>) -> Self {
        let page = queue.with_page(|page| NonNull::from(page.unwrap()));

        Self {
            // SAFETY: In bounds of the page.
            page: unsafe { page.byte_add(CounterPage::GENERATION) }.cast(),
            _queue: queue.clone(),
        }
    }

    /// Not to be called after the release of the queue.
    fn load(&self) -> u64 {
        // SAFETY: The generation is here in the page, which has not been freed.
        unsafe { self.page.as_ref() }.load(Acquire)
    }
}

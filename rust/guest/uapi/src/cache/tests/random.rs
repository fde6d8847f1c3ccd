// SPDX-License-Identifier: GPL-2.0
//! Random sequences of operations, compared with what the test knows: which
//! regions have been invalidated.

use super::{super::*, Kernel, TestCache, cache, sequential};
use proptest::{
    prelude::*,
    test_runner::{FileFailurePersistence, RngAlgorithm, RngSeed},
};
use std::{
    collections::BTreeSet,
    env,
    hash::{BuildHasher, RandomState},
};

#[derive(Clone, Copy, Debug)]
enum Op {
    /// Gets this range, and keeps the entry in use or not.
    Get(u64, u64, bool),
    Lookup(u64, u64),
    TryLookup(u64, u64),
    Drain,
    /// Invalidates one of the registered regions.
    Invalidate(usize),
    /// The next registrations, that many, are born stale.
    BornStale(u32),
    ShortReads(bool),
    ReadFails,
    RegisterFails,
    DeregisterFails,
    /// Retires one of the entries in use.
    Retire(usize),
    /// Gives up one of them.
    Release(usize),
    Reap,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let range = || (0..6u64, 1..4u64);
    let op = prop_oneof![
        4 => (range(), any::<bool>()).prop_map(|((at, len), keep)| Op::Get(at, len, keep)),
        4 => range().prop_map(|(at, len)| Op::Lookup(at, len)),
        2 => range().prop_map(|(at, len)| Op::TryLookup(at, len)),
        1 => Just(Op::Drain),
        4 => any::<usize>().prop_map(Op::Invalidate),
        1 => (1..=ATTEMPTS as u32).prop_map(Op::BornStale),
        1 => any::<bool>().prop_map(Op::ShortReads),
        1 => Just(Op::ReadFails),
        1 => Just(Op::RegisterFails),
        1 => Just(Op::DeregisterFails),
        1 => any::<usize>().prop_map(Op::Retire),
        2 => any::<usize>().prop_map(Op::Release),
        2 => Just(Op::Reap),
    ];
    proptest::collection::vec(op, 1..60)
}

struct Model {
    cache: TestCache,
    in_use: Vec<Arc<Entry<u64>>>,
    /// Cookies of entries that must not be found.
    dropped: BTreeSet<u64>,
    /// Keys of entries that must be found, with their cookies.
    good: BTreeMap<(u64, u64), u64>,
}

impl Model {
    fn kernel(&self) -> std::cell::RefMut<'_, Kernel> {
        self.cache.backend.borrow_mut()
    }

    fn drop_entry(&mut self, cookie: u64) {
        self.dropped.insert(cookie);
        self.good.retain(|_, good| *good != cookie);
    }

    fn check_found(&self, range: &Range<u64>, entry: &Entry<u64>) {
        assert!(entry.range.start <= range.start && range.end <= entry.range.end);
        assert!(self.kernel().registered.contains(&entry.cookie));
        assert!(!self.dropped.contains(&entry.cookie), "a stale entry");
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Get(at, len, keep) => {
                let range = at..at + len;
                let Ok(entry) = self.cache.get(range.clone()) else {
                    return;
                };
                self.check_found(&range, &entry);
                self.good.insert(entry.key(), entry.cookie);
                if keep {
                    self.in_use.push(entry);
                }
            }
            Op::Lookup(at, len) => match self.cache.lookup(&(at..at + len)) {
                Ok(Some(entry)) => self.check_found(&(at..at + len), &entry),
                Ok(None) => assert!(!self.good.contains_key(&(at, at + len)), "a miss"),
                Err(_) => {}
            },
            Op::TryLookup(at, len) => {
                let reads = self.kernel().reads;
                if let Some(entry) = self.cache.try_lookup(&(at..at + len)) {
                    self.check_found(&(at..at + len), &entry);
                }
                assert_eq!(self.kernel().reads, reads);
            }
            Op::Drain => {
                if self.cache.drain().is_ok() {
                    assert!(self.kernel().queue.is_empty());
                }
            }
            Op::Invalidate(n) => {
                let mut kernel = self.kernel();
                if !kernel.registered.is_empty() {
                    let cookie = kernel.registered[n % kernel.registered.len()];
                    kernel.invalidate(cookie);
                    drop(kernel);
                    self.drop_entry(cookie);
                }
            }
            Op::BornStale(count) => self.kernel().born_stale = count,
            Op::ShortReads(short) => self.kernel().short_reads = short,
            Op::ReadFails => self.kernel().read_error = Some(5),
            Op::RegisterFails => self.kernel().register_error = Some(12),
            Op::DeregisterFails => self.kernel().deregister_error = Some(22),
            Op::Retire(n) if !self.in_use.is_empty() => {
                let entry = self.in_use[n % self.in_use.len()].clone();
                self.cache.retire(&entry);
                self.drop_entry(entry.cookie);
            }
            Op::Release(n) if !self.in_use.is_empty() => {
                let n = n % self.in_use.len();
                self.in_use.swap_remove(n);
            }
            Op::Reap => {
                let _ = self.cache.reap();
                for entry in &self.in_use {
                    assert!(self.kernel().registered.contains(&entry.cookie), "in use");
                }
            }
            Op::Retire(_) | Op::Release(_) => {}
        }
    }

    /// In the end everything is deregistered, and no object is left.
    fn finish(mut self) {
        self.in_use.clear();
        self.kernel().read_error = None;
        self.kernel().deregister_error = None;
        let registered = self.kernel().registered.clone();
        registered
            .iter()
            .for_each(|cookie| self.kernel().invalidate(*cookie));
        self.cache.drain().unwrap();
        self.cache.reap().unwrap();
        assert_eq!(self.kernel().registered, []);
        assert!(self.cache.lock().objects.is_empty());
    }
}

#[test]
fn random_operations() {
    let default = ProptestConfig::default();
    let seed = match default.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => RandomState::new().hash_one(()),
    };
    let config = ProptestConfig {
        cases: env::var("PROPTEST_CASES").map_or(10_000, |_| default.cases),
        rng_seed: RngSeed::Fixed(seed),
        // Failures are kept, and tried first.
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        // The default one is slow without optimisation.
        rng_algorithm: RngAlgorithm::XorShift,
        ..default
    };

    // For a test that fails.
    println!("PROPTEST_RNG_SEED={seed}");
    proptest!(config, |(ops in ops())| {
        sequential(move || {
            let mut model = Model {
                cache: cache(),
                in_use: Vec::new(),
                dropped: BTreeSet::new(),
                good: BTreeMap::new(),
            };
            ops.iter().for_each(|op| model.run(*op));
            model.finish();
        });
    });
}

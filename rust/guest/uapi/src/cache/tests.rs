// SPDX-License-Identifier: GPL-2.0
//! The cache's rules, with a kernel whose events the test decides.

mod concurrent;
mod random;
pub mod sync;

use super::*;
use std::{cell::RefCell, collections::VecDeque, rc::Rc};

/// Runs a test without threads. The types of loom need its model, whose first
/// thread has too small a stack.
fn sequential(test: impl Fn() + Send + Sync + 'static) {
    let test = std::sync::Arc::new(test);
    let mut builder = loom::model::Builder::new();
    builder.max_branches = 1_000_000;
    builder.check(move || {
        let test = test.clone();
        let thread = loom::thread::Builder::new().stack_size(1 << 20);
        let thread = thread.spawn(move || test());
        thread.unwrap().join().unwrap();
    });
}

#[derive(Default)]
struct Kernel {
    generation: u64,
    queue: VecDeque<Event>,
    reads: u32,
    /// The buffer faults after the first event.
    short_reads: bool,
    read_error: Option<i32>,
    /// Invalidated while being registered: that many of the next registrations.
    born_stale: u32,
    /// What another thread does before a registration returns.
    during_registration: Option<Box<dyn FnOnce()>>,
    register_error: Option<i32>,
    deregister_error: Option<i32>,
    /// Cookies of registered regions.
    registered: Vec<u64>,
    delivered: HashMap<u64, u32>,
    /// Events that another thread has read, but not yet shown to the cache.
    elsewhere: Vec<u64>,
}

impl Kernel {
    /// Merges into a pending event, which does not advance the generation.
    fn invalidate(&mut self, cookie: u64) {
        if self.queue.iter().any(|event| event.cookie == cookie) {
            return;
        }
        self.generation += 1;
        self.queue.push_back(Event {
            cookie,
            generation: self.generation,
            ..Event::default()
        });
    }
}

fn fail(error: &mut Option<i32>) -> io::Result<()> {
    error
        .take()
        .map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
}

impl Backend for RefCell<Kernel> {
    type Mr = u64;

    fn generation(&self) -> u64 {
        self.borrow().generation
    }

    fn read(&self, events: &mut [Event]) -> io::Result<usize> {
        let mut kernel = self.borrow_mut();
        kernel.reads += 1;
        fail(&mut kernel.read_error)?;
        if kernel.queue.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let room = if kernel.short_reads { 1 } else { events.len() };
        let count = room.min(kernel.queue.len());
        for (to, from) in events.iter_mut().zip(kernel.queue.drain(..count)) {
            *to = from;
        }
        for event in &events[..count] {
            *kernel.delivered.entry(event.cookie).or_default() += 1;
        }
        Ok(count)
    }

    fn register(&self, _: &Range<u64>, cookie: u64) -> io::Result<u64> {
        let mut kernel = self.borrow_mut();
        fail(&mut kernel.register_error)?;
        if kernel.born_stale > 0 {
            kernel.born_stale -= 1;
            kernel.invalidate(cookie);
        }
        kernel.registered.push(cookie);
        let other_thread = kernel.during_registration.take();
        drop(kernel);
        other_thread.into_iter().for_each(|run| run());
        Ok(cookie)
    }

    fn deregister(&self, cookie: &mut u64) -> io::Result<u32> {
        let mut kernel = self.borrow_mut();
        fail(&mut kernel.deregister_error)?;
        kernel.registered.retain(|other| other != cookie);
        kernel.queue.retain(|event| event.cookie != *cookie);
        let elsewhere = kernel.elsewhere.iter().filter(|&c| c == cookie).count();
        Ok(kernel.delivered.remove(cookie).unwrap_or(0) + elsewhere as u32)
    }
}

type TestCache = Cache<RefCell<Kernel>>;

fn cache() -> TestCache {
    Cache::new(RefCell::default())
}

fn invalidate(cache: &TestCache, cookie: u64) {
    cache.backend.borrow_mut().invalidate(cookie);
}

fn reads(cache: &TestCache) -> u32 {
    cache.backend.borrow().reads
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

#[test]
fn hits_without_a_change_read_nothing() {
    sequential(|| {
        let cache = cache();
        let entry = cache.get(0..100).unwrap();
        for _ in 0..1000 {
            let found = cache.lookup(&(10..20)).unwrap().unwrap();
            assert!(Arc::ptr_eq(&entry, &found));
            assert!(cache.is_current(&entry));
        }
        assert_eq!(reads(&cache), 0);
        assert_eq!(cache.backend.borrow().registered.len(), 1);
    });
}

#[test]
fn only_a_covering_entry_is_found() {
    sequential(|| {
        let cache = cache();
        cache.get(100..200).unwrap();
        assert!(cache.lookup(&(100..200)).unwrap().is_some());
        assert!(cache.lookup(&(199..200)).unwrap().is_some());
        assert!(cache.lookup(&(99..200)).unwrap().is_none());
        assert!(cache.lookup(&(100..201)).unwrap().is_none());
    });
}

#[test]
fn an_event_drops_its_entry_and_no_other() {
    sequential(|| {
        let cache = cache();
        let (a, b) = (cache.get(0..10).unwrap(), cache.get(10..20).unwrap());
        invalidate(&cache, a.cookie);
        assert!(!cache.is_current(&a));
        assert!(cache.lookup(&(0..10)).unwrap().is_none());
        assert!(Arc::ptr_eq(&cache.lookup(&(10..20)).unwrap().unwrap(), &b));
        assert_eq!(reads(&cache), 2);
        assert!(!cache.is_current(&a));
        assert!(cache.is_current(&b));
        assert!(!Arc::ptr_eq(&cache.get(0..10).unwrap(), &a));
    });
}

#[test]
fn a_stale_entry_does_not_hide_an_older_one() {
    sequential(|| {
        let cache = cache();
        let outer = cache.get(0..100).unwrap();
        let inner = cache.get(0..200).unwrap();
        invalidate(&cache, inner.cookie);
        assert!(Arc::ptr_eq(
            &cache.lookup(&(0..10)).unwrap().unwrap(),
            &outer
        ));
    });
}

#[test]
fn reading_goes_on_until_eagain() {
    sequential(|| {
        for (count, short_reads) in [
            (BATCH - 1, false),
            (BATCH, false),
            (BATCH + 1, false),
            (3, true),
        ] {
            let cache = cache();
            let entries: Vec<_> = (0..count as u64)
                .map(|n| cache.get(10 * n..10 * n + 10).unwrap())
                .collect();
            for entry in &entries {
                invalidate(&cache, entry.cookie);
            }
            cache.backend.borrow_mut().short_reads = short_reads;
            for entry in &entries {
                assert!(cache.lookup(entry.range()).unwrap().is_none());
            }
            let room = if short_reads { 1 } else { BATCH };
            assert_eq!(reads(&cache) as usize, count.div_ceil(room) + 1);
        }
    });
}

#[test]
fn merged_changes_are_applied_together() {
    sequential(|| {
        let cache = cache();
        let entry = cache.get(0..10).unwrap();
        invalidate(&cache, entry.cookie);
        invalidate(&cache, entry.cookie);
        assert_eq!(cache.backend.generation(), 1);
        assert!(cache.lookup(&(0..10)).unwrap().is_none());
        invalidate(&cache, entry.cookie);
        assert_eq!(cache.backend.generation(), 2);
        drop(entry);
        cache.drain().unwrap();
        assert_eq!(cache.reap().unwrap().events, 2);
    });
}

#[test]
fn a_progress_thread_turns_misses_into_hits() {
    sequential(|| {
        let cache = cache();
        let (a, b) = (cache.get(0..10).unwrap(), cache.get(10..20).unwrap());
        invalidate(&cache, a.cookie);
        assert!(cache.try_lookup(b.range()).is_none());
        assert_eq!(reads(&cache), 0);
        cache.drain().unwrap();
        assert!(Arc::ptr_eq(&cache.try_lookup(b.range()).unwrap(), &b));
        assert!(cache.try_lookup(a.range()).is_none());
        assert_eq!(reads(&cache), 2);
    });
}

#[test]
fn an_event_newer_than_the_generation_needs_no_second_drain() {
    sequential(|| {
        let cache = cache();
        let (a, b) = (cache.get(0..10).unwrap(), cache.get(10..20).unwrap());
        invalidate(&cache, a.cookie);
        invalidate(&cache, b.cookie);
        // The second one came after the generation was loaded.
        cache.backend.borrow_mut().generation = 1;
        cache.drain().unwrap();
        cache.backend.borrow_mut().generation = 2;
        cache.drain().unwrap();
        assert_eq!(reads(&cache), 2);
    });
}

#[test]
fn a_generation_newer_than_its_events_is_applied() {
    sequential(|| {
        let cache = cache();
        let entry = cache.get(0..10).unwrap();
        invalidate(&cache, entry.cookie);
        // The second event belonged to a region that is gone.
        cache.backend.borrow_mut().generation = 2;
        cache.drain().unwrap();
        cache.drain().unwrap();
        assert_eq!(reads(&cache), 2);
    });
}

#[test]
fn a_failed_read_applies_nothing() {
    sequential(|| {
        let cache = cache();
        let entry = cache.get(0..10).unwrap();
        invalidate(&cache, entry.cookie);
        cache.backend.borrow_mut().read_error = Some(4);
        assert_eq!(errno(cache.lookup(&(0..10))), Some(4));
        assert!(!cache.is_current(&entry));
        assert!(cache.lookup(&(0..10)).unwrap().is_none());
    });
}

#[test]
fn born_stale_is_not_cached_and_tried_again() {
    sequential(|| {
        let cache = cache();
        cache.backend.borrow_mut().born_stale = 1;
        let entry = cache.get(0..10).unwrap();
        assert_eq!(entry.cookie, 2);
        let reaped = Reaped {
            regions: 1,
            events: 1,
        };
        assert_eq!(cache.reap().unwrap(), reaped);
        assert_eq!(cache.backend.borrow().registered, [2]);
        assert!(cache.is_current(&entry));
    });
}

#[test]
fn always_born_stale_is_an_error() {
    sequential(|| {
        let cache = cache();
        cache.backend.borrow_mut().born_stale = u32::MAX;
        let error = cache.get(0..10).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(cache.reap().unwrap().regions, ATTEMPTS as u64);
        assert!(cache.backend.borrow().registered.is_empty());
    });
}

#[test]
fn an_event_read_during_the_registration_counts() {
    sequential(|| {
        let cache = Rc::new(cache());
        let other = cache.clone();
        cache.backend.borrow_mut().born_stale = 1;
        cache.backend.borrow_mut().during_registration = Some(Box::new(move || {
            assert!(other.lookup(&(0..10)).unwrap().is_none());
        }));
        let entry = cache.get(0..10).unwrap();
        assert_eq!(reads(&cache), 2);
        assert_eq!(entry.cookie, 2);
    });
}

#[test]
fn a_failed_registration_leaves_nothing() {
    sequential(|| {
        let cache = cache();
        cache.backend.borrow_mut().register_error = Some(12);
        assert_eq!(errno(cache.get(0..10)), Some(12));
        assert!(cache.lock().objects.is_empty());
        assert!(cache.lookup(&(0..10)).unwrap().is_none());
    });
}

#[test]
fn a_read_error_at_insertion_keeps_the_region_for_reaping() {
    sequential(|| {
        let cache = cache();
        cache.backend.borrow_mut().generation = 1;
        cache.lookup(&(0..10)).unwrap();
        cache.backend.borrow_mut().born_stale = 1;
        cache.backend.borrow_mut().read_error = Some(5);
        assert_eq!(errno(cache.get(0..10)), Some(5));
        cache.lookup(&(0..10)).unwrap();
        assert_eq!(cache.reap().unwrap().regions, 1);
    });
}

#[test]
fn what_is_in_use_is_not_reaped() {
    sequential(|| {
        let cache = cache();
        let entry = cache.get(0..10).unwrap();
        assert_eq!(cache.reap().unwrap(), Reaped::default());
        invalidate(&cache, entry.cookie);
        cache.lookup(&(0..10)).unwrap();
        assert_eq!(cache.reap().unwrap(), Reaped::default());
        drop(entry);
        let reaped = Reaped {
            regions: 1,
            events: 1,
        };
        assert_eq!(cache.reap().unwrap(), reaped);
        assert!(cache.lock().objects.is_empty());
    });
}

#[test]
fn a_retired_entry_is_not_found_and_reaped() {
    sequential(|| {
        let cache = cache();
        let entry = cache.get(0..10).unwrap();
        cache.retire(&entry);
        drop(entry);
        assert!(cache.lookup(&(0..10)).unwrap().is_none());
        assert_eq!(cache.reap().unwrap().regions, 1);
    });
}

#[test]
fn two_registrations_of_one_range_are_both_reaped() {
    sequential(|| {
        let cache = cache();
        let first = cache.get(0..10).unwrap();
        let second = cache.insert(&(0..10)).unwrap().unwrap();
        assert!(Arc::ptr_eq(
            &cache.lookup(&(0..10)).unwrap().unwrap(),
            &second
        ));
        drop(first);
        assert_eq!(cache.reap().unwrap().regions, 1);
        assert_eq!(cache.backend.borrow().registered, [second.cookie]);
    });
}

#[test]
fn a_failed_deregistration_is_tried_again() {
    sequential(|| {
        let cache = cache();
        let cookie = cache.get(0..10).unwrap().cookie;
        invalidate(&cache, cookie);
        cache.lookup(&(0..10)).unwrap();
        cache.backend.borrow_mut().deregister_error = Some(22);
        assert_eq!(errno(cache.reap()), Some(22));
        assert_eq!(cache.lock().objects.len(), 1);
        assert_eq!(cache.reap().unwrap().regions, 1);
        assert!(cache.lock().objects.is_empty());
    });
}

#[test]
fn an_object_lives_until_its_last_event_is_seen() {
    sequential(|| {
        let cache = cache();
        let cookie = cache.get(0..10).unwrap().cookie;
        invalidate(&cache, cookie);
        cache.lookup(&(0..10)).unwrap();
        cache.backend.borrow_mut().elsewhere = vec![cookie; 2];
        assert_eq!(cache.reap().unwrap().events, 3);
        cache.lock().mark(cookie);
        assert_eq!(cache.lock().objects.len(), 1);
        cache.lock().mark(cookie);
        assert!(cache.lock().objects.is_empty());
    });
}

// SPDX-License-Identifier: GPL-2.0
//! Threads at the same time, in every order that matters. The right ways to use
//! the cache never lead to a stale use; for each wrong one loom finds it.

use super::super::*;
use loom::{
    sync::atomic::AtomicU64,
    thread::{self, JoinHandle},
};
use std::{
    collections::VecDeque,
    sync::{Arc as StdArc, Mutex as StdMutex},
};

const PAGE: u64 = 4096;
/// The number of pages, each registered with a cookie of its own.
const PAGES: usize = 2;
/// The number of registrations in a model.
const WATCHES: usize = 4;

fn range(page: usize) -> Range<u64> {
    let start = page as u64 * PAGE;
    start..start + PAGE
}

/// The kernel's side of the contract, with buffers that always fault after the
/// first event.
#[derive(Default)]
struct Kernel {
    generation: AtomicU64,
    /// How often each page has been replaced.
    versions: [AtomicU64; PAGES],
    /// How many changes the pending event of each watch is of, 0 if there is none.
    pending: [AtomicU64; WATCHES],
    queue: Mutex<Queue>,
    /// The pages with the cookies of their watches. Held by invalidations;
    /// registration and deregistration wait for these.
    notifiers: Mutex<Vec<(usize, u64)>>,
}

#[derive(Default)]
struct Queue {
    /// The pending events.
    events: VecDeque<Event>,
    /// The same as in [`Kernel`], which is not loaded before it is stored: see
    /// `sync.rs`.
    generation: u64,
    delivered: [u32; WATCHES],
}

/// A registered page, as it was when it was pinned.
struct TestMr {
    cookie: u64,
    version: u64,
}

impl Kernel {
    /// Replaces a page. When it returns, lookups must not find the old one.
    fn remap(&self, page: usize) {
        let notifiers = lock(&self.notifiers);
        for (_, cookie) in notifiers.iter().filter(|(watched, _)| *watched == page) {
            self.invalidate(*cookie);
        }
        self.versions[page].fetch_add(1, Ordering::Release);
    }

    fn invalidate(&self, cookie: u64) {
        let pending = &self.pending[cookie as usize];
        // Merges into a pending event without the lock, and does nothing else.
        let word = pending.load(Ordering::Acquire);
        let merge =
            |word| pending.compare_exchange(word, word + 1, Ordering::AcqRel, Ordering::Acquire);
        if word != 0 && merge(word).is_ok() {
            return;
        }
        // Nothing else invalidates, so a reader has taken the event meanwhile.
        let mut queue = lock(&self.queue);
        queue.generation += 1;
        let generation = queue.generation;
        queue.events.push_back(Event {
            cookie,
            generation,
            ..Event::default()
        });
        self.generation.store(generation, Ordering::Release);
        pending.store(1, Ordering::Release);
    }
}

impl Backend for Kernel {
    type Mr = TestMr;

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn read(&self, events: &mut [Event]) -> io::Result<usize> {
        let mut queue = lock(&self.queue);
        let event = queue.events.pop_front();
        events[0] = event.ok_or(io::ErrorKind::WouldBlock)?;
        let cookie = events[0].cookie as usize;
        assert_ne!(self.pending[cookie].swap(0, Ordering::AcqRel), 0);
        queue.delivered[cookie] += 1;
        Ok(1)
    }

    fn register(&self, range: &Range<u64>, cookie: u64) -> io::Result<TestMr> {
        let page = (range.start / PAGE) as usize;
        let mut notifiers = lock(&self.notifiers);
        notifiers.push((page, cookie));
        Ok(TestMr {
            cookie,
            version: self.versions[page].load(Ordering::Acquire),
        })
    }

    fn deregister(&self, mr: &mut TestMr) -> io::Result<u32> {
        let mut notifiers = lock(&self.notifiers);
        let watched = notifiers.iter().position(|(_, c)| *c == mr.cookie);
        notifiers.remove(watched.expect("deregistered twice"));
        drop(notifiers);
        let mut queue = lock(&self.queue);
        queue.events.retain(|event| event.cookie != mr.cookie);
        Ok(queue.delivered[mr.cookie as usize])
    }
}

type TestCache = Cache<Kernel>;
type TestEntry = Arc<Entry<TestMr>>;

/// Runs `f` in every order of its threads that matters, with at most
/// `preemptions` preemptions, which `LOOM_MAX_PREEMPTIONS` overrides. Returns its
/// results and how many runs had each.
fn explore<R: Ord + Send + std::fmt::Debug + 'static>(
    name: &str,
    preemptions: Option<usize>,
    f: impl Fn() -> R + Send + Sync + 'static,
) -> BTreeMap<R, usize> {
    let results = StdArc::new(StdMutex::new(BTreeMap::new()));
    let counted = results.clone();
    let mut builder = loom::model::Builder::new();
    let preemptions = builder.preemption_bound.or(preemptions);
    builder.preemption_bound = preemptions;
    builder.max_branches = 20_000;
    builder.check(move || {
        let result = f();
        *counted.lock().unwrap().entry(result).or_default() += 1;
    });
    let results = StdArc::into_inner(results).unwrap().into_inner().unwrap();
    let bound = preemptions.map_or("all".into(), |n| format!("at most {n} preemptions,"));
    let count: usize = results.values().sum();
    println!("loom: {name}: {bound} {count} interleavings: {results:?}");
    results
}

/// What the threads have in common. No operation of loom is spent on sharing it.
struct Shared {
    cache: TestCache,
    entries: Vec<TestEntry>,
}

impl Shared {
    fn new() -> StdArc<Self> {
        let cache = Cache::new(Kernel::default());
        let entries = (0..PAGES).map(|page| cache.get(range(page)).unwrap());
        StdArc::new(Self {
            entries: entries.collect(),
            cache,
        })
    }

    /// Uses a page as a library does: the entry that it has, if that is current,
    /// or the one that `lookup` finds.
    fn use_page(&self, page: usize, lookup: Lookup) -> Use {
        let replaced = self.cache.backend.versions[page].load(Ordering::Acquire);
        let used = |entry: &TestEntry| match entry.mr.version < replaced {
            true => Use::Stale,
            false => Use::Good,
        };
        if self.cache.is_current(&self.entries[page]) {
            return used(&self.entries[page]);
        }
        lookup(&self.cache, &range(page)).map_or(Use::Miss, |entry| used(&entry))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Use {
    Miss,
    Good,
    Stale,
}

/// Starts `f`. The first thread of a model only waits: a switch away from it
/// would count as a preemption.
fn spawn<R: 'static>(
    shared: &StdArc<Shared>,
    f: impl FnOnce(&Shared) -> R + 'static,
) -> JoinHandle<R> {
    let shared = shared.clone();
    thread::spawn(move || f(&shared))
}

type Lookup = fn(&TestCache, &Range<u64>) -> Option<TestEntry>;

/// A thread that uses these pages in turn.
type User = (Lookup, &'static [usize]);

/// What happens at the same time.
struct Scene {
    preemptions: Option<usize>,
    reader: Option<fn(&TestCache)>,
    /// The first user replaces these pages before, one after the other.
    replaced: &'static [usize],
    users: &'static [User],
}

/// Returns whether there are stale uses.
fn has_stale_uses(name: &str, scene: Scene) -> bool {
    let results = explore(name, scene.preemptions, move || {
        let shared = Shared::new();
        let reader = scene.reader;
        let read = reader.map(|reader| spawn(&shared, move |shared| reader(&shared.cache)));
        let users = scene.users.iter().enumerate().map(|(n, (lookup, pages))| {
            let replaced = if n == 0 { scene.replaced } else { &[] };
            spawn(&shared, move |shared| -> Vec<_> {
                let replaced = replaced.iter();
                replaced.for_each(|page| shared.cache.backend.remap(*page));
                let pages = pages.iter();
                pages.map(|page| shared.use_page(*page, *lookup)).collect()
            })
        });
        let users: Vec<_> = users.collect();
        read.into_iter().for_each(|read| read.join().unwrap());
        let uses = users.into_iter().map(|user| user.join().unwrap());
        let uses: Vec<_> = uses.flatten().collect();
        (*uses.iter().min().unwrap(), *uses.iter().max().unwrap())
    });
    assert!(results.keys().any(|(_, most)| *most != Use::Miss));
    assert!(results.contains_key(&(Use::Miss, Use::Miss)));
    results.keys().any(|(_, most)| *most == Use::Stale)
}

fn drain(cache: &TestCache) {
    cache.drain().unwrap();
}

fn lookup(cache: &TestCache, range: &Range<u64>) -> Option<TestEntry> {
    cache.lookup(range).unwrap()
}

/// Uses only what is current without a lookup.
fn miss(_: &TestCache, _: &Range<u64>) -> Option<TestEntry> {
    None
}

#[test]
fn lookups_read() {
    let scene = Scene {
        preemptions: Some(2),
        reader: None,
        replaced: &[0, 0],
        users: &[(miss, &[]), (lookup, &[0]), (lookup, &[0])],
    };
    assert!(!has_stale_uses("lookups read", scene));
}

#[test]
fn a_lookup_reads_two() {
    let scene = Scene {
        preemptions: Some(2),
        reader: None,
        replaced: &[0, 1],
        users: &[(lookup, &[0, 1]), (lookup, &[1])],
    };
    assert!(!has_stale_uses("a lookup reads two events", scene));
}

#[test]
fn progress_thread_reads() {
    let scene = Scene {
        preemptions: Some(2),
        reader: Some(drain),
        replaced: &[0],
        users: &[(lookup, &[0]), (Cache::try_lookup, &[0])],
    };
    assert!(!has_stale_uses(
        "a progress thread and a lookup read",
        scene
    ));
}

#[test]
fn only_progress_thread_reads() {
    let scene = Scene {
        preemptions: Some(2),
        reader: Some(drain),
        replaced: &[0],
        users: &[(Cache::try_lookup, &[0]), (Cache::try_lookup, &[0])],
    };
    assert!(!has_stale_uses("only a progress thread reads", scene));
}

/// As [`Cache::lookup`], but with the lock of the state as the drain lock.
fn lookup_with_one_lock(cache: &TestCache, range: &Range<u64>) -> Option<TestEntry> {
    let mut state = cache.lock();
    let mut newest = cache.backend.generation();
    if newest != cache.applied.load(Ordering::Relaxed) {
        while let Some(event) = read_one(cache) {
            state.mark(event.cookie);
            newest = newest.max(event.generation);
        }
        cache.applied.store(newest, Ordering::Release);
    }
    state.find(range)
}

fn read_one(cache: &TestCache) -> Option<Event> {
    let mut event = [Event::default()];
    cache.backend.read(&mut event).is_ok().then_some(event[0])
}

#[test]
fn lookups_read_with_one_lock() {
    let scene = Scene {
        preemptions: Some(2),
        reader: None,
        replaced: &[0],
        users: &[
            (miss, &[]),
            (lookup_with_one_lock, &[0]),
            (lookup_with_one_lock, &[0]),
        ],
    };
    assert!(!has_stale_uses("lookups read, one lock", scene));
}

/// Wrong: the first read(), which is short, is the last one.
fn short_count_is_empty(cache: &TestCache, range: &Range<u64>) -> Option<TestEntry> {
    let draining = lock(&cache.drain_lock);
    let mut newest = cache.backend.generation();
    if let Some(event) = read_one(cache) {
        cache.lock().mark(event.cookie);
        newest = newest.max(event.generation);
    }
    cache.applied.store(newest, Ordering::Release);
    drop(draining);
    cache.lock().find(range)
}

#[test]
fn short_count_is_not_empty() {
    let scene = Scene {
        preemptions: None,
        reader: None,
        replaced: &[0, 1],
        users: &[(miss, &[]), (short_count_is_empty, &[0, 1])],
    };
    assert!(has_stale_uses("WRONG, a short count is empty", scene));
}

/// Wrong: reads and marks, but not under the drain lock.
fn drain_outside_the_lock(cache: &TestCache) {
    while let Some(event) = read_one(cache) {
        cache.lock().mark(event.cookie);
    }
}

#[test]
fn reader_needs_the_lock() {
    let scene = Scene {
        preemptions: None,
        reader: Some(drain_outside_the_lock),
        replaced: &[0],
        users: &[(miss, &[]), (lookup, &[0])],
    };
    assert!(has_stale_uses("WRONG, a reader outside the lock", scene));
}

/// Wrong: publishes a generation that was loaded after the events were read.
fn load_after_draining(cache: &TestCache, range: &Range<u64>) -> Option<TestEntry> {
    let draining = lock(&cache.drain_lock);
    while let Some(event) = read_one(cache) {
        cache.lock().mark(event.cookie);
    }
    let newest = cache.backend.generation();
    cache.applied.store(newest, Ordering::Release);
    drop(draining);
    cache.lock().find(range)
}

#[test]
fn generation_is_loaded_before_draining() {
    let scene = Scene {
        preemptions: None,
        reader: None,
        replaced: &[0, 1],
        users: &[(miss, &[]), (load_after_draining, &[0, 1])],
    };
    assert!(has_stale_uses(
        "WRONG, the generation is loaded late",
        scene
    ));
}

/// Wrong: publishes first and marks then.
fn publish_before_marking(cache: &TestCache, range: &Range<u64>) -> Option<TestEntry> {
    let draining = lock(&cache.drain_lock);
    let mut newest = cache.backend.generation();
    let events: Vec<_> = std::iter::from_fn(|| read_one(cache)).collect();
    newest = events
        .iter()
        .fold(newest, |newest, event| newest.max(event.generation));
    cache.applied.store(newest, Ordering::Release);
    events
        .iter()
        .for_each(|event| cache.lock().mark(event.cookie));
    drop(draining);
    cache.lock().find(range)
}

#[test]
fn marking_precedes_publishing() {
    let scene = Scene {
        preemptions: Some(2),
        reader: None,
        replaced: &[0],
        users: &[(miss, &[]), (publish_before_marking, &[0]), (miss, &[0])],
    };
    assert!(has_stale_uses("WRONG, published before marking", scene));
}

/// A region is deregistered while its page is replaced twice and while a thread
/// reads. Returns its number of events in each interleaving.
fn deregister(
    name: &str,
    preemptions: Option<usize>,
    deregister: fn(&TestCache) -> u64,
) -> BTreeMap<u64, usize> {
    explore(name, preemptions, move || {
        let mut shared = Shared::new();
        let this = StdArc::get_mut(&mut shared).unwrap();
        this.cache.retire(&this.entries[0]);
        this.entries.clear();
        let remap = spawn(&shared, |shared| {
            shared.cache.backend.remap(0);
            shared.cache.backend.remap(0);
        });
        let read = spawn(&shared, |shared| {
            drain(&shared.cache);
            drain(&shared.cache);
        });
        let events = spawn(&shared, move |shared| deregister(&shared.cache));
        let events = events.join().unwrap();
        remap.join().unwrap();
        read.join().unwrap();
        drain(&shared.cache);
        let state = shared.cache.lock();
        assert_eq!(state.objects.len(), 1, "objects of the other page only");
        events
    })
}

#[test]
fn count_keeps_the_object() {
    let counts = deregister("deregistration", Some(2), |cache| {
        let reaped = cache.reap().unwrap();
        assert_eq!(reaped.regions, 1);
        reaped.events
    });
    assert_eq!(counts.into_keys().collect::<Vec<_>>(), [0, 1, 2]);
}

/// Wrong: an event that a reader still holds finds no object.
#[test]
#[should_panic = "an event of an object that is gone"]
fn count_is_needed() {
    deregister("WRONG, the count is ignored", Some(2), |cache| {
        let mut unused = cache.lock().take_unused();
        let entry = Arc::get_mut(&mut unused[0]).unwrap();
        cache.backend.deregister(&mut entry.mr).unwrap();
        cache.lock().objects.remove(&entry.cookie);
        0
    });
}

/// Two threads register a page that is replaced, while a third one reads.
#[test]
fn registrations() {
    fn register(shared: &Shared) -> bool {
        let replaced = shared.cache.backend.versions[0].load(Ordering::Acquire);
        shared.cache.get(range(0)).unwrap().mr.version >= replaced
    }
    let results = explore("registration", Some(2), || {
        let shared = StdArc::new(Shared {
            cache: Cache::new(Kernel::default()),
            entries: Vec::new(),
        });
        let remap = spawn(&shared, |shared| shared.cache.backend.remap(0));
        let read = spawn(&shared, |shared| drain(&shared.cache));
        let other = spawn(&shared, register);
        let good = [spawn(&shared, register), other].map(|thread| thread.join().unwrap());
        remap.join().unwrap();
        read.join().unwrap();
        drain(&shared.cache);
        shared.cache.reap().unwrap();
        let live = shared.cache.lock().live.len();
        assert_eq!(shared.cache.lock().objects.len(), live);
        (good == [true; 2], shared.cache.lock().last_cookie)
    });
    assert!(results.keys().all(|(good, _)| *good));
    assert!(results.contains_key(&(true, 1)) && results.contains_key(&(true, 3)));
}

/// Two threads reap, while a third one uses what it finds. A region is
/// deregistered once, and never while it is in use.
#[test]
fn reaping() {
    let results = explore("reaping", Some(2), || {
        let mut shared = Shared::new();
        StdArc::get_mut(&mut shared).unwrap().entries.clear();
        let user = spawn(&shared, |shared| {
            let found = shared.cache.try_lookup(&range(0));
            found.is_some_and(|entry| {
                let notifiers = lock(&shared.cache.backend.notifiers);
                let mut registered = notifiers.iter().map(|(_, cookie)| *cookie);
                assert!(registered.any(|cookie| cookie == entry.cookie));
                true
            })
        });
        let reapers = [1, 0].map(|changes| {
            spawn(&shared, move |shared| {
                (0..changes).for_each(|_| shared.cache.backend.remap(0));
                drain(&shared.cache);
                shared.cache.reap().unwrap().regions
            })
        });
        let reaped = reapers.map(|reaper| reaper.join().unwrap());
        let found = user.join().unwrap();
        let rest = shared.cache.reap().unwrap().regions;
        assert_eq!(reaped.iter().sum::<u64>() + rest, 1);
        assert_eq!(shared.cache.lock().objects.len(), 1, "of the other page");
        (found, reaped)
    });
    let expected = [
        (false, [0, 1]),
        (false, [1, 0]),
        (true, [0, 0]),
        (true, [0, 1]),
        (true, [1, 0]),
    ];
    assert_eq!(results.into_keys().collect::<Vec<_>>(), expected);
}

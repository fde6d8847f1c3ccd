// SPDX-License-Identifier: GPL-2.0
//! A registration cache that never hands out a stale registration.
//!
//! It shows what a communication library has to do, and each rule is there
//! because leaving it out corrupts data:
//!
//! 1. Before REG_MR is called, the cookie already resolves to the object that
//!    carries the stale flag: events may be read before REG_MR returns.
//! 2. A lookup loads the generation, with acquire order. If that is not the
//!    `applied` one, events are read until `EAGAIN`, the objects of their cookies
//!    are marked stale, and then `applied` becomes the larger of the loaded
//!    generation and the newest event's. A count says only how many events were
//!    copied: fewer than there is room for does not mean that none is left.
//! 3. Reading, marking and publishing `applied` are one critical section, under
//!    the *drain lock*. Without the lock, an event that another thread has read
//!    but not marked yet would be taken for applied.
//! 4. Only then it finds the entry and tests its flag. A new entry's flag is
//!    tested in the same way when it is inserted.
//! 5. Deregistration needs neither the drain lock nor a wait for the reader. It
//!    returns how many events of the region were read. A reader still holds those
//!    that are not marked yet, and the object stays until all are marked.
//!
//! Either the lookup reads ([`Cache::lookup`]), or a progress thread does
//! ([`Cache::drain`]). A lookup then waits for it, or takes a miss
//! ([`Cache::try_lookup`]).
//!
//! A hit is one load and no system call. What is stale on its return became
//! so after the lookup; a program that changes the mapping of a buffer while
//! it communicates from it has no valid answer anyway.
//!
//! ```no_run
//! # fn send(addr: u64, len: u64) -> std::io::Result<()> {
//! use uverbs_mmu_notify::{Context, Pd, cache::{Cache, Verbs}};
//!
//! let context = Context::open("rxe0")?;
//! assert!(context.mmu_notify_supported()?);
//! // SAFETY: No reference points to the buffers that are sent.
//! let cache = Cache::new(unsafe { Verbs::new(&Pd::alloc(&context)?) }?);
//!
//! let entry = cache.get(addr..addr + len)?; // nearly always a hit
//! let rkey = entry.mr().rkey(); // good for as long as `entry` is held
//! # let _ = rkey;
//! drop(entry);
//! cache.reap()?; // now and then
//! # Ok(())
//! # }
//! ```

mod verbs;

pub use verbs::Verbs;

use crate::queue::Event;
#[cfg(not(test))]
use std::sync;
use std::{
    collections::{BTreeMap, HashMap},
    io,
    ops::Range,
    sync::PoisonError,
};
use sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
#[cfg(test)]
use tests::sync;

const BATCH: usize = 64;
/// A registration may itself change the mapping, by breaking the sharing of a
/// page; the next one then finds nothing left to change.
const ATTEMPTS: usize = 4;

/// What the cache needs of the kernel; [`Verbs`] is the real one.
pub trait Backend {
    /// A registered region.
    type Mr;
    /// Loads the generation with acquire order.
    fn generation(&self) -> u64;
    /// Reads events without waiting and returns how many. Only `EAGAIN`
    /// (`WouldBlock`) says that none is left.
    fn read(&self, events: &mut [Event]) -> io::Result<usize>;
    /// Registers the region of these addresses (the end is exclusive), watched.
    fn register(&self, range: &Range<u64>, cookie: u64) -> io::Result<Self::Mr>;
    /// Deregisters and returns how many of its events were read, modulo 2^32.
    /// After an error the region is still registered.
    fn deregister(&self, mr: &mut Self::Mr) -> io::Result<u32>;
}

/// A cached registration. Its holder may use the region.
#[derive(Debug)]
pub struct Entry<M> {
    range: Range<u64>,
    mr: M,
    cookie: u64,
    stale: Arc<AtomicBool>,
}

impl<M> Entry<M> {
    /// The region.
    pub fn mr(&self) -> &M {
        &self.mr
    }

    /// Its addresses; the end is exclusive.
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// What its events carry.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    fn key(&self) -> (u64, u64) {
        (self.range.start, self.range.end)
    }

    fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Acquire)
    }
}

/// What a cookie resolves to.
struct Object {
    stale: Arc<AtomicBool>,
    /// Events seen, modulo 2^32 as the kernel counts.
    seen: u32,
    /// The final number of events, once the region is deregistered.
    reported: Option<u32>,
}

struct State<M> {
    objects: HashMap<u64, Object>,
    last_cookie: u64,
    live: BTreeMap<(u64, u64), Arc<Entry<M>>>,
    /// No longer found, but still registered, because somebody may use them.
    retired: Vec<Arc<Entry<M>>>,
}

/// What [`Cache::reap`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reaped {
    /// Regions deregistered.
    pub regions: u64,
    /// The events that were read of them, as the kernel counted.
    pub events: u64,
}

/// A registration cache, for any number of threads. Nothing else may read its
/// queue.
pub struct Cache<B: Backend> {
    backend: B,
    /// Taken before the lock of `state`, and held while events are read, so that
    /// only readers wait for the kernel.
    drain_lock: Mutex<()>,
    /// The generation up to which all events are marked; stored by the reader.
    applied: AtomicU64,
    state: Mutex<State<B::Mr>>,
}

impl<B: Backend> Cache<B> {
    /// An empty cache.
    pub fn new(backend: B) -> Self {
        Self {
            backend,
            drain_lock: Mutex::new(()),
            applied: AtomicU64::new(0),
            state: Mutex::new(State {
                objects: HashMap::new(),
                last_cookie: 0,
                live: BTreeMap::new(),
                retired: Vec::new(),
            }),
        }
    }

    /// What it was made with.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The registration that covers `range`, from the cache or a new one. Fails
    /// as REG_MR and read() do, and with `EAGAIN` if the mapping was changed
    /// during each of several registrations.
    pub fn get(&self, range: Range<u64>) -> io::Result<Arc<Entry<B::Mr>>> {
        if let Some(entry) = self.lookup(&range)? {
            return Ok(entry);
        }
        for _ in 0..ATTEMPTS {
            if let Some(entry) = self.insert(&range)? {
                return Ok(entry);
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// The cached registration that covers `range`, after the pending events
    /// have been applied. Of several that begin at or before it, only the one
    /// that begins last is considered.
    ///
    /// Fails as read() does: `EIO` if the device is gone. No entry can be
    /// trusted then.
    pub fn lookup(&self, range: &Range<u64>) -> io::Result<Option<Arc<Entry<B::Mr>>>> {
        self.drain()?;
        Ok(self.lock().find(range))
    }

    /// As [`Cache::lookup`], but takes a miss while events wait to be applied,
    /// which is for a progress thread to do. Makes no system call.
    pub fn try_lookup(&self, range: &Range<u64>) -> Option<Arc<Entry<B::Mr>>> {
        self.is_applied().then(|| self.lock().find(range)).flatten()
    }

    /// Reads and applies all pending events. A progress thread calls it when
    /// poll() says that there are some; it fails as [`Cache::lookup`] does.
    pub fn drain(&self) -> io::Result<()> {
        if self.is_applied() {
            return Ok(());
        }
        let _draining = lock(&self.drain_lock);
        // What is queued later may be missed below, and is not applied then.
        let mut newest = self.backend.generation();
        if newest == self.applied.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut events = [Event::default(); BATCH];
        loop {
            let count = match self.backend.read(&mut events) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                result => result?,
            };
            let mut state = self.lock();
            for event in &events[..count] {
                state.mark(event.cookie);
                newest = newest.max(event.generation);
            }
        }
        self.applied.store(newest, Ordering::Release);
        Ok(())
    }

    /// Whether `entry` would be found now. Takes no lock, and may deny it for
    /// one that would, never the reverse: a `false` calls for a lookup.
    pub fn is_current(&self, entry: &Entry<B::Mr>) -> bool {
        self.is_applied() && !entry.is_stale()
    }

    /// Whether all events up to now are marked.
    fn is_applied(&self) -> bool {
        self.backend.generation() == self.applied.load(Ordering::Acquire)
    }

    /// Takes `entry` out of the cache, as if it were stale.
    pub fn retire(&self, entry: &Entry<B::Mr>) {
        entry.stale.store(true, Ordering::Release);
    }

    /// Deregisters what is stale and not in use. It makes system calls, so its
    /// place is where one is made anyway, after a miss for example.
    ///
    /// All are tried, and the first error is returned; what failed is tried
    /// again next time.
    pub fn reap(&self) -> io::Result<Reaped> {
        let mut reaped = Reaped::default();
        let mut result = Ok(());
        let unused = self.lock().take_unused();
        for mut entry in unused {
            let only = Arc::get_mut(&mut entry).expect("it is retired and not in use");
            match self.backend.deregister(&mut only.mr) {
                Ok(reported) => {
                    self.lock().settle(entry.cookie, reported);
                    reaped.regions += 1;
                    reaped.events += u64::from(reported);
                }
                Err(e) => {
                    self.lock().retired.push(entry);
                    result = result.and(Err(e));
                }
            }
        }
        result.map(|()| reaped)
    }

    /// Registers `range`; `None` if the result was stale from the beginning.
    fn insert(&self, range: &Range<u64>) -> io::Result<Option<Arc<Entry<B::Mr>>>> {
        let (cookie, stale) = self.lock().new_object();
        let mr = self.backend.register(range, cookie).inspect_err(|_| {
            // Nothing is ever delivered for a registration that failed.
            self.lock().objects.remove(&cookie);
        })?;
        let entry = Arc::new(Entry {
            range: range.clone(),
            mr,
            cookie,
            stale,
        });

        let drained = self.drain();
        let mut state = self.lock();
        if drained.is_err() || entry.is_stale() {
            state.retired.push(entry);
            return drained.map(|()| None);
        }
        // Another thread may have registered the same: its users keep it.
        let other = state.live.insert(entry.key(), entry.clone());
        state.retired.extend(other);
        Ok(Some(entry))
    }

    fn lock(&self) -> MutexGuard<'_, State<B::Mr>> {
        lock(&self.state)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<M> State<M> {
    fn new_object(&mut self) -> (u64, Arc<AtomicBool>) {
        self.last_cookie += 1;
        let stale = Arc::new(AtomicBool::new(false));
        let object = Object {
            stale: stale.clone(),
            seen: 0,
            reported: None,
        };
        self.objects.insert(self.last_cookie, object);
        (self.last_cookie, stale)
    }

    fn mark(&mut self, cookie: u64) {
        let object = self.objects.get_mut(&cookie);
        debug_assert!(object.is_some(), "an event of an object that is gone");
        if let Some(object) = object {
            object.stale.store(true, Ordering::Release);
            object.seen = object.seen.wrapping_add(1);
            self.drop_if_settled(cookie);
        }
    }

    fn settle(&mut self, cookie: u64, reported: u32) {
        if let Some(object) = self.objects.get_mut(&cookie) {
            object.reported = Some(reported);
            self.drop_if_settled(cookie);
        }
    }

    fn drop_if_settled(&mut self, cookie: u64) {
        let object = &self.objects[&cookie];
        if object.reported == Some(object.seen) {
            self.objects.remove(&cookie);
        }
    }

    fn find(&mut self, range: &Range<u64>) -> Option<Arc<Entry<M>>> {
        loop {
            let mut before = self.live.range(..=(range.start, u64::MAX));
            let (&key, entry) = before.next_back()?;
            if !entry.is_stale() {
                return (range.end <= entry.range.end).then(|| entry.clone());
            }
            let stale = self.live.remove(&key);
            self.retired.extend(stale);
        }
    }

    fn take_unused(&mut self) -> Vec<Arc<Entry<M>>> {
        let stale = self.live.extract_if(.., |_, entry| entry.is_stale());
        self.retired.extend(stale.map(|(_, entry)| entry));
        self.retired
            .extract_if(.., |entry| Arc::get_mut(entry).is_some())
            .collect()
    }
}

#[cfg(test)]
mod tests;

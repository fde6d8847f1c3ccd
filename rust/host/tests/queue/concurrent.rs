// SPDX-License-Identifier: GPL-2.0

//! Concurrent operations, in every order that matters.
//!
//! Each model states its possible results, so that it cannot pass by not reaching the interesting
//! states. A lost wake-up ends a model in a deadlock, which loom reports.

use crate::{
    Generation,
    queue::{self, Buffer, Queue, Watch},
    state::Record, //
};
use kernel::{
    bindings::{POLLERR, POLLIN, POLLRDNORM},
    check,
    fs::File,
    mm::{
        MmWithUser,
        interval_notifier::{Event, Registration}, //
    },
    prelude::*,
    sync::{
        Arc,
        atomic::{self, Atomic},
        poll::{PollTable, Poller}, //
    },
};
use loom::{
    sync::atomic::{
        AtomicBool,
        AtomicUsize,
        Ordering::{Relaxed, SeqCst}, //
    },
    thread::{self, JoinHandle}, //
};
use std::{collections::BTreeSet, ops::Range, sync};

const PAGE: usize = 4096;
/// MRs of two pages, whose cookies are their indices.
const MRS: [Range<usize>; 3] = [2 * PAGE..4 * PAGE, 6 * PAGE..8 * PAGE, 10 * PAGE..12 * PAGE];

const READABLE: u32 = POLLIN | POLLRDNORM;

fn first_page(mr: usize) -> Range<usize> {
    MRS[mr].start..MRS[mr].start + PAGE
}

fn last_page(mr: usize) -> Range<usize> {
    MRS[mr].end - PAGE..MRS[mr].end
}

/// What the threads of a model have in common. No operation of loom is spent on sharing it.
struct Setup {
    mm: MmWithUser,
    queue: Arc<Queue>,
    generation: Generation,
}

impl Setup {
    fn new() -> sync::Arc<Self> {
        let mm = MmWithUser::new();
        let queue = Queue::new(&mm).unwrap();

        sync::Arc::new(Self {
            generation: Generation::new(&queue),
            queue,
            mm,
        })
    }

    fn try_start(&self, mr: usize) -> Result<Registration<Watch>> {
        Watch::start(
            self.queue.as_arc_borrow(),
            &self.mm,
            MRS[mr].clone(),
            mr as u64,
        )
    }

    fn start(&self, mr: usize) -> Registration<Watch> {
        self.try_start(mr).unwrap()
    }

    fn live(&self, mr: usize) -> Registration<Watch> {
        let watch = self.start(mr);

        go_live(&watch);
        watch
    }

    fn unmap(&self, range: Range<usize>) {
        self.mm.invalidate(Event::UNMAP, range, || ());
    }

    fn unmap_mr(&self, mr: usize) {
        self.unmap(MRS[mr].clone());
    }

    fn read(&self, max: usize, nonblock: bool) -> (Result<usize>, Vec<Record>) {
        let mut sink = Sink::default();

        (self.queue.read(max, nonblock, &mut sink), sink.records)
    }

    /// Reads until `EAGAIN`, as the contract demands.
    fn drain(&self) -> Vec<Record> {
        self.drain_to(Sink::default())
    }

    fn drain_to(&self, mut sink: Sink) -> Vec<Record> {
        while let Ok(count) = self.queue.read(usize::MAX, true, &mut sink) {
            assert_ne!(count, 0);
        }
        sink.records
    }
}

fn go_live(watch: &Registration<Watch>) {
    watch.object().as_arc_borrow().go_live();
}

fn spawn<R: Send + 'static>(
    setup: &sync::Arc<Setup>,
    f: impl FnOnce(&Setup) -> R + Send + 'static,
) -> JoinHandle<R> {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let setup = setup.clone();

    // Unlike that of `std`, the function of loom does not ask for it.
    thread::spawn(is_send(move || f(&setup)))
}

/// What a buffer does when it is to be faulted in.
#[derive(Default)]
enum Fault {
    #[default]
    None,
    /// Lets the next copy succeed.
    Once,
    /// Lets the next copy succeed, of one event.
    Part,
    Always(Error),
    /// Does not return until the flag is set.
    Until(sync::Arc<Flag>),
}

/// Userspace's buffer, and its thread.
#[derive(Default)]
struct Sink {
    records: Vec<Record>,
    fault: Fault,
    /// Cookies below this must not come again.
    stopped: Option<sync::Arc<AtomicUsize>>,
}

impl Buffer for Sink {
    fn copy(&mut self, records: &[Record]) -> Result {
        assert!(check::in_atomic());
        if !matches!(self.fault, Fault::None) {
            return Err(EFAULT);
        }
        let stopped = self
            .stopped
            .as_ref()
            .map_or(0, |stopped| stopped.load(SeqCst));

        assert!(records.iter().all(|record| record.cookie >= stopped as u64));
        assert!(
            records
                .iter()
                .all(|record| record.reasons != 0 && record.start < record.end)
        );
        self.records.extend(records);
        Ok(())
    }

    fn fault_in(&mut self, count: usize) -> Result<usize> {
        check::might_sleep_long();
        match &self.fault {
            Fault::Always(error) => return Err(*error),
            Fault::Until(flag) => flag.wait(),
            Fault::None | Fault::Once | Fault::Part => (),
        }
        match core::mem::take(&mut self.fault) {
            Fault::Part => Ok(1),
            _ => Ok(count),
        }
    }

    fn interrupted(&self) -> bool {
        check::might_sleep_long();
        false
    }
}

/// Something to wait for.
struct Flag {
    set: loom::sync::Mutex<bool>,
    changed: loom::sync::Condvar,
}

impl Flag {
    fn new() -> sync::Arc<Self> {
        sync::Arc::new(Self {
            set: loom::sync::Mutex::new(false),
            changed: loom::sync::Condvar::new(),
        })
    }

    fn set(&self) {
        *self.set.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut set = self.set.lock().unwrap();

        while !*set {
            set = self.changed.wait(set).unwrap();
        }
    }
}

/// Returns the smallest span that covers those of all `records`.
fn covered(records: &[Record]) -> Range<usize> {
    let start = records.iter().map(|record| record.start).min().unwrap();
    let end = records.iter().map(|record| record.end).max().unwrap();

    start as usize..end as usize
}

/// G5: the count of a deregistration is that of the events copied out, none of them later.
/// G4: a fault loses nothing.
fn stop_counts(faults: bool) {
    let results = check::model_twice(4, move || {
        let setup = Setup::new();
        let watch = setup.live(0);
        let stopped = sync::Arc::new(AtomicUsize::new(0));
        let unmap = spawn(&setup, |setup| setup.unmap_mr(0));
        let mut sink = Sink {
            fault: if faults { Fault::Once } else { Fault::None },
            stopped: Some(stopped.clone()),
            ..Sink::default()
        };
        let read = spawn(&setup, move |setup| {
            let result = setup.queue.read(4, true, &mut sink);

            (result, sink.records)
        });
        let count = queue::stop(watch);

        stopped.store(1, SeqCst);
        unmap.join().unwrap();
        let (result, records) = read.join().unwrap();

        assert_eq!(records.len(), count as usize);
        assert_eq!(result, if count == 0 { Err(EAGAIN) } else { Ok(1) });
        assert_eq!(setup.drain(), []);
        assert_eq!(setup.queue.poll(&File, PollTable::NULL), 0);
        count
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

#[test]
fn invalidate_read_stop() {
    stop_counts(false);
}

#[test]
fn invalidate_faulting_read_stop() {
    stop_counts(true);
}

/// G5: the count is modulo 2^32.
#[test]
fn count_wraps() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watch = setup.live(0);

        watch.object().set_delivered(u32::MAX);

        let unmap = spawn(&setup, |setup| setup.unmap_mr(0));
        let events = setup.drain().len();
        let count = queue::stop(watch);

        unmap.join().unwrap();
        assert_eq!(count, if events == 0 { u32::MAX } else { 0 });
        events
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// G1, G4: whatever merges, every page that changed is in an event.
/// G2: the generation advances once per event, which has its value.
fn invalidations_merge(preemptions: usize, fault: fn() -> Fault) {
    let results = check::model(Some(preemptions), move || {
        let setup = Setup::new();
        let watch = setup.live(0);
        let unmaps =
            [first_page, last_page].map(|page| spawn(&setup, move |setup| setup.unmap(page(0))));
        let mut sink = Sink {
            fault: fault(),
            ..Sink::default()
        };
        let result = setup.queue.read(4, true, &mut sink);
        let mut records = sink.records;

        assert_eq!(
            result,
            if records.is_empty() {
                Err(EAGAIN)
            } else {
                Ok(records.len())
            }
        );
        assert!(setup.generation.load() >= records.len() as u64);
        unmaps.into_iter().for_each(|unmap| unmap.join().unwrap());
        records.extend(setup.drain());

        let generations = records.iter().map(|record| record.generation);

        assert!(generations.eq(1..=records.len() as u64));
        assert_eq!(setup.generation.load(), records.len() as u64);
        assert_eq!(covered(&records), MRS[0]);
        assert_eq!(queue::stop(watch) as usize, records.len());
        records.len()
    });

    assert_eq!(results, BTreeSet::from([1, 2]));
}

#[test]
fn invalidate_invalidate_read() {
    invalidations_merge(4, || Fault::None);
}

#[test]
fn invalidate_invalidate_faulting_read() {
    invalidations_merge(4, || Fault::Once);
}

/// What a cache in userspace does: the reader publishes, lookups compare.
struct Cache {
    stale: AtomicBool,
    applied: Atomic<u64>,
}

impl Cache {
    fn new() -> Self {
        Self {
            stale: AtomicBool::new(false),
            applied: Atomic::new(0),
        }
    }

    /// Reads until `EAGAIN`, marks, publishes: as the only reader.
    fn apply(&self, setup: &Setup, fault: Fault) -> usize {
        let generation = setup.generation.load();

        if generation == self.applied.load(atomic::Relaxed) {
            return 0;
        }
        let records = setup.drain_to(Sink {
            fault,
            ..Sink::default()
        });
        let newest = records.last().map_or(0, |record| record.generation);

        for _ in &records {
            self.stale.store(true, Relaxed);
        }
        self.applied.store(generation.max(newest), atomic::Release);
        records.len()
    }

    /// Returns whether a lookup finds an entry that it takes for good.
    fn hits(&self, setup: &Setup) -> bool {
        let generation = setup.generation.load();

        generation == self.applied.load(atomic::Acquire) && !self.stale.load(Relaxed)
    }
}

/// G2: after an invalidation has returned, a lookup finds the generation ahead of what the reader
/// has applied, or the entry stale. This also holds for an invalidation that merges.
///
/// The second invalidation is the `last` one: of pages that the first one covers, or not.
fn no_stale_hit(last: fn() -> Range<usize>, fault: fn() -> Fault, born_stale: bool) {
    let results = check::model(Some(3), move || {
        let setup = Setup::new();
        let cache = sync::Arc::new(Cache::new());
        let watch = setup.start(0);

        if !born_stale {
            go_live(&watch);
        }
        let other = spawn(&setup, |setup| setup.unmap(first_page(0)));
        let read = {
            let cache = cache.clone();

            spawn(&setup, move |setup| cache.apply(setup, fault()))
        };

        if born_stale {
            go_live(&watch);
        }
        setup.unmap(last());
        assert!(!cache.hits(&setup), "a stale entry is used");
        other.join().unwrap();
        assert!(!cache.hits(&setup), "a stale entry is used");

        let read = read.join().unwrap();
        let merged = setup.generation.load() == 1;
        let rest = setup.drain().len();

        assert_eq!(queue::stop(watch) as usize, read + rest);
        (read, merged)
    });

    assert_eq!(
        results,
        BTreeSet::from([(0, true), (1, false), (1, true), (2, false)])
    );
}

#[test]
fn no_stale_hit_after_covered_invalidation() {
    no_stale_hit(|| first_page(0), || Fault::None, false);
}

#[test]
fn no_stale_hit_after_fault() {
    no_stale_hit(|| first_page(0), || Fault::Once, false);
}

#[test]
fn no_stale_hit_after_merged_invalidation() {
    no_stale_hit(|| last_page(0), || Fault::None, false);
}

#[test]
fn no_stale_hit_if_born_stale() {
    no_stale_hit(|| last_page(0), || Fault::None, true);
}

/// G2: `EAGAIN`, which takes no lock, is only returned after all events up to a generation that the
/// reader has seen.
#[test]
fn generation_leads_to_event() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];
        let unmaps = spawn(&setup, |setup| {
            setup.unmap_mr(0);
            setup.unmap_mr(1);
        });
        let seen = setup.generation.load() as usize;
        let records = setup.drain();

        assert!(records.len() >= seen);
        for (i, record) in records.iter().enumerate() {
            assert_eq!((record.cookie, record.generation), (i as u64, i as u64 + 1));
        }
        unmaps.join().unwrap();
        assert_eq!(setup.drain().len() + records.len(), 2);
        assert_eq!(watches.map(queue::stop), [1, 1]);
        seen
    });

    assert_eq!(results, BTreeSet::from([0, 1, 2]));
}

/// An event wakes a blocked reader.
#[test]
fn event_wakes_reader() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watch = setup.live(0);
        let read = spawn(&setup, |setup| setup.read(4, false));

        setup.unmap_mr(0);

        let (result, records) = read.join().unwrap();

        assert_eq!(result, Ok(1));
        assert_eq!(records[0].generation, 1);
        assert_eq!(queue::stop(watch), 1);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// Two blocked readers get an event each, though the second event may wake nobody.
#[test]
fn events_wake_readers() {
    let results = check::model(Some(3), || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];
        let reads = [0, 1].map(|_| spawn(&setup, |setup| setup.read(1, false)));

        setup.unmap(0..usize::MAX);

        let mut cookies = reads.map(|read| read.join().unwrap().1[0].cookie);

        cookies.sort_unstable();
        assert_eq!(cookies, [0, 1]);
        assert_eq!(watches.map(queue::stop), [1, 1]);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1, 2, 3]));
}

/// Of two readers, `first` may fail when it is woken. Then the other one gets the event.
///
/// Returns the results of `first`.
fn failing_reader(
    first: impl Fn(&Setup) -> Result<usize> + Copy + Send + Sync + 'static,
) -> BTreeSet<Option<Error>> {
    check::model(Some(3), move || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];
        let delivered = Flag::new();
        let read = |read: &dyn Fn(&Setup) -> Result<usize>, setup: &Setup, delivered: &Flag| {
            let result = read(setup);

            if result.is_ok() {
                delivered.set();
            }
            result
        };
        let first = {
            let delivered = delivered.clone();

            spawn(&setup, move |setup| read(&first, setup, &delivered))
        };
        let other = {
            let delivered = delivered.clone();

            spawn(&setup, move |setup| {
                read(&|setup| setup.read(1, false).0, setup, &delivered)
            })
        };

        setup.unmap_mr(0);
        delivered.wait();
        // For the one that has got nothing.
        setup.unmap_mr(1);

        let first = first.join().unwrap();

        assert_eq!(other.join().unwrap(), Ok(1));
        assert_eq!(setup.drain().len(), usize::from(first.is_err()));
        assert_eq!(watches.map(queue::stop), [1, 1]);
        first.err()
    })
}

/// A reader that is killed after it was woken passes the event on.
#[test]
fn killed_reader_passes_on() {
    let results = failing_reader(|setup| {
        check::kill_on_wakeup();
        setup.read(1, false).0
    });

    assert_eq!(
        results,
        BTreeSet::from([None, Some(EINTR), Some(ERESTARTSYS)])
    );
}

/// A reader whose buffer cannot be written to passes the event on.
#[test]
fn faulting_reader_passes_on() {
    let results = failing_reader(|setup| {
        let mut sink = Sink {
            fault: Fault::Always(EFAULT),
            ..Sink::default()
        };

        setup.queue.read(1, false, &mut sink)
    });

    assert_eq!(results, BTreeSet::from([Some(EFAULT)]));
}

/// A signal ends a blocked read, but loses no event, and no wake-up of another reader.
#[test]
fn interrupted_reader_passes_on() {
    let results = check::model(Some(3), || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];
        let read = spawn(&setup, |setup| setup.read(1, false));
        let other = spawn(&setup, |setup| setup.read(1, false));
        let reader = read.thread().id();
        let signal = thread::spawn(move || check::set_signal_pending(reader, true));

        setup.unmap_mr(0);
        signal.join().unwrap();

        let (result, _) = read.join().unwrap();

        if result.is_ok() {
            setup.unmap_mr(1);
        }
        assert_eq!(other.join().unwrap().0, Ok(1));
        assert_eq!(watches.map(queue::stop), [1, u32::from(result.is_ok())]);
        result.err()
    });

    assert_eq!(results, BTreeSet::from([None, Some(ERESTARTSYS)]));
}

/// G6: while a reader faults in its buffer, which can take for ever, another one gets the event.
#[test]
fn stuck_reader_delays_nobody() {
    let results = check::model(Some(3), || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];
        let done = Flag::new();
        let stuck = {
            let done = done.clone();

            spawn(&setup, move |setup| {
                let mut sink = Sink {
                    fault: Fault::Until(done),
                    ..Sink::default()
                };

                setup.queue.read(1, false, &mut sink)
            })
        };
        let other = spawn(&setup, |setup| setup.read(1, false));

        setup.unmap_mr(0);
        assert_eq!(other.join().unwrap().0, Ok(1));
        setup.unmap_mr(1);
        done.set();
        assert_eq!(stuck.join().unwrap(), Ok(1));
        assert_eq!(watches.map(queue::stop), [1, 1]);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1, 2]));
}

/// G4: concurrent readers share the events, each in order.
#[test]
fn readers_share() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];

        setup.unmap_mr(0);
        setup.unmap_mr(1);

        let read = spawn(&setup, |setup| setup.drain());
        let mut records = setup.drain();
        let seen = records.len();
        let others = read.join().unwrap();

        for records in [&records, &others] {
            assert!(records.is_sorted_by_key(|record| record.generation));
        }
        records.extend(others);
        records.sort_unstable_by_key(|record| record.generation);

        let cookies = records.iter().map(|record| record.cookie);

        assert!(cookies.eq([0, 1]));
        assert_eq!(watches.map(queue::stop), [1, 1]);
        seen
    });

    assert_eq!(results, BTreeSet::from([0, 2]));
}

/// Polls as poll() does: registers, tests, and sleeps until a wake-up to test again.
fn poll(setup: &Setup) -> u32 {
    let poller = Poller::default();
    let mut mask = setup.queue.poll(&File, poller.table());

    if mask == 0 {
        poller.wait();
        mask = setup.queue.poll(&File, PollTable::NULL);
    }
    mask
}

#[test]
fn event_wakes_poller() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watch = setup.live(0);
        let polled = spawn(&setup, poll);

        setup.unmap_mr(0);
        assert_eq!(polled.join().unwrap(), READABLE);
        assert_eq!(setup.drain().len(), 1);
        assert_eq!(queue::stop(watch), 1);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// One event wakes a poller as well as a blocked reader.
#[test]
fn event_wakes_poller_and_reader() {
    check::model_twice(3, || {
        let setup = Setup::new();
        let watch = setup.live(0);
        let polled = spawn(&setup, |setup| {
            let poller = Poller::default();

            // The reader may be faster.
            if setup.queue.poll(&File, poller.table()) == 0 && setup.generation.load() == 0 {
                poller.wait();
            }
        });
        let read = spawn(&setup, |setup| setup.read(1, false).0);

        setup.unmap_mr(0);
        assert_eq!(read.join().unwrap(), Ok(1));
        polled.join().unwrap();
        assert_eq!(queue::stop(watch), 1);
    });
}

/// After a drain until `EAGAIN` the next event wakes a poller: epoll's edge.
#[test]
fn event_after_drain_wakes_poller() {
    let results = check::model_twice(3, || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];
        let edge = spawn(&setup, |setup| {
            let poller = Poller::default();
            let mut seen = 0;

            setup.queue.poll(&File, poller.table());
            loop {
                seen += setup.drain().len();
                if seen == 2 {
                    return;
                }
                poller.wait();
            }
        });

        setup.unmap_mr(0);
        setup.unmap_mr(1);
        edge.join().unwrap();
        assert_eq!(watches.map(queue::stop), [1, 1]);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1, 2, 3]));
}

/// A stop that empties the queue does not take the edge, or the wake-up, of a later event.
#[test]
fn event_after_stop_wakes_reader() {
    let results = check::model(Some(2), || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];
        let reads = [0, 1].map(|_| spawn(&setup, |setup| setup.read(1, false).0));

        setup.unmap_mr(0);

        let [first, second] = watches;
        let count = queue::stop(first);

        setup.unmap_mr(1);
        if count == 0 {
            // Only one of them has got an event.
            setup.queue.close();
        }
        let mut results = reads.map(|read| read.join().unwrap());

        results.sort_unstable_by_key(Result::is_err);
        if count == 1 {
            assert_eq!(results, [Ok(1), Ok(1)]);
        } else {
            assert!(results == [Ok(1), Err(EIO)] || results == [Err(EIO), Err(EIO)]);
        }
        (count, queue::stop(second))
    });

    assert_eq!(results, BTreeSet::from([(0, 0), (0, 1), (1, 1)]));
}

#[test]
fn close_ends_readers_and_poller() {
    check::model(Some(3), || {
        let setup = Setup::new();
        let reads = [0, 1].map(|_| spawn(&setup, |setup| setup.read(4, false).0));
        let polled = spawn(&setup, poll);

        setup.queue.close();
        assert_eq!(reads.map(|read| read.join().unwrap()), [Err(EIO); 2]);
        assert_eq!(polled.join().unwrap(), POLLERR);
        assert_eq!(setup.generation.load(), 1);
    });
}

/// G8: after a close there is no delivery. G5: what was delivered before is counted.
#[test]
fn close_invalidate_read() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watch = setup.live(0);
        let unmap = spawn(&setup, |setup| setup.unmap_mr(0));
        let read = spawn(&setup, |setup| setup.read(4, true));

        setup.queue.close();

        let at_close = setup.generation.load();

        assert_eq!(setup.read(4, true), (Err(EIO), Vec::new()));
        unmap.join().unwrap();
        assert_eq!(setup.generation.load(), at_close);

        let count = queue::stop(watch);

        assert_eq!(read.join().unwrap().1.len(), count as usize);
        assert_eq!(setup.queue.poll(&File, PollTable::NULL), POLLERR);
        count
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// G8: a watch that goes live while its queue is closed queues its event before or not at all.
#[test]
fn close_go_live() {
    let results = check::model_twice(4, || {
        let setup = Setup::new();
        let watch = setup.start(0);
        let polled = spawn(&setup, poll);

        setup.unmap_mr(0);

        let close = spawn(&setup, |setup| setup.queue.close());

        go_live(&watch);
        close.join().unwrap();
        assert!(matches!(polled.join().unwrap(), READABLE | POLLERR));
        assert_eq!(setup.read(4, false).0, Err(EIO));
        assert_eq!(queue::stop(watch), 0);
        assert_eq!(setup.queue.poll(&File, PollTable::NULL), POLLERR);
        setup.generation.load()
    });

    assert_eq!(results, BTreeSet::from([1, 2]));
}

/// G3: the event of an MR that is born stale wakes a blocked reader and a poller.
#[test]
fn born_stale_wakes_reader_and_poller() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watch = setup.start(0);
        let unmap = spawn(&setup, |setup| setup.unmap_mr(0));
        let polled = spawn(&setup, |setup| {
            let mask = poll(setup);

            (mask, setup.read(1, false))
        });

        go_live(&watch);
        unmap.join().unwrap();

        let (mask, (result, records)) = polled.join().unwrap();

        assert_eq!((mask, result), (READABLE, Ok(1)));
        assert_eq!(covered(&records), MRS[0]);
        assert_eq!(queue::stop(watch), 1);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

#[test]
fn born_stale_wakes_blocked_reader() {
    check::model(None, || {
        let setup = Setup::new();
        let watch = setup.start(0);
        let read = spawn(&setup, |setup| setup.read(1, false).0);

        setup.unmap_mr(0);
        assert_eq!(setup.generation.load(), 0);
        go_live(&watch);
        assert_eq!(setup.generation.load(), 1);
        assert_eq!(read.join().unwrap(), Ok(1));
        assert_eq!(queue::stop(watch), 1);
    });
}

#[derive(Clone, Copy, PartialEq)]
enum Registering {
    Succeeds,
    Fails,
}

/// G3: an MR whose pages change after they have been pinned is never live without an event.
/// If the registration fails, nothing is ever delivered.
///
/// With a `neighbour` the invalidation calls back another watch, so that the insertion of the
/// notifier is deferred until it ends.
fn registration(end: Registering, neighbour: bool) -> BTreeSet<(usize, usize, bool)> {
    check::model(None, move || {
        let setup = Setup::new();
        let pages = sync::Arc::new(AtomicUsize::new(0));
        let live = sync::Arc::new(AtomicBool::new(false));
        let other = neighbour.then(|| setup.start(1));
        let unmap = {
            let (pages, live) = (pages.clone(), live.clone());

            spawn(&setup, move |setup| {
                let was_live = live.load(SeqCst);

                setup.mm.invalidate(Event::UNMAP, 0..usize::MAX, || {
                    // G2: the generation has advanced before the change, if the MR was live.
                    assert!(!was_live || setup.generation.load() == 1);
                    pages.store(1, SeqCst);
                });
            })
        };
        let watch = setup.start(0);
        let pinned = pages.load(SeqCst);

        let events = if end == Registering::Fails {
            assert_eq!(queue::stop(watch), 0);
            unmap.join().unwrap();
            assert_eq!(setup.generation.load(), 0);
            assert_eq!(setup.drain(), []);
            0
        } else {
            go_live(&watch);
            live.store(true, SeqCst);
            unmap.join().unwrap();

            let records = setup.drain();

            assert_eq!(setup.generation.load(), records.len() as u64);
            assert!(pinned != 0 || records.len() == 1, "stale without an event");
            assert_eq!(queue::stop(watch) as usize, records.len());
            records.len()
        };

        assert_eq!(other.map_or(0, queue::stop), 0);
        (pinned, events, check::deferred() != 0)
    })
}

#[test]
fn registration_without_gap() {
    let results = registration(Registering::Succeeds, false);

    assert_eq!(
        results,
        BTreeSet::from([(0, 1, false), (1, 0, false), (1, 1, false)])
    );
}

#[test]
fn deferred_registration_without_gap() {
    let results = registration(Registering::Succeeds, true);

    assert_eq!(
        results,
        BTreeSet::from([(0, 1, false), (1, 0, false), (1, 0, true), (1, 1, false)])
    );
}

/// G3: a registration has no gap during two invalidations. One may begin while the other one runs.
#[test]
fn registration_during_two_changes() {
    let results = check::model(Some(5), || {
        let setup = Setup::new();
        let changed = sync::Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        let unmaps = [0, 1].map(|nth| {
            let changed = changed.clone();

            spawn(&setup, move |setup| {
                setup.mm.invalidate(Event::UNMAP, 0..usize::MAX, || {
                    changed[nth].store(true, SeqCst);
                });
            })
        });
        let watch = setup.start(0);
        let stale = changed.iter().any(|changed| !changed.load(SeqCst));

        go_live(&watch);
        for unmap in unmaps {
            unmap.join().unwrap();
        }

        let records = setup.drain();

        assert_eq!(setup.generation.load(), records.len() as u64);
        assert!(!stale || records.len() == 1, "stale without an event");
        assert_eq!(queue::stop(watch) as usize, records.len());
        (stale, records.len())
    });

    assert_eq!(results, BTreeSet::from([(false, 0), (false, 1), (true, 1)]));
}

#[test]
fn failed_registration_is_quiet() {
    let results = registration(Registering::Fails, false);

    assert_eq!(results, BTreeSet::from([(0, 0, false), (1, 0, false)]));
}

#[test]
fn failed_deferred_registration_is_quiet() {
    let results = registration(Registering::Fails, true);

    assert_eq!(
        results,
        BTreeSet::from([(0, 0, false), (1, 0, false), (1, 0, true)])
    );
}

/// G8: a watch that is dropped while invalidations run has no event left.
#[test]
fn drop_while_invalidations_run() {
    let results = check::model(Some(4), || {
        let setup = Setup::new();
        let other = setup.start(1);
        let unmap = spawn(&setup, |setup| setup.unmap(0..usize::MAX));
        let (queue, mm) = (setup.queue.as_arc_borrow(), &setup.mm);
        let unmap_again = spawn(&setup, |setup| setup.unmap(0..usize::MAX));
        let watch = Watch::start(queue, mm, MRS[0].clone(), 0).unwrap();

        go_live(&watch);
        drop(watch);
        unmap.join().unwrap();
        unmap_again.join().unwrap();
        assert_eq!(setup.drain(), []);
        assert_eq!(queue::stop(other), 0);
        check::deferred() != 0
    });

    assert_eq!(results, BTreeSet::from([false, true]));
}

/// Two queues are independent: one invalidation is an event for both.
#[test]
fn two_queues() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let second = Queue::new(&setup.mm).unwrap();
        let generation = Generation::new(&second);
        let watch = setup.live(0);
        let other = Watch::start(second.as_arc_borrow(), &setup.mm, MRS[0].clone(), 7).unwrap();

        go_live(&other);

        let read = spawn(&setup, |setup| setup.read(1, false));
        let unmap = spawn(&setup, |setup| setup.unmap_mr(0));

        second.close();

        let at_close = generation.load();

        unmap.join().unwrap();

        let (result, records) = read.join().unwrap();

        assert_eq!(result, Ok(1));
        assert_eq!(records[0].cookie, 0);
        assert_eq!(setup.generation.load(), 1);
        assert_eq!(generation.load(), at_close);
        assert_eq!([watch, other].map(queue::stop), [1, 0]);
        at_close
    });

    assert_eq!(results, BTreeSet::from([1, 2]));
}

/// G4, G5: of two events that are taken, one is delivered, as the buffer has no room for the other.
/// Meanwhile one watch ends. The other loses nothing.
#[test]
fn partial_fault_stop() {
    let results = check::model(Some(3), || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];

        setup.unmap(first_page(0));
        setup.unmap(first_page(1));

        let unmap = spawn(&setup, |setup| setup.unmap(last_page(1)));
        let read = spawn(&setup, |setup| {
            setup.drain_to(Sink {
                fault: Fault::Part,
                ..Sink::default()
            })
        });
        let [first, second] = watches;
        let stopped = queue::stop(first);

        unmap.join().unwrap();

        let mut records = read.join().unwrap();

        records.extend(setup.drain());
        assert!(records.is_sorted_by_key(|record| record.generation));

        let of = |cookie| move |record: &Record| record.cookie == cookie;
        let (first, rest): (Vec<_>, Vec<_>) = records.into_iter().partition(of(0));

        assert_eq!(first.len(), stopped as usize);
        assert_eq!(covered(&rest), MRS[1]);
        assert_eq!(queue::stop(second) as usize, rest.len());
        (stopped, rest.len())
    });

    assert_eq!(results, BTreeSet::from([(0, 1), (0, 2), (1, 1), (1, 2)]));
}

/// G4, G5: while the buffer of a read has room for a part of the events, the queue is closed. What
/// is copied out is counted, and nothing is later.
#[test]
fn partial_fault_close() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watches = [setup.live(0), setup.live(1)];

        setup.unmap(0..usize::MAX);

        let read = spawn(&setup, |setup| {
            let mut sink = Sink {
                fault: Fault::Part,
                ..Sink::default()
            };

            (setup.queue.read(4, true, &mut sink), sink.records)
        });

        setup.queue.close();

        let counts = watches.map(queue::stop);
        let (result, records) = read.join().unwrap();
        let cookies: Vec<_> = records.iter().map(|record| record.cookie).collect();

        assert_eq!(cookies, [0, 1][..records.len()]);
        assert_eq!(counts, [0, 1].map(|mr| cookies.contains(&mr).into()));
        assert_eq!(
            result,
            if records.is_empty() {
                Err(EIO)
            } else {
                Ok(records.len())
            }
        );
        assert_eq!(setup.read(4, true).0, Err(EIO));
        records.len()
    });

    assert_eq!(results, BTreeSet::from([0, 1, 2]));
}

/// G8: a watch that is started while its queue is closed is refused, or queues its event before the
/// close or not at all.
#[test]
fn start_close() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let close = spawn(&setup, |setup| setup.queue.close());
        let unmap = spawn(&setup, |setup| setup.unmap(first_page(0)));
        let watch = setup.try_start(0);
        let started = watch.is_ok();

        match &watch {
            Ok(watch) => go_live(watch),
            Err(error) => assert_eq!(*error, EIO),
        }
        close.join().unwrap();
        unmap.join().unwrap();

        let generation = setup.generation.load();

        setup.unmap(last_page(0));
        assert_eq!(setup.generation.load(), generation);
        assert_eq!(setup.read(4, false).0, Err(EIO));
        assert_eq!(setup.queue.poll(&File, PollTable::NULL), POLLERR);
        assert_eq!(watch.map_or(0, queue::stop), 0);
        (started, generation)
    });

    assert_eq!(results, BTreeSet::from([(false, 1), (true, 1), (true, 2)]));
}

/// G3, G5: while another MR of the same queue is deregistered, one is registered without a gap. The
/// event of the former is dropped, that of the latter is not.
#[test]
fn start_stop() {
    let results = check::model(Some(4), || {
        let setup = Setup::new();
        let other = setup.live(0);
        let changed = sync::Arc::new(AtomicBool::new(false));
        let unmap = {
            let changed = changed.clone();

            spawn(&setup, move |setup| {
                setup
                    .mm
                    .invalidate(Event::UNMAP, 0..usize::MAX, || changed.store(true, SeqCst));
            })
        };
        let stop = spawn(&setup, move |_| queue::stop(other));
        let watch = setup.start(1);
        let stale = !changed.load(SeqCst);

        go_live(&watch);
        assert_eq!(stop.join().unwrap(), 0);
        unmap.join().unwrap();

        let records = setup.drain();

        assert!(records.iter().all(|record| record.cookie == 1));
        assert!(!stale || records.len() == 1, "stale without an event");
        assert_eq!(queue::stop(watch) as usize, records.len());
        (stale, records.len())
    });

    assert_eq!(results, BTreeSet::from([(false, 0), (false, 1), (true, 1)]));
}

/// G3, G4: a registration has no gap while a read delivers one event after a partial fault, and
/// then the rest.
#[test]
fn start_with_partial_fault() {
    let results = check::model(Some(4), || {
        let setup = Setup::new();
        let others = [setup.live(0), setup.live(1)];
        let changed = sync::Arc::new(AtomicBool::new(false));

        setup.unmap(0..usize::MAX);

        let unmap = {
            let changed = changed.clone();

            spawn(&setup, move |setup| {
                setup
                    .mm
                    .invalidate(Event::UNMAP, MRS[2].clone(), || changed.store(true, SeqCst));
            })
        };
        let read = spawn(&setup, |setup| {
            let mut sink = Sink {
                fault: Fault::Part,
                ..Sink::default()
            };
            let result = setup.queue.read(4, true, &mut sink);

            (result, sink.records)
        });
        let watch = setup.start(2);
        let stale = !changed.load(SeqCst);

        go_live(&watch);
        unmap.join().unwrap();

        let (result, mut records) = read.join().unwrap();
        let at_once = result.unwrap();

        records.extend(setup.drain());
        assert!(records.is_sorted_by_key(|record| record.generation));

        let cookies: Vec<_> = records.iter().map(|record| record.cookie).collect();
        let events = cookies.len() - 2;

        assert_eq!(cookies, [0, 1, 2][..cookies.len()]);
        assert!(!stale || events == 1, "stale without an event");
        assert_eq!(others.map(queue::stop), [1, 1]);
        assert_eq!(queue::stop(watch) as usize, events);
        (stale, events, at_once)
    });

    assert_eq!(
        results,
        BTreeSet::from([
            (false, 0, 2),
            (false, 1, 2),
            (false, 1, 3),
            (true, 1, 2),
            (true, 1, 3)
        ])
    );
}

/// G5, G8: the page is freed while a reader takes an event, or sleeps.
#[test]
fn read_release() {
    let results = check::model(None, || {
        let setup = Setup::new();
        let watch = setup.live(0);

        setup.unmap_mr(0);

        let read = spawn(&setup, |setup| {
            let (result, records) = setup.read(4, false);

            if result == Ok(1) {
                assert_eq!(setup.read(4, false).0, Err(EIO));
            } else {
                assert_eq!(result, Err(EIO));
            }
            records.len()
        });

        setup.queue.release();
        setup.queue.with_page(|page| assert!(page.is_none()));
        setup.unmap_mr(0);

        let events = read.join().unwrap();

        assert_eq!(queue::stop(watch) as usize, events);
        events
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// What happens in [`all_at_once`] besides an invalidation, a read and a stop.
#[derive(Clone, Copy, PartialEq)]
enum Besides {
    GoLiveAndClose,
    GoLiveAndInvalidate,
    InvalidateAndClose,
}

/// G4, G5, G8: an invalidation, a read whose buffer has room for a part only, the end of a watch,
/// and two of these: another invalidation, a close, the end of a registration. Each is a thread of
/// its own; loom has no more than five. Each two of the six are threads of one of the models.
fn all_at_once(besides: Besides) -> BTreeSet<[u32; 2]> {
    check::model(Some(2), move || {
        let setup = Setup::new();
        let watch = setup.live(0);
        let registering = setup.start(1);
        let unmap = spawn(&setup, |setup| setup.unmap(0..usize::MAX));
        let read = spawn(&setup, |setup| {
            setup.drain_to(Sink {
                fault: Fault::Part,
                ..Sink::default()
            })
        });

        if besides == Besides::InvalidateAndClose {
            go_live(&registering);
        }

        let first_besides = spawn(&setup, move |setup| {
            if besides == Besides::InvalidateAndClose {
                setup.unmap_mr(1);
            } else {
                go_live(&registering);
            }
            registering
        });
        let second_besides = spawn(&setup, move |setup| {
            if besides == Besides::GoLiveAndInvalidate {
                setup.unmap_mr(1);
            } else {
                setup.queue.close();
            }
        });
        let first = queue::stop(watch);

        unmap.join().unwrap();
        second_besides.join().unwrap();

        let registering = first_besides.join().unwrap();
        let mut records = read.join().unwrap();

        records.extend(setup.drain());
        assert!(records.is_sorted_by_key(|record| record.generation));

        let counts = [first, queue::stop(registering)];

        for (cookie, count) in counts.iter().enumerate() {
            let records = records
                .iter()
                .filter(|record| record.cookie == cookie as u64);

            assert_eq!(records.count(), *count as usize);
        }
        // G1: the second MR is always reported, unless the queue is closed.
        assert!(besides != Besides::GoLiveAndInvalidate || counts[1] != 0);
        counts
    })
}

#[test]
fn all_at_once_with_go_live_and_close() {
    assert_eq!(
        all_at_once(Besides::GoLiveAndClose),
        BTreeSet::from([[0, 0], [0, 1], [1, 0], [1, 1]])
    );
}

#[test]
fn all_at_once_with_go_live_and_invalidation() {
    assert_eq!(
        all_at_once(Besides::GoLiveAndInvalidate),
        BTreeSet::from([[0, 1], [0, 2], [1, 1], [1, 2]])
    );
}

#[test]
fn all_at_once_with_invalidation_and_close() {
    assert_eq!(
        all_at_once(Besides::InvalidateAndClose),
        BTreeSet::from([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    );
}

/// G8: the last references are dropped in any order, with an event pending or not.
#[test]
fn close_and_stop() {
    check::model(None, || {
        let mm = sync::Arc::new(MmWithUser::new());
        let queue = Queue::new(&mm).unwrap();
        let watch = Watch::start(queue.as_arc_borrow(), &mm, MRS[0].clone(), 0).unwrap();

        go_live(&watch);

        let unmap = {
            let mm = mm.clone();

            thread::spawn(move || mm.invalidate(Event::UNMAP, MRS[0].clone(), || ()))
        };
        let close = thread::spawn(move || queue.release());

        assert_eq!(queue::stop(watch), 0);
        unmap.join().unwrap();
        close.join().unwrap();
    });
}

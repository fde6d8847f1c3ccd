// SPDX-License-Identifier: GPL-2.0

//! Operations at the same time, in every order that matters.
//!
//! Each model says which outcomes there have to be, so that it does not pass by never getting
//! where it looks.

use crate::{
    generation,
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
        poll::{PollTable, Poller}, //
    },
};
use loom::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    thread::{self, JoinHandle}, //
};
use std::{collections::BTreeSet, ops::Range, sync};

const PAGE: usize = 4096;
/// Two MRs, whose cookies are their indices.
const MRS: [Range<usize>; 2] = [PAGE..2 * PAGE, 3 * PAGE..4 * PAGE];

/// What the threads of a model have in common. No operation of loom is spent on sharing it.
struct Shared {
    mm: MmWithUser,
    queue: Arc<Queue>,
}

impl Shared {
    fn new() -> sync::Arc<Self> {
        let mm = MmWithUser::new();

        sync::Arc::new(Self {
            queue: Queue::new(&mm).unwrap(),
            mm,
        })
    }

    fn watch(&self, mr: usize) -> Registration<Watch> {
        Watch::new(
            self.queue.as_arc_borrow(),
            &self.mm,
            MRS[mr].clone(),
            mr as u64,
        )
        .unwrap()
    }

    fn live(&self, mr: usize) -> Registration<Watch> {
        let watch = self.watch(mr);

        watch.object().as_arc_borrow().go_live();
        watch
    }

    fn unmap(&self, mr: usize) {
        self.mm.invalidate(Event::UNMAP, MRS[mr].clone(), || ());
    }

    fn read(&self, max: usize, nonblock: bool) -> (Result<usize>, Vec<Record>) {
        let mut sink = Sink::default();

        (self.queue.read(max, nonblock, &mut sink), sink.records)
    }

    fn drain(&self) -> Vec<Record> {
        self.read(usize::MAX, true).1
    }
}

fn spawn<R: Send + 'static>(
    shared: &sync::Arc<Shared>,
    f: impl FnOnce(&Shared) -> R + Send + 'static,
) -> JoinHandle<R> {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    let shared = shared.clone();

    // Unlike that of `std`, the function of loom does not ask for it.
    thread::spawn(is_send(move || f(&shared)))
}

/// A buffer that faults at most once.
#[derive(Default)]
struct Sink {
    records: Vec<Record>,
    fault: bool,
    /// Cookies below this must not come any more.
    detached: Option<sync::Arc<AtomicUsize>>,
}

impl Buffer for Sink {
    fn copy(&mut self, records: &[Record]) -> Result {
        assert!(check::in_atomic());
        if self.fault {
            return Err(EFAULT);
        }
        let detached = self
            .detached
            .as_ref()
            .map_or(0, |detached| detached.load(SeqCst));

        assert!(
            records
                .iter()
                .all(|record| record.cookie >= detached as u64)
        );
        self.records.extend(records);
        Ok(())
    }

    fn make_ready(&mut self, count: usize, _again: bool) -> Result<usize> {
        check::might_sleep();
        self.fault = false;
        Ok(count)
    }
}

/// The count of a deregistration is that of the records copied out, none of them later.
fn detach_counts(fault: bool) {
    let results = check::model(None, move || {
        let shared = Shared::new();
        let watch = shared.live(0);
        let detached = sync::Arc::new(AtomicUsize::new(0));
        let hit = spawn(&shared, |shared| shared.unmap(0));
        let mut sink = Sink {
            records: Vec::new(),
            fault,
            detached: Some(detached.clone()),
        };
        let read = spawn(&shared, move |shared| {
            let result = shared.queue.read(4, true, &mut sink);

            (result, sink.records)
        });
        let count = queue::detach(watch);

        detached.store(1, SeqCst);
        hit.join().unwrap();
        let (result, records) = read.join().unwrap();

        assert_eq!(records.len(), count as usize);
        assert_eq!(result, if count == 0 { Err(EAGAIN) } else { Ok(1) });
        assert_eq!(shared.drain(), []);
        count
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

#[test]
fn hit_read_detach() {
    detach_counts(false);
}

#[test]
fn hit_faulting_read_detach() {
    detach_counts(true);
}

/// A read after a hit is over returns its record, and the counter is at least the record's.
#[test]
fn hits_merge_and_count_up() {
    let results = check::model(Some(3), || {
        let shared = Shared::new();
        let watch = shared.live(0);
        let hits = [0, 1].map(|_| spawn(&shared, |shared| shared.unmap(0)));
        let mut last = 0;
        let mut records = shared.drain();

        for record in &records {
            last = record.generation;
            assert!(generation(&shared.queue) >= last);
        }
        hits.into_iter().for_each(|hit| hit.join().unwrap());

        let rest = shared.drain();

        assert!(rest.iter().all(|record| record.generation > last));
        records.extend(rest);
        assert_eq!(records.last().unwrap().generation, 2);
        assert_eq!(generation(&shared.queue), 2);
        assert_eq!(queue::detach(watch) as usize, records.len());
        records.len()
    });

    assert_eq!(results, BTreeSet::from([1, 2]));
}

/// A blocked reader wakes up for a hit. Otherwise the model ends in a deadlock.
#[test]
fn hit_wakes_reader() {
    let results = check::model(None, || {
        let shared = Shared::new();
        let watch = shared.live(0);
        let read = spawn(&shared, |shared| shared.read(4, false));

        shared.unmap(0);

        let (result, records) = read.join().unwrap();

        assert_eq!(result, Ok(1));
        assert_eq!(records[0].generation, 1);
        assert_eq!(queue::detach(watch), 1);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// Two blocked readers get a record each, whoever is woken by which hit.
#[test]
fn hits_wake_readers() {
    let results = check::model(Some(2), || {
        let shared = Shared::new();
        let watches = [shared.live(0), shared.live(1)];
        let reads = [0, 1].map(|_| spawn(&shared, |shared| shared.read(1, false)));

        shared.unmap(0);
        shared.unmap(1);

        let mut cookies = reads.map(|read| read.join().unwrap().1[0].cookie);

        cookies.sort_unstable();
        assert_eq!(cookies, [0, 1]);
        assert_eq!(watches.map(queue::detach), [1, 1]);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1, 2]));
}

/// A signal ends a blocked read, but no record is lost by it.
#[test]
fn signal_interrupts_reader() {
    let results = check::model(None, || {
        let shared = Shared::new();
        let watch = shared.live(0);
        let read = spawn(&shared, |shared| shared.read(4, false));
        let reader = read.thread().id();
        let signal = thread::spawn(move || check::set_signal_pending(reader, true));

        shared.unmap(0);
        signal.join().unwrap();

        let (result, mut records) = read.join().unwrap();

        if records.is_empty() {
            assert_eq!(result, Err(ERESTARTSYS));
            records = shared.drain();
        }
        assert_eq!(records.len(), 1);
        assert_eq!(queue::detach(watch), 1);
        result.is_ok()
    });

    assert_eq!(results, BTreeSet::from([false, true]));
}

/// Polls as poll() does: registers, tests, and sleeps until a wake-up to test again.
fn poll(shared: &Shared) -> u32 {
    let poller = Poller::default();
    let mut mask = shared.queue.poll(&File, poller.table());

    if mask == 0 {
        poller.wait();
        mask = shared.queue.poll(&File, PollTable::NULL);
    }
    mask
}

#[test]
fn hit_wakes_poller() {
    let results = check::model(None, || {
        let shared = Shared::new();
        let watch = shared.live(0);
        let polled = spawn(&shared, poll);

        shared.unmap(0);
        assert_eq!(polled.join().unwrap(), POLLIN | POLLRDNORM);
        assert_eq!(shared.drain().len(), 1);
        assert_eq!(queue::detach(watch), 1);
        check::wakeups()
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// Whoever has drained the queue to a short count is woken by the next hit: epoll's edge.
#[test]
fn hit_wakes_poller_after_drain() {
    let results = check::model(None, || {
        let shared = Shared::new();
        let watch = shared.live(0);
        let edge = spawn(&shared, |shared| {
            let poller = Poller::default();
            let mut seen = Vec::new();

            shared.queue.poll(&File, poller.table());
            loop {
                seen.extend(shared.drain());
                if seen
                    .last()
                    .is_some_and(|record: &Record| record.generation == 2)
                {
                    return seen.len();
                }
                poller.wait();
            }
        });

        shared.unmap(0);
        shared.unmap(0);

        let seen = edge.join().unwrap();

        assert_eq!(queue::detach(watch) as usize, seen);
        seen
    });

    assert_eq!(results, BTreeSet::from([1, 2]));
}

#[test]
fn close_ends_reader_and_poller() {
    check::model(Some(3), || {
        let shared = Shared::new();
        let read = spawn(&shared, |shared| shared.read(4, false).0);
        let polled = spawn(&shared, poll);

        shared.queue.close();
        assert_eq!(read.join().unwrap(), Err(EIO));
        assert_eq!(polled.join().unwrap(), POLLERR);
        assert_eq!(generation(&shared.queue), 1);
    });
}

/// After a close there is no delivery, and what was delivered before is counted.
#[test]
fn close_hit_read() {
    let results = check::model(None, || {
        let shared = Shared::new();
        let watch = shared.live(0);
        let hit = spawn(&shared, |shared| shared.unmap(0));
        let read = spawn(&shared, |shared| shared.read(4, true));

        shared.queue.close();

        let at_close = generation(&shared.queue);

        assert_eq!(shared.read(4, true), (Err(EIO), Vec::new()));
        hit.join().unwrap();
        assert_eq!(generation(&shared.queue), at_close);

        let count = queue::detach(watch);

        assert_eq!(read.join().unwrap().1.len(), count as usize);
        count
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// An MR whose pages change after they have been pinned is never live without a report.
///
/// If the registration `fails` instead, nothing is ever reported.
fn registration(fails: bool) {
    let results = check::model(None, move || {
        let shared = Shared::new();
        let pages = sync::Arc::new(AtomicUsize::new(0));
        let live = sync::Arc::new(AtomicBool::new(false));
        let unmap = {
            let (pages, live) = (pages.clone(), live.clone());

            spawn(&shared, move |shared| {
                let was_live = live.load(SeqCst);

                shared.mm.invalidate(Event::UNMAP, MRS[0].clone(), || {
                    // Before the change the counter has moved, if the MR was live.
                    assert!(!was_live || generation(&shared.queue) == 1);
                    pages.store(1, SeqCst);
                });
            })
        };
        let watch = shared.watch(0);
        let pinned = pages.load(SeqCst);

        if fails {
            assert_eq!(queue::detach(watch), 0);
            unmap.join().unwrap();
            assert_eq!(generation(&shared.queue), 0);
            assert_eq!(shared.drain(), []);
            return (pinned, 0);
        }
        watch.object().as_arc_borrow().go_live();
        live.store(true, SeqCst);
        unmap.join().unwrap();

        let records = shared.drain();

        assert_eq!(generation(&shared.queue), records.len() as u64);
        assert!(pinned != 0 || records.len() == 1, "stale, and not reported");
        assert_eq!(queue::detach(watch) as usize, records.len());
        (pinned, records.len())
    });

    assert_eq!(
        results,
        if fails {
            BTreeSet::from([(0, 0), (1, 0)])
        } else {
            BTreeSet::from([(0, 1), (1, 0), (1, 1)])
        }
    );
}

#[test]
fn registration_is_without_gap() {
    registration(false);
}

#[test]
fn failed_registration_is_silent() {
    registration(true);
}

/// Whoever sees the counter of a hit finds its record, without further synchronisation.
#[test]
fn generation_leads_to_record() {
    let results = check::model(None, || {
        let shared = Shared::new();
        let watches = [shared.live(0), shared.live(1)];
        let hits = spawn(&shared, |shared| {
            shared.unmap(0);
            shared.unmap(1);
        });
        let seen = generation(&shared.queue) as usize;
        let records = shared.drain();

        assert!(records.len() >= seen);
        for (i, record) in records.iter().enumerate() {
            assert_eq!((record.cookie, record.generation), (i as u64, i as u64 + 1));
        }
        hits.join().unwrap();
        assert_eq!(shared.drain().len() + records.len(), 2);
        assert_eq!(watches.map(queue::detach), [1, 1]);
        seen
    });

    assert_eq!(results, BTreeSet::from([0, 1, 2]));
}

/// The last references go in any order, with a record queued or not.
#[test]
fn close_and_detach() {
    check::model(None, || {
        let mm = sync::Arc::new(MmWithUser::new());
        let queue = Queue::new(&mm).unwrap();
        let watch = Watch::new(queue.as_arc_borrow(), &mm, MRS[0].clone(), 0).unwrap();

        watch.object().as_arc_borrow().go_live();

        let hit = {
            let mm = mm.clone();

            thread::spawn(move || mm.invalidate(Event::UNMAP, MRS[0].clone(), || ()))
        };
        let close = thread::spawn(move || queue.close());

        assert_eq!(queue::detach(watch), 0);
        hit.join().unwrap();
        close.join().unwrap();
    });
}

// SPDX-License-Identifier: GPL-2.0

//! The shim: that it does what the kernel does, and that loom misses no order.

use crate::queue::{self, Queue, Watch};
use kernel::{
    alloc::GFP_KERNEL_ACCOUNT,
    bindings::POLLERR,
    check,
    fs::File,
    mm::{
        MmWithUser,
        interval_notifier::{
            Event,
            IntervalNotifier,
            IntervalNotifierCallback,
            Invalidation,
            Registration,
            impl_has_interval_notifier, //
        },
    },
    prelude::*,
    sync::{
        ArcBorrow,
        UniqueArc,
        atomic::{Atomic, Relaxed},
        poll::{PollTable, Poller}, //
    },
};
use loom::thread;
use std::{collections::BTreeSet, sync};

/// The thread that begins later loads and stores. Without the repair of the atomics it never does
/// so before the other one loads.
#[test]
fn store_precedes_earlier_load() {
    let results = check::model(None, || {
        let atomic = sync::Arc::new(Atomic::new(0u32));
        let store = {
            let atomic = atomic.clone();

            thread::spawn(move || {
                atomic.load(Relaxed);
                atomic.store(1, Relaxed);
            })
        };
        let loaded = atomic.load(Relaxed);

        store.join().unwrap();
        loaded
    });

    assert_eq!(results, BTreeSet::from([0, 1]));
}

/// Counts its callbacks.
#[pin_data]
struct Counter {
    #[pin]
    notifier: IntervalNotifier<Self>,
    calls: Atomic<u32>,
    removed: Atomic<u32>,
}

impl_has_interval_notifier! {
    impl HasIntervalNotifier for Counter { self.notifier }
}

impl IntervalNotifierCallback for Counter {
    fn invalidate(this: ArcBorrow<'_, Self>, _: &Invalidation) {
        this.calls.store(this.calls.load(Relaxed) + 1, Relaxed);
    }

    fn removed(this: ArcBorrow<'_, Self>) {
        this.removed.store(this.removed.load(Relaxed) + 1, Relaxed);
    }
}

impl Counter {
    fn insert(mm: &MmWithUser) -> Result<Registration<Self>> {
        let counter = UniqueArc::pin_init(
            pin_init!(Self {
                notifier <- IntervalNotifier::new(),
                calls: Atomic::new(0),
                removed: Atomic::new(0),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        Registration::insert(counter, mm, 1..2)
    }
}

fn calls(counter: &Registration<Counter>) -> u32 {
    counter.object().calls.load(Relaxed)
}

/// As the test of this name in `interval_notifier.rs`: an insertion is deferred while an
/// invalidation that has invoked a callback is running. A removal does not wait for it to end.
#[test]
fn deferred_insertion() {
    check::sequential(|| {
        let mm = MmWithUser::new();
        let other = Counter::insert(&mm).unwrap();
        let mut inserted = None;

        mm.invalidate(Event::UNMAP, 1..2, || {
            let registration = Counter::insert(&mm).unwrap();

            mm.invalidate(Event::UNMAP, 1..2, || ());
            assert_eq!((calls(&other), calls(&registration)), (2, 0));

            let dropped = Counter::insert(&mm).unwrap().remove();

            assert_eq!(dropped.removed.load(Relaxed), 1);
            inserted = Some((registration, dropped));
        });
        assert_eq!(check::deferred(), 2);

        let (registration, dropped) = inserted.unwrap();

        // Nothing runs.
        registration.wait_for_in_flight();
        mm.invalidate(Event::UNMAP, 1..2, || ());
        assert_eq!((calls(&other), calls(&registration)), (3, 1));
        assert_eq!(dropped.calls.load(Relaxed), 0);
    });
}

/// While an invalidation is running that has not invoked a callback, an insertion is not deferred,
/// but there is something to wait for.
#[test]
fn insertion_in_flight() {
    let results = check::model(None, || {
        let mm = sync::Arc::new(MmWithUser::new());
        let ended = sync::Arc::new(Atomic::new(0u32));
        let invalidation = {
            let (mm, ended) = (mm.clone(), ended.clone());

            thread::spawn(move || {
                mm.invalidate(Event::UNMAP, 1..2, || ended.store(1, Relaxed));
            })
        };
        let registration = Counter::insert(&mm).unwrap();

        registration.wait_for_in_flight();

        let ended = ended.load(Relaxed);

        invalidation.join().unwrap();
        assert_eq!(check::deferred(), 0);
        (ended, calls(&registration))
    });

    // The change is over, or has called back.
    assert_eq!(results, BTreeSet::from([(0, 1), (1, 0), (1, 1)]));
}

/// A poller that is registered for good learns that the queue is freed: `POLLFREE`.
#[test]
fn freed_queue_ends_poller() {
    check::model(Some(3), || {
        let mm = sync::Arc::new(MmWithUser::new());
        let queue = Queue::new(&mm).unwrap();
        let watch = Watch::start(queue.as_arc_borrow(), &mm, 1..2, 0).unwrap();
        let poll = {
            let queue = queue.clone();

            thread::spawn(move || {
                let poller = Poller::default();

                queue.poll(&File, poller.table());
                assert_eq!(queue.poll(&File, PollTable::NULL) & !POLLERR, 0);
                drop(queue);
                while poller.wait() {}
            })
        };
        let release = thread::spawn(move || queue.release());

        assert_eq!(queue::stop(watch), 0);
        release.join().unwrap();
        poll.join().unwrap();
    });
}

// SPDX-License-Identifier: GPL-2.0

//! The state of one watch, and the errors of the operations.

use crate::{
    Generation,
    proptest_config,
    queue::{self, Queue, Watch},
    report_histories,
    state::{Pending, Reason, Record, Region}, //
};
use kernel::{
    check,
    fs::File,
    mm::{
        MmWithUser,
        interval_notifier::{Event, Registration}, //
    },
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    sync::poll::Poller, //
};
use proptest::{collection::vec, prelude::*};
use std::ops::Range;

const REASONS: [Reason; 2] = [Reason::Unmapped, Reason::MaybeStale];

/// `Watch::start()` refuses an MR in the last page of all addresses.
const LAST_END: usize = usize::MAX - (PAGE_SIZE - 1);

/// G7: changes that leave the pinned pages mapped are no reason.
#[test]
fn reason_of_each_event() {
    for event in 0..100 {
        let expected = match event {
            0 | 5 => Some(Reason::Unmapped),
            2 | 3 | 4 | 6 | 7 => None,
            _ => Some(Reason::MaybeStale),
        };

        assert_eq!(Reason::of(Event(event)), expected);
    }
}

/// Addresses up to `max`, often near 0, `max`, and the size at which units begin to grow.
fn address(max: usize) -> impl Strategy<Value = usize> {
    let near = move |address: usize| {
        (0..0x8000usize).prop_map(move |offset| {
            address
                .saturating_sub(0x4000)
                .saturating_add(offset)
                .min(max)
        })
    };

    prop_oneof![
        2 => 0..0x8000usize,
        2 => near(max),
        1 => near(1 << (PAGE_SHIFT + 30)),
        1 => near(1 << (PAGE_SHIFT + 31)),
        1 => near(1 << 47),
        1 => 0..=max,
    ]
}

fn range(max: usize) -> impl Strategy<Value = Range<usize>> {
    (address(max), address(max))
        .prop_map(|(a, b)| a.min(b)..a.max(b))
        .prop_filter("empty", |range| !range.is_empty())
}

/// The size of the units that the documentation of `Region` promises.
fn unit(mr: &Range<usize>) -> u128 {
    let units = |unit: u128| (mr.end as u128 - 1) / unit - mr.start as u128 / unit + 1;
    let mut unit = PAGE_SIZE as u128;

    while units(unit) > 1 << 30 {
        unit *= 2;
    }
    unit
}

/// G1, G4: an event covers every invalidation that has merged into it, and no more than the MR
/// and whole units.
#[test]
fn span_of_invalidations() {
    let config = proptest_config();
    let invalidations = vec((range(usize::MAX), 0..2usize), 0..6);

    proptest!(config, |(mr in range(LAST_END), invalidations in invalidations)| {
        let unit = unit(&mr);
        let region = Region::new(mr.clone()).unwrap();
        let mut pending: Option<Pending> = None;
        let mut expected: Option<Record> = None;

        for (range, reason) in invalidations {
            let reason = REASONS[reason];
            let start = (range.start as u128 / unit * unit).max(mr.start as u128);
            let end = ((range.end as u128).div_ceil(unit) * unit).min(mr.end as u128);
            let event = region.event(range, reason);

            prop_assert_eq!(event.is_some(), start < end);
            let Some(event) = event else { continue };

            let record = Record {
                cookie: 7,
                start: start as u64,
                end: end as u64,
                generation: 9,
                reasons: reason as u32,
                reserved: 0,
            };

            prop_assert_ne!(event, Pending::NONE);
            prop_assert_eq!(region.record(event, 7, 9), record);

            let merged = pending.map_or(event, |pending| pending.merge(event));

            // In any order, and again.
            prop_assert_eq!(pending.map_or(event, |pending| event.merge(pending)), merged);
            prop_assert_eq!(merged.merge(event), merged);
            pending = Some(merged);
            expected = Some(expected.map_or(record, |expected| Record {
                start: expected.start.min(record.start),
                end: expected.end.max(record.end),
                reasons: expected.reasons | record.reasons,
                ..record
            }));
            prop_assert_eq!(region.record(merged, 7, 9), expected.unwrap());
            prop_assert_eq!(region.pending(&expected.unwrap()), merged);
            // The packed word survives.
            prop_assert_eq!(Pending::from(u64::from(merged)), merged);
        }
    });
    report_histories(&config);
}

/// The limits of the packing: an MR of 2^30 pages is exact, a larger one is not.
#[test]
fn units_of_large_mrs() {
    let limit = PAGE_SIZE << 30;
    let record = |mr: Range<usize>, range: Range<usize>| {
        let region = Region::new(mr).unwrap();
        let record = region.record(region.event(range, Reason::Unmapped).unwrap(), 0, 0);

        record.start as usize..record.end as usize
    };
    let page = |address: usize| address..address + PAGE_SIZE;

    for start in [0, PAGE_SIZE, limit / 2] {
        let mr = start..start + limit;

        for address in [start, start + limit / 2, mr.end - PAGE_SIZE] {
            assert_eq!(record(mr.clone(), page(address)), page(address));
        }
        assert_eq!(record(mr.clone(), 0..usize::MAX), mr);
    }

    // One byte more than 2^30 pages.
    let mr = 0..limit + 1;

    assert_eq!(record(mr.clone(), page(PAGE_SIZE)), 0..2 * PAGE_SIZE);
    assert_eq!(record(mr.clone(), limit..limit + 1), limit..limit + 1);

    // All addresses that can be watched.
    let mr = 0..LAST_END;

    assert_eq!(record(mr.clone(), 0..usize::MAX), mr);
    assert_eq!(record(mr, LAST_END - 1..LAST_END).end, LAST_END);
}

/// An event of its last page, with both reasons, uses all bits but two.
#[test]
fn largest_event_fits() {
    let region = Region::new(0..PAGE_SIZE << 30).unwrap();
    let last = (PAGE_SIZE << 30) - 1;
    let [first, second] = REASONS.map(|reason| region.event(last..last + 1, reason).unwrap());

    assert_eq!(u64::from(first.merge(second)), !0 << 4 | 3);
}

#[test]
fn refusals() {
    check::sequential(|| {
        let mm = MmWithUser::new();
        let other = MmWithUser::new();
        let queue = Queue::new(&mm).unwrap();
        let generation = Generation::new(&queue);
        let start = |mm, range| Watch::start(queue.as_arc_borrow(), mm, range, 0).map(queue::stop);

        assert!(queue.belongs_to(&mm) && !queue.belongs_to(&other));
        assert_eq!(start(&other, 1..2), Err(EPERM));
        #[allow(clippy::reversed_empty_ranges)]
        {
            assert_eq!(start(&mm, 2..1), Err(EINVAL));
        }
        assert_eq!(start(&mm, 1..1), Err(EINVAL));
        assert_eq!(start(&mm, 1..LAST_END + 1), Err(EINVAL));
        assert_eq!(start(&mm, 1..LAST_END), Ok(0));
        assert_eq!(start(&mm, 1..2), Ok(0));

        queue.close();
        queue.close();
        assert_eq!(generation.load(), 1);
        assert_eq!(start(&mm, 1..2), Err(EIO));
    });
}

/// G8: whichever allocation fails, nothing is left behind but the notifier tree of the `mm`.
#[test]
fn out_of_memory() {
    check::sequential(|| {
        let mm = MmWithUser::new();
        let mut failed = 0;

        drop(Queue::new(&mm).unwrap());

        let before = check::live();

        loop {
            check::limit_allocations(Some(failed));
            let result = Queue::new(&mm).and_then(|queue| {
                Watch::start(queue.as_arc_borrow(), &mm, 1..2, 0).map(queue::stop)
            });

            assert_eq!(check::live(), before);
            if result == Ok(0) {
                break;
            }
            assert_eq!(result, Err(ENOMEM));
            failed += 1;
        }
        // The page, the wait queue, the queue and the watch.
        assert_eq!(failed, 4);
    });
}

/// A signal can end the creation of a queue, but not the start of a watch.
#[test]
fn notifier_tree() {
    check::sequential(|| {
        let mm = MmWithUser::new();

        check::fail_notifiers(Some(EINTR));
        assert_eq!(Queue::new(&mm).err(), Some(EINTR));
        check::fail_notifiers(None);
        check::limit_allocations(Some(0));
        assert_eq!(Queue::new(&mm).err(), Some(ENOMEM));
        check::limit_allocations(None);

        let queue = Queue::new(&mm).unwrap();

        // For the watch alone: the queue has set up the tree.
        check::limit_allocations(Some(1));
        let watch = Watch::start(queue.as_arc_borrow(), &mm, 1..2, 0);
        assert_eq!(watch.map(queue::stop), Ok(0));
    });
}

/// Without a stop: a registration that is dropped takes its event along.
#[test]
fn dropped_registration() {
    check::sequential(|| {
        let mm = MmWithUser::new();
        let queue = Queue::new(&mm).unwrap();
        let watch: Registration<Watch> = Watch::start(queue.as_arc_borrow(), &mm, 1..2, 0).unwrap();

        watch.object().as_arc_borrow().go_live();
        mm.invalidate(Event::CLEAR, 0..1, || ());
        drop(watch);
        mm.invalidate(Event::CLEAR, 0..1, || ());
        assert_eq!(Generation::new(&queue).load(), 1);
    });
}

/// G6: only an event that finds the queue empty wakes anybody.
#[test]
fn first_event_wakes() {
    check::sequential(|| {
        let mm = MmWithUser::new();
        let queue = Queue::new(&mm).unwrap();
        let poller = Poller::default();
        let watches =
            [0, 1].map(|cookie| Watch::start(queue.as_arc_borrow(), &mm, 1..2, cookie).unwrap());

        for watch in &watches {
            watch.object().as_arc_borrow().go_live();
        }
        assert_eq!(queue.poll(&File, poller.table()), 0);
        for _ in 0..2 {
            mm.invalidate(Event::CLEAR, 0..1, || ());
            assert_eq!(check::wakeups(), 1);
        }
        assert_eq!(Generation::new(&queue).load(), 2);
    });
}

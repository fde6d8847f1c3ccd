// SPDX-License-Identifier: GPL-2.0

//! The state of one watch, and the errors of the operations.

use crate::{
    generation,
    queue::{self, Queue, Watch},
    state::{Reason, Record, State}, //
};
use kernel::{
    check,
    mm::{MmWithUser, interval_notifier::Event},
    page::PAGE_SIZE,
    prelude::*, //
};
use proptest::prelude::*;

#[test]
fn reasons() {
    for event in 0..100 {
        let expected = match event {
            0 => Some(1),
            2 | 3 | 4 | 6 | 7 => None,
            5 => Some(4),
            _ => Some(2),
        };

        assert_eq!(
            Reason::of(Event(event)).map(|reason| reason as u32),
            expected
        );
    }
}

/// A range with the end not included, up to the last address but `reserve`.
fn range(reserve: usize) -> impl Strategy<Value = (usize, usize)> {
    let last = usize::MAX - reserve;
    let address = move || prop_oneof![0..0x8000usize, last - 0x8000..=last];

    (address(), address())
        .prop_map(|(a, b)| (a.min(b), a.max(b)))
        .prop_filter("empty", |(start, end)| start < end)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hull_of_hits(
        // `Watch::new()` refuses the last page.
        mr in range(PAGE_SIZE),
        hits in prop::collection::vec((range(0), 0..3usize), 0..6),
        live in any::<bool>(),
    ) {
        const REASONS: [Reason; 3] = [Reason::Unmapped, Reason::MaybeStale, Reason::Exited];

        let page = PAGE_SIZE as u128;
        let mut state = State::new(mr.0..mr.1, 7);
        let mut hulls: Vec<(u128, u128)> = Vec::new();
        let mut expected = Record { cookie: 7, ..Record::default() };

        if live {
            prop_assert!(!state.go_live(0));
        }
        for (i, ((start, end), reason)) in hits.into_iter().enumerate() {
            let generation = 10 + i as u64;
            let first = start as u128 / page * page;
            let last = (end as u128).div_ceil(page) * page;
            let hull = (first.max(mr.0 as u128), last.min(mr.1 as u128));
            let inside = hull.0 < hull.1;

            prop_assert_eq!(state.hit(start..end, REASONS[reason], generation), inside && live);
            if inside {
                hulls.push(hull);
                expected.generation = generation;
                expected.reasons |= 1 << reason;
            }
        }
        if !hulls.is_empty() {
            expected.start = hulls.iter().map(|hull| hull.0).min().unwrap() as u64;
            expected.end = hulls.iter().map(|hull| hull.1).max().unwrap() as u64;
            prop_assert_eq!(state.record(), expected);
        }
        if !live {
            prop_assert_eq!(state.go_live(99), !hulls.is_empty());
            prop_assert_eq!(state.record().generation, 99);
        }
        state.delivered();
        prop_assert_eq!(state.record().reasons, 0);
        prop_assert_eq!(state.count(), 1);
    }
}

#[test]
fn refusals() {
    check::sequential(|| {
        let mm = MmWithUser::new();
        let other = MmWithUser::new();
        let queue = Queue::new(&mm).unwrap();
        let new = |mm, range| Watch::new(queue.as_arc_borrow(), mm, range, 0).map(queue::detach);

        assert!(queue.belongs_to(&mm) && !queue.belongs_to(&other));
        assert_eq!(new(&other, 1..2), Err(EPERM));
        #[allow(clippy::reversed_empty_ranges)]
        {
            assert_eq!(new(&mm, 2..1), Err(EINVAL));
        }
        assert_eq!(new(&mm, 1..1), Err(EINVAL));
        assert_eq!(new(&mm, 1..usize::MAX), Err(EINVAL));
        assert_eq!(new(&mm, 1..2), Ok(0));

        queue.close();
        queue.close();
        assert_eq!(generation(&queue), 1);
        assert_eq!(new(&mm, 1..2), Err(EIO));
    });
}

/// Whatever allocation fails, nothing is left behind.
#[test]
fn out_of_memory() {
    check::sequential(|| {
        let mm = MmWithUser::new();
        let before = check::live();
        let mut failed = 0;

        loop {
            check::limit_allocations(Some(failed));
            let result = Queue::new(&mm).and_then(|queue| {
                Watch::new(queue.as_arc_borrow(), &mm, 1..2, 0).map(queue::detach)
            });

            assert_eq!(check::live(), before);
            if result == Ok(0) {
                break;
            }
            assert_eq!(result, Err(ENOMEM));
            failed += 1;
        }
        assert!(failed > 3);
    });
}

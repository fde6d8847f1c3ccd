// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Representation of events: plain data, no locks, no pointers.

use core::ops::Range;
use kernel::{
    mm::interval_notifier::Event as MmEvent,
    page::PAGE_SHIFT, //
};

/// An event as userspace reads it: `struct ib_uverbs_mmu_notify_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) cookie: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) generation: u64,
    pub(crate) reasons: u32,
    pub(crate) reserved: u32,
}

/// Why an MR is, or may be, stale: the bits of `enum ib_uverbs_mmu_notify_reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reason {
    Unmapped = 1 << 0,
    MaybeStale = 1 << 1,
}

impl Reason {
    /// Returns the reason to report `event` with, or `None` if it leaves the pinned pages mapped.
    ///
    /// Changes of protection and soft-dirty tracking leave the pages mapped: pinned anonymous pages
    /// are exclusive and not replaced on write, as the long-term pin has already broken
    /// copy-on-write. Migration to a device fails for pinned pages. After device-exclusive access
    /// the same page is mapped again. Unknown events are reported.
    pub(crate) fn of(event: MmEvent) -> Option<Self> {
        match event {
            MmEvent::PROTECTION_VMA
            | MmEvent::PROTECTION_PAGE
            | MmEvent::SOFT_DIRTY
            | MmEvent::MIGRATE
            | MmEvent::EXCLUSIVE => None,
            // The address space is torn down: all of it is unmapped.
            MmEvent::UNMAP | MmEvent::RELEASE => Some(Self::Unmapped),
            _ => Some(Self::MaybeStale),
        }
    }
}

/// The pending event of an MR in one word: its reasons, and its range in units of the [`Region`].
///
/// [`Pending::NONE`] if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pending(u64);

impl Pending {
    pub(crate) const NONE: Self = Self(0);

    const REASON_BITS: u32 = 4;
    const UNIT_BITS: u32 = 30;
    const UNIT_MASK: u64 = (1 << Self::UNIT_BITS) - 1;

    /// Returns the event for the units `first` to `last`, inclusive.
    fn new(first: u64, last: u64, reasons: u64) -> Self {
        Self(
            (last << (Self::REASON_BITS + Self::UNIT_BITS))
                | (first << Self::REASON_BITS)
                | reasons,
        )
    }

    fn reasons(self) -> u64 {
        self.0 & ((1 << Self::REASON_BITS) - 1)
    }

    fn first(self) -> u64 {
        (self.0 >> Self::REASON_BITS) & Self::UNIT_MASK
    }

    fn last(self) -> u64 {
        self.0 >> (Self::REASON_BITS + Self::UNIT_BITS)
    }

    /// Returns the union: the smallest range that covers both, and all reasons.
    ///
    /// Neither may be [`Pending::NONE`].
    pub(crate) fn merge(self, other: Self) -> Self {
        Self::new(
            self.first().min(other.first()),
            self.last().max(other.last()),
            self.reasons() | other.reasons(),
        )
    }
}

impl From<u64> for Pending {
    fn from(word: u64) -> Self {
        Self(word)
    }
}

impl From<Pending> for u64 {
    fn from(pending: Pending) -> Self {
        pending.0
    }
}

/// The addresses of an MR: untagged CPU virtual addresses.
///
/// Ranges within the MR are counted in units, from the unit that contains `start`. A unit is one
/// page or, for more than 2^30 pages, the smallest power-of-two number of pages that gives at most
/// 2^30 units.
///
/// # Invariants
///
/// The range is not empty.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Region {
    start: usize,
    end: usize,
}

impl Region {
    /// Returns the region with the addresses `range`, or `None` if there are none.
    pub(crate) fn new(range: Range<usize>) -> Option<Self> {
        // INVARIANT: The range was just found not to be empty.
        (range.start < range.end).then_some(Self {
            start: range.start,
            end: range.end,
        })
    }

    /// Returns whether units of `1 << shift` bytes are few enough, at most 2^30.
    fn fits(&self, shift: usize) -> bool {
        (((self.end - 1) >> shift) - (self.start >> shift)) >> Pending::UNIT_BITS == 0
    }

    /// Calls `f` with the binary logarithm of the size of a unit in bytes.
    ///
    /// Nearly always that is `PAGE_SHIFT`. `f` is compiled separately for that value, since shifts
    /// by a constant are cheaper.
    #[inline(always)]
    fn with_unit_shift<T>(&self, f: impl Fn(usize) -> T) -> T {
        if self.fits(PAGE_SHIFT) {
            return f(PAGE_SHIFT);
        }
        let mut shift = PAGE_SHIFT + 1;
        while !self.fits(shift) {
            shift += 1;
        }
        f(shift)
    }

    /// Returns the event for an invalidation of `range`, or `None` if it is outside.
    pub(crate) fn event(&self, range: Range<usize>, reason: Reason) -> Option<Pending> {
        self.with_unit_shift(|shift| {
            let base = self.start >> shift;
            // Round to whole units, as pages change as a whole.
            let first = (range.start >> shift).max(base);
            let last = (range.end.saturating_sub(1) >> shift).min((self.end - 1) >> shift);

            (first <= last).then(|| {
                Pending::new(
                    (first - base) as u64,
                    (last - base) as u64,
                    u64::from(reason as u8),
                )
            })
        })
    }

    /// Returns `pending`, which must be an event of this region, as userspace reads it.
    pub(crate) fn record(&self, pending: Pending, cookie: u64, generation: u64) -> Record {
        // CAST: Offsets in units of this region, which fit in `usize` as its addresses do.
        let (first, last) = (pending.first() as usize, pending.last() as usize);
        let (start, last_byte) = self.with_unit_shift(|shift| {
            let base = self.start >> shift;
            (
                (base + first) << shift,
                ((base + last) << shift) | ((1 << shift) - 1),
            )
        });

        Record {
            cookie,
            start: start.max(self.start) as u64,
            end: last_byte.min(self.end - 1) as u64 + 1,
            generation,
            reasons: pending.reasons() as u32,
            reserved: 0,
        }
    }

    /// Returns the event of this region that [`Self::record`] made `record` from.
    pub(crate) fn pending(&self, record: &Record) -> Pending {
        self.with_unit_shift(|shift| {
            let unit = |address: u64| (address >> shift) - (self.start >> shift) as u64;

            Pending::new(
                unit(record.start),
                unit(record.end - 1),
                record.reasons.into(),
            )
        })
    }
}

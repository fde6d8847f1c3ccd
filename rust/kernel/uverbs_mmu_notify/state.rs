// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! What is known of one watched MR: plain data, no locks, no pointers.

use core::ops::Range;
use kernel::{
    mm::interval_notifier::Event as MmEvent,
    page::PAGE_MASK, //
};

/// `struct ib_uverbs_mmu_notify_event`.
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

/// Why the registration is stale, or may be: the bits of `enum ib_uverbs_mmu_notify_reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reason {
    Unmapped = 1 << 0,
    MaybeStale = 1 << 1,
    Exited = 1 << 2,
}

impl Reason {
    /// Returns the reason to report `event` for, or `None` if the process will go on to see the
    /// pages that are pinned.
    ///
    /// Changes of protection and soft-dirty tracking leave the pages where they are: a pinned
    /// anonymous page is exclusive and is not replaced on write, and a long-term pin has broken
    /// copy-on-write before. Migration to a device fails for pinned pages, and a page that a device
    /// has exclusive access to is the one that comes back. An event that is not known here is
    /// reported.
    pub(crate) fn of(event: MmEvent) -> Option<Self> {
        match event {
            MmEvent::PROTECTION_VMA
            | MmEvent::PROTECTION_PAGE
            | MmEvent::SOFT_DIRTY
            | MmEvent::MIGRATE
            | MmEvent::EXCLUSIVE => None,
            MmEvent::UNMAP => Some(Self::Unmapped),
            MmEvent::RELEASE => Some(Self::Exited),
            _ => Some(Self::MaybeStale),
        }
    }
}

/// The state of one watch.
///
/// # Invariants
///
/// - `hull` is a part of `range`.
/// - `reasons` is zero if and only if no hit waits to be delivered.
#[derive(Debug)]
pub(crate) struct State {
    range: Range<usize>,
    hull: Range<usize>,
    generation: u64,
    cookie: u64,
    delivered: u32,
    reasons: u8,
    /// The registration is complete: hits are reported. Before that they are remembered.
    live: bool,
}

impl State {
    /// Creates the state of an MR that is being registered.
    ///
    /// `range` holds its CPU virtual addresses, untagged, the end not included.
    pub(crate) fn new(range: Range<usize>, cookie: u64) -> Self {
        // INVARIANT: The empty range at its start is a part of `range`; there is no hit.
        Self {
            hull: range.start..range.start,
            range,
            generation: 0,
            cookie,
            delivered: 0,
            reasons: 0,
            live: false,
        }
    }

    /// Returns the cookie that the MR was registered with.
    pub(crate) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Merges a hit on `hit`, which may reach beyond the MR, into what waits to be delivered.
    ///
    /// Returns whether it is to be reported now, with `generation`.
    pub(crate) fn hit(&mut self, hit: Range<usize>, reason: Reason, generation: u64) -> bool {
        // Pages change as a whole, also if only a part of one that is not the MR's was named.
        let start = (hit.start & PAGE_MASK).max(self.range.start);
        let end = (hit.end.saturating_add(!PAGE_MASK) & PAGE_MASK).min(self.range.end);

        if start >= end {
            return false;
        }

        // INVARIANT: `start..end` is a part of `range`, and there is a hit now.
        self.hull = if self.reasons == 0 {
            start..end
        } else {
            self.hull.start.min(start)..self.hull.end.max(end)
        };
        self.reasons |= reason as u8;
        self.generation = generation;
        self.live
    }

    /// Starts to report hits. Returns whether there was one already, which `generation` is for.
    pub(crate) fn go_live(&mut self, generation: u64) -> bool {
        self.live = true;
        self.generation = generation;
        self.reasons != 0
    }

    /// Returns what to deliver for the hits that have been merged.
    pub(crate) fn record(&self) -> Record {
        Record {
            cookie: self.cookie,
            start: self.hull.start as u64,
            end: self.hull.end as u64,
            generation: self.generation,
            reasons: self.reasons.into(),
            reserved: 0,
        }
    }

    /// Counts the delivery of [`State::record`] and begins anew.
    pub(crate) fn delivered(&mut self) {
        self.delivered = self.delivered.wrapping_add(1);
        // INVARIANT: There is no hit any more.
        self.reasons = 0;
    }

    /// Returns how often a record has been delivered, modulo 2^32.
    pub(crate) fn count(&self) -> u32 {
        self.delivered
    }
}

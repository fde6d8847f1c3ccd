// SPDX-License-Identifier: GPL-2.0
//! What a process knows of its regions: which events must still come, and which may.
//!
//! A change is *due* for each live region that it concerns. An event settles it if it was
//! read after the change began, covers it with the right reason, and is not newer than the
//! counter was after the change. So the event of a later change does not hide a lost one.

use crate::memory::{Arena, UNITS};
use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};
use uverbs_mmu_notify_tests::{MAYBE_STALE, PAGE, Record, UNMAPPED};

/// Units of an arena: bit `n` is unit `n`.
type Units = u32;

pub fn units(range: Range<usize>) -> Units {
    ((1_u64 << range.end) - (1 << range.start)) as Units
}

/// The smallest range of units that has all of these, which are some.
fn hull(set: Units) -> Units {
    units(set.trailing_zeros() as usize..set.ilog2() as usize + 1)
}

/// How often each page of the file that all processes share has been taken away.
pub type Versions = [AtomicU64; UNITS];

#[derive(Debug, PartialEq)]
enum State {
    Registering,
    Live,
    /// Deregistered. So many events were read, though not all of them may be applied yet.
    Gone(u32),
}

/// A change that no event has reported yet.
#[derive(Debug)]
struct Due {
    change: u64,
    units: Units,
    reason: u32,
    /// The counter after the change, unless it is still being made.
    latest: Option<u64>,
}

#[derive(Debug)]
pub struct Region {
    pub queue: usize,
    pub arena: usize,
    pub writable: bool,
    pub rkey: u32,
    /// The address of the arena, and the bytes of its units.
    start: u64,
    unit: u64,
    units: Units,
    state: State,
    /// How many events were read, and what they have reported.
    seen: u32,
    reported: Units,
    due: Vec<Due>,
    /// What may be reported as unmapped since it was settled, and ever.
    unmapped: Units,
    ever_unmapped: Units,
    /// The versions of the file, and those up to which all is reported.
    file: Option<&'static Versions>,
    versions: [u64; UNITS],
}

impl Region {
    pub fn new(
        arena: &Arena,
        range: Range<usize>,
        queue: usize,
        writable: bool,
        file: &'static Versions,
    ) -> Self {
        Self {
            queue,
            arena: arena.index,
            writable,
            rkey: 0,
            start: arena.at(0) as u64,
            unit: arena.unit() as u64,
            units: units(range),
            state: State::Registering,
            seen: 0,
            reported: 0,
            due: Vec::new(),
            unmapped: 0,
            ever_unmapped: 0,
            file: arena.kind.is_file().then_some(file),
            versions: [0; UNITS],
        }
    }

    /// Its units, and whether an event has reported each.
    pub fn units(&self) -> impl Iterator<Item = (usize, bool)> {
        let has = |set: Units, unit: usize| set & (1 << unit) != 0;
        let all = (0..UNITS).filter(move |&unit| has(self.units, unit));
        all.map(move |unit| (unit, has(self.reported, unit)))
    }

    fn version(&self, unit: usize) -> u64 {
        self.file.map_or(0, |file| file[unit].load(SeqCst))
    }

    fn may_be_unmapped(&mut self, set: Units) {
        self.unmapped |= set & self.units;
        self.ever_unmapped |= set & self.units;
    }

    fn apply(&mut self, event: &Record) {
        let Record { range, reasons, .. } = event;
        let [start, end] = [range.start, range.end].map(|at| at.wrapping_sub(self.start));
        let whole_pages = (start | end).is_multiple_of(PAGE as u64);
        let known = reasons & !(UNMAPPED | MAYBE_STALE) == 0;
        assert!(
            start < end && end <= UNITS as u64 * self.unit && whole_pages && known && *reasons != 0,
            "no event of this region: {event:?}, {self:x?}"
        );
        // The units that it touches, and those that it covers.
        let touched = units((start / self.unit) as usize..end.div_ceil(self.unit) as usize);
        let (first, last) = (start.div_ceil(self.unit), end / self.unit);
        let covered = units(first as usize..last.max(first) as usize);
        assert_eq!(touched & !self.units, 0, "beyond it: {event:?}, {self:x?}");
        if reasons & UNMAPPED != 0 {
            assert_ne!(self.unmapped, 0, "it is mapped: {event:?}, {self:x?}");
            // Other changes add to the range.
            let beyond = touched & !hull(self.unmapped);
            assert!(
                beyond == 0 || reasons & MAYBE_STALE != 0,
                "more than was unmapped: {event:?}, {self:x?}"
            );
        }

        self.seen += 1;
        self.reported |= touched;
        for due in &mut self.due {
            let in_time = due.latest.is_none_or(|latest| event.generation <= latest);
            if reasons & due.reason != 0 && in_time {
                due.units &= !covered;
            }
        }
        self.due.retain(|due| due.units != 0);
        if reasons & MAYBE_STALE != 0 {
            for unit in first as usize..last as usize {
                self.versions[unit] = self.version(unit);
            }
        }
    }

    /// Nobody changes anything, and all events have been applied.
    fn expect_settled(&mut self) {
        assert!(self.due.is_empty(), "an event is missing: {self:x?}");
        assert!(
            !matches!(self.state, State::Gone(_)),
            "fewer events than counted: {self:x?}"
        );
        for (unit, _) in self.units() {
            // What happens to the file while nothing is mapped does not concern the region.
            let mapped = self.ever_unmapped & (1 << unit) == 0;
            assert!(
                !mapped || self.versions[unit] == self.version(unit),
                "an event for unit {unit} of the file is missing: {self:x?}"
            );
        }
        self.unmapped = 0;
    }
}

/// What has been read from a queue.
#[derive(Default)]
struct Queue {
    generations: HashSet<u64>,
    deregistered: u64,
}

#[derive(Default)]
pub struct Model {
    queues: Vec<Queue>,
    regions: HashMap<u64, Region>,
    changes: u64,
    /// The changes that are being made and unmap: number, arena and units.
    unmapping: Vec<(u64, usize, Units)>,
}

impl Model {
    pub fn new(queues: usize) -> Self {
        Self {
            queues: (0..queues).map(|_| Queue::default()).collect(),
            ..Self::default()
        }
    }

    /// A region is going to be registered.
    pub fn add(&mut self, cookie: u64, mut region: Region) {
        for &(_, arena, set) in &self.unmapping {
            if arena == region.arena {
                region.may_be_unmapped(set);
            }
        }
        self.regions.insert(cookie, region);
    }

    /// It is. What is changed from now on is due.
    pub fn registered(&mut self, cookie: u64, rkey: u32) {
        let region = self.regions.get_mut(&cookie).expect("it was added");
        region.versions = std::array::from_fn(|unit| region.version(unit));
        (region.state, region.rkey) = (State::Live, rkey);
    }

    /// It is not, so that it has no events.
    pub fn failed(&mut self, cookie: u64) {
        let region = self.regions.remove(&cookie).expect("it was added");
        assert_eq!(region.seen, 0, "events of a failed registration");
    }

    /// A region was deregistered. The caller has applied all that was read from `own`.
    pub fn deregistered(&mut self, cookie: u64, count: u32, own: usize) {
        let region = self.regions.get_mut(&cookie).expect("it was registered");
        assert!(
            region.seen == count || region.seen < count && region.queue != own,
            "deregistration has returned {count}: {region:x?}"
        );
        self.queues[region.queue].deregistered += 1;
        region.state = State::Gone(count);
        region.due.clear();
        if region.seen == count {
            self.regions.remove(&cookie);
        }
    }

    /// A change begins that must be reported. Returns its number.
    pub fn begin(&mut self, arena: usize, set: Units, reason: u32) -> u64 {
        self.changes += 1;
        if reason == UNMAPPED {
            self.unmapping.push((self.changes, arena, set));
        }
        for region in self.regions.values_mut() {
            let concerned = region.units & set;
            if region.arena != arena || concerned == 0 {
                continue;
            }
            if reason == UNMAPPED {
                region.may_be_unmapped(set);
            }
            if region.state == State::Live {
                region.due.push(Due {
                    change: self.changes,
                    units: concerned,
                    reason,
                    latest: None,
                });
            }
        }
        self.changes
    }

    /// The change has been made, and then the counters of the queues were these.
    pub fn end(&mut self, change: u64, counters: &[u64]) {
        self.unmapping.retain(|&(number, ..)| number != change);
        for region in self.regions.values_mut() {
            let due = region.due.iter_mut().find(|due| due.change == change);
            if let Some(due) = due {
                due.latest = Some(counters[region.queue]);
            }
        }
    }

    /// These events were read from a queue at once, and then its counter was `counter`.
    pub fn apply(&mut self, queue: usize, events: &[Record], counter: u64) {
        let ordered = events.is_sorted_by(|a, b| a.generation < b.generation);
        assert!(ordered, "generations of one read(): {events:?}");
        for event in events {
            let new = self.queues[queue].generations.insert(event.generation);
            assert!(
                new && (1..=counter).contains(&event.generation),
                "a generation comes twice, or is not up to {counter}: {event:?}"
            );
            let region = self.regions.get_mut(&event.cookie);
            let region = region.unwrap_or_else(|| {
                panic!("not registered, or all its events were read: {event:?}")
            });
            assert_eq!(region.queue, queue, "the queue of {event:?}");
            region.apply(event);
            if region.state == State::Gone(region.seen) {
                self.regions.remove(&event.cookie);
            }
        }
    }

    /// A queue has been drained between two loads of its counter. Each event has advanced
    /// it by one, and so may have one of each region that was deregistered.
    pub fn expect_counter(&self, queue: usize, before: u64, after: u64) {
        let queue = &self.queues[queue];
        let (read, dropped) = (queue.generations.len() as u64, queue.deregistered);
        assert!(
            before <= read + dropped && read <= after,
            "{read} events read, up to {dropped} dropped; the counter was {before}, then {after}"
        );
    }

    /// Nobody changes the memory of these regions, and their queues have been drained.
    pub fn expect_settled(&mut self, which: impl Fn(&Region) -> bool) {
        let regions = self.regions.values_mut();
        regions
            .filter(|region| which(region))
            .for_each(Region::expect_settled);
    }

    /// The regions that are registered.
    pub fn live(&self) -> impl Iterator<Item = &Region> {
        let regions = self.regions.values();
        regions.filter(|region| region.state == State::Live)
    }
}

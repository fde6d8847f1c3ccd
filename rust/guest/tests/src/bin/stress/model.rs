// SPDX-License-Identifier: GPL-2.0
//! What a process knows of its regions: which events must still come, and which may.
//!
//! A change is *due* for each live region that it concerns. An event settles it if it is
//! applied after the change began, covers it with the right reason, and is not newer than the
//! counter was after the change. So the event of a later change does not hide a lost one.
//! The same holds for changes of the common files, also by another process.

use crate::{
    file::FileChanges,
    memory::{Arena, UNITS},
};
use std::{
    collections::{HashMap, HashSet},
    mem,
    ops::Range,
};
use uverbs_mmu_notify_tests::{MAYBE_STALE, PAGE, Record, UNMAPPED};

/// Units of an arena: bit `n` is unit `n`.
pub type Units = u32;

pub fn units(range: Range<usize>) -> Units {
    ((1_u64 << range.end) - (1 << range.start)) as Units
}

/// The smallest range of units that has all of these, which are some.
fn hull(set: Units) -> Units {
    units(set.trailing_zeros() as usize..set.ilog2() as usize + 1)
}

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
    /// The counter after the change, unless it is still being made,
    latest: Option<u64>,
    /// and then the events that may settle it: generation, and units that it covers.
    early: Vec<(u64, Units)>,
}

impl Due {
    fn new(change: u64, units: Units, reason: u32) -> Self {
        Self {
            change,
            units,
            reason,
            latest: None,
            early: Vec::new(),
        }
    }

    /// An event of its reason.
    fn apply(&mut self, generation: u64, covered: Units) {
        match self.latest {
            None => self.early.push((generation, covered)),
            Some(latest) if generation <= latest => self.units &= !covered,
            Some(_) => (),
        }
    }

    fn end(&mut self, latest: u64) {
        self.latest = Some(latest);
        for (generation, covered) in mem::take(&mut self.early) {
            self.apply(generation, covered);
        }
    }
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
    /// What may be reported as unmapped since it was settled.
    unmapped: Units,
    /// The index of its common file.
    which_file: Option<usize>,
}

impl Region {
    pub fn new(arena: &Arena, range: Range<usize>, queue: usize, writable: bool) -> Self {
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
            which_file: arena.kind.file(),
        }
    }

    /// Its units, and whether an event has reported each.
    pub fn units(&self) -> impl Iterator<Item = (usize, bool)> {
        let has = |set: Units, unit: usize| set & (1 << unit) != 0;
        let all = (0..UNITS).filter(move |&unit| has(self.units, unit));
        all.map(move |unit| (unit, has(self.reported, unit)))
    }

    fn may_be_unmapped(&mut self, set: Units) {
        self.unmapped |= set & self.units;
    }

    /// An event must report what is changed in these units.
    fn expect_event(&mut self, change: u64, set: Units, reason: u32) {
        let concerned = self.units & set;
        if self.state == State::Live && concerned != 0 {
            self.due.push(Due::new(change, concerned, reason));
        }
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
            if reasons & due.reason != 0 {
                due.apply(event.generation, covered);
            }
        }
        self.due.retain(|due| due.units != 0);
    }

    /// Nobody changes anything, and all events have been applied.
    fn expect_settled(&mut self) {
        assert!(self.due.is_empty(), "an event is missing: {self:x?}");
        assert!(
            !matches!(self.state, State::Gone(_)),
            "fewer events than counted: {self:x?}"
        );
        self.unmapped = 0;
    }
}

/// What has been read from a queue.
#[derive(Default)]
struct Queue {
    generations: HashSet<u64>,
    deregistered: u64,
}

pub struct Model {
    /// Of the processes that run at once.
    place: usize,
    queues: Vec<Queue>,
    regions: HashMap<u64, Region>,
    changes: u64,
    /// The changes that are being made and unmap: number, arena and units.
    unmapping: Vec<(u64, usize, Units)>,
    file: &'static FileChanges,
    /// How many changes of the files it knows, and the number of the last one here, if that is
    /// still being made.
    file_changes: u64,
    file_change: Option<u64>,
}

impl Model {
    pub fn new(place: usize, queues: usize, file: &'static FileChanges) -> Self {
        Self {
            place,
            queues: (0..queues).map(|_| Queue::default()).collect(),
            regions: HashMap::new(),
            changes: 0,
            unmapping: Vec::new(),
            file,
            file_changes: file.begun(),
            file_change: None,
        }
    }

    /// Takes over what has happened to the files. The caller does that before anything else.
    pub fn follow_file(&mut self) {
        // In this order: each change before the last one that has begun has ended.
        let begun = self.file.begun();
        let ended = self.file.ended();
        loop {
            let is_over = self.file_changes <= ended;
            if let Some(change) = self.file_change.take_if(|_| is_over) {
                let counters = self.file.counters(self.file_changes, self.place);
                self.settle(change, &counters);
            }
            if self.file_changes == begun {
                return;
            }
            self.file_changes += 1;
            self.changes += 1;
            self.file_change = Some(self.changes);
            let (which, units) = self.file.units(self.file_changes);
            let regions = self.regions.values_mut();
            for region in regions.filter(|region| region.which_file == Some(which)) {
                // What is not mapped is not concerned.
                let unmapped = self.unmapping.iter().filter(|(_, a, _)| *a == region.arena);
                let unmapped = unmapped.fold(0, |all, (.., set)| all | set);
                region.expect_event(self.changes, units & !unmapped, MAYBE_STALE);
            }
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
        let regions = self.regions.values_mut();
        for region in regions.filter(|region| region.arena == arena) {
            if reason == UNMAPPED {
                region.may_be_unmapped(set);
                // Perhaps the file is changed while this is not mapped.
                for due in &mut region.due {
                    if Some(due.change) == self.file_change {
                        due.units &= !set;
                    }
                }
            }
            region.expect_event(self.changes, set, reason);
        }
        self.changes
    }

    /// The change has been made, and then the counters of the queues were these.
    pub fn end(&mut self, change: u64, counters: &[u64]) {
        self.unmapping.retain(|&(number, ..)| number != change);
        self.settle(change, counters);
    }

    fn settle(&mut self, change: u64, counters: &[u64]) {
        for region in self.regions.values_mut() {
            let due = region.due.iter_mut().find(|due| due.change == change);
            if let Some(due) = due {
                due.end(counters[region.queue]);
            }
            region.due.retain(|due| due.units != 0);
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

    /// All regions are deregistered, and all that was read is applied.
    pub fn expect_end(&self) {
        assert!(self.regions.is_empty(), "fewer events than counted");
    }

    /// The regions that are registered.
    pub fn live(&self) -> impl Iterator<Item = &Region> {
        let regions = self.regions.values();
        regions.filter(|region| region.state == State::Live)
    }
}

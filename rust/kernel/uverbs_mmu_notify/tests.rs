// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! KUnit tests. Those of the queue change real mappings, those of the state only compute.

use super::{
    mm_of,
    queue::{
        self,
        Buffer,
        CounterPage,
        Queue,
        Watch, //
    },
    state::{
        Reason,
        Record,
        State, //
    },
};
use core::ops::Range;
use kernel::{
    bindings,
    error::to_result,
    mm::interval_notifier::{
        Event,
        Registration, //
    },
    page::PAGE_SIZE,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic, //
        },
        Arc, //
    }, //
};

const UNMAPPED: u32 = Reason::Unmapped as u32;
const MAYBE_STALE: u32 = Reason::MaybeStale as u32;
const EXITED: u32 = Reason::Exited as u32;

/// Creates a queue for an address space of its own, which the thread of a test does not have.
fn new_queue() -> Result<Arc<Queue>> {
    // SAFETY: Always safe to call in a thread of KUnit.
    to_result(unsafe { bindings::kunit_attach_mm() })?;
    Queue::new(mm_of(current!())?)
}

/// Pages of the current address space.
struct Map(usize);

impl Map {
    fn new(pages: usize) -> Result<Self> {
        // SAFETY: The current address space has no other user, so nobody relies on what is mapped.
        let addr = unsafe {
            bindings::vm_mmap(
                core::ptr::null_mut(),
                0,
                pages * PAGE_SIZE,
                (bindings::PROT_READ | bindings::PROT_WRITE) as usize,
                (bindings::MAP_PRIVATE | bindings::MAP_ANONYMOUS) as usize,
                0,
            )
        };

        // As `IS_ERR_VALUE()`.
        if addr >= (bindings::MAX_ERRNO as usize).wrapping_neg() {
            // CAST: An errno fits.
            return Err(Error::from_errno(addr as c_int));
        }
        Ok(Self(addr))
    }

    fn at(&self, pages: Range<usize>) -> Range<usize> {
        self.0 + pages.start * PAGE_SIZE..self.0 + pages.end * PAGE_SIZE
    }

    fn unmap(&self, pages: Range<usize>) -> Result {
        let Range { start, end } = self.at(pages);

        // SAFETY: As in `new()`.
        to_result(unsafe { bindings::vm_munmap(start, end - start) })
    }

    /// The record of `pages` being unmapped.
    fn record(&self, pages: Range<usize>, cookie: u64, generation: u64) -> Record {
        let Range { start, end } = self.at(pages);

        Record {
            cookie,
            start: start as u64,
            end: end as u64,
            generation,
            reasons: UNMAPPED,
            reserved: 0,
        }
    }
}

/// A buffer that can be written up to a fault.
struct Sink {
    records: KVec<Record>,
    /// How many records fit before the fault.
    room: usize,
}

impl Buffer for Sink {
    fn copy(&mut self, records: &[Record]) -> Result {
        if self.records.len() + records.len() > self.room {
            return Err(EFAULT);
        }
        // Called under a spinlock: the capacity is there.
        for record in records {
            self.records
                .push_within_capacity(*record)
                .map_err(|_| ENOMEM)?;
        }
        Ok(())
    }

    fn make_ready(&mut self, count: usize, _again: bool) -> Result<usize> {
        match (self.room - self.records.len()).min(count) {
            0 => Err(EFAULT),
            ready => Ok(ready),
        }
    }
}

/// A buffer that is ready as often as it is asked, and cannot be written to.
struct Stuck(u32);

impl Buffer for Stuck {
    fn copy(&mut self, _records: &[Record]) -> Result {
        Err(EFAULT)
    }

    fn make_ready(&mut self, count: usize, again: bool) -> Result<usize> {
        self.0 += 1;
        match (self.0, again) {
            (1, false) | (2, true) => Ok(count),
            (3, true) => Err(ERESTARTSYS),
            _ => Err(EINVAL),
        }
    }
}

/// A buffer of which others take pages away, again and again, while a signal is pending.
struct Contended(u32);

impl Buffer for Contended {
    fn copy(&mut self, _records: &[Record]) -> Result {
        self.0 += 1;
        match self.0 {
            1 | 3 | 4 => Err(EFAULT),
            _ => Ok(()),
        }
    }

    fn make_ready(&mut self, _count: usize, again: bool) -> Result<usize> {
        if again {
            Err(ERESTARTSYS)
        } else {
            Ok(1)
        }
    }
}

/// Reads up to `max` records to a buffer that faults after `room`.
fn read(queue: &Queue, max: usize, room: usize) -> Result<KVec<Record>> {
    let mut sink = Sink {
        records: KVec::with_capacity(max, GFP_KERNEL)?,
        room,
    };
    let count = queue.read(max, true, &mut sink)?;

    if count == sink.records.len() {
        Ok(sink.records)
    } else {
        Err(EINVAL)
    }
}

/// The counter, as userspace loads it.
fn generation(queue: &Queue) -> u64 {
    let page = core::ptr::from_ref(queue.page()).cast::<u8>();

    // SAFETY: This is where the page has its counter, and it lives as long as the queue.
    unsafe { &*page.add(CounterPage::GENERATION).cast::<Atomic<u64>>() }.load(Acquire)
}

/// Watches `pages` of `map`, but does not go live.
fn register(
    queue: &Arc<Queue>,
    map: &Map,
    pages: Range<usize>,
    cookie: u64,
) -> Result<Registration<Watch>> {
    Watch::new(
        queue.as_arc_borrow(),
        mm_of(current!())?,
        map.at(pages),
        cookie,
    )
}

/// Watches `pages` of `map`.
fn watch(
    queue: &Arc<Queue>,
    map: &Map,
    pages: Range<usize>,
    cookie: u64,
) -> Result<Registration<Watch>> {
    let registration = register(queue, map, pages, cookie)?;

    registration.object().as_arc_borrow().go_live();
    Ok(registration)
}

#[kunit_tests(ib_uverbs_mmu_notify_state)]
mod state {
    use super::*;

    #[test]
    fn reason_of_each_event() {
        let of = |event| Reason::of(event).map_or(0, |reason| reason as u32);

        assert_eq!(of(Event::UNMAP), UNMAPPED);
        assert_eq!(of(Event::CLEAR), MAYBE_STALE);
        assert_eq!(of(Event::RELEASE), EXITED);
        assert_eq!(of(Event::PROTECTION_VMA), 0);
        assert_eq!(of(Event::PROTECTION_PAGE), 0);
        assert_eq!(of(Event::SOFT_DIRTY), 0);
        assert_eq!(of(Event::MIGRATE), 0);
        assert_eq!(of(Event::EXCLUSIVE), 0);
    }

    #[test]
    fn hull_is_clipped() {
        let mut state = State::new(PAGE_SIZE + 0x100..5 * PAGE_SIZE + 0x200, 7);

        assert!(!state.go_live(0));
        assert!(!state.hit(0..PAGE_SIZE, Reason::Unmapped, 1));
        assert!(!state.hit(6 * PAGE_SIZE..7 * PAGE_SIZE, Reason::Unmapped, 1));
        assert_eq!(state.record().reasons, 0);
        assert!(state.hit(0..usize::MAX, Reason::Exited, 1));
        assert_eq!(state.record().start as usize, PAGE_SIZE + 0x100);
        assert_eq!(state.record().end as usize, 5 * PAGE_SIZE + 0x200);
    }

    #[test]
    fn pages_change_as_a_whole() {
        let mut state = State::new(PAGE_SIZE..5 * PAGE_SIZE, 7);

        state.go_live(0);
        assert!(state.hit(
            3 * PAGE_SIZE - 0x10..3 * PAGE_SIZE + 0x10,
            Reason::Unmapped,
            1
        ));
        assert_eq!(state.record().start as usize, 2 * PAGE_SIZE);
        assert_eq!(state.record().end as usize, 4 * PAGE_SIZE);
    }

    #[test]
    fn hits_merge() {
        let mut state = State::new(PAGE_SIZE..9 * PAGE_SIZE, 7);

        state.go_live(0);
        assert!(state.hit(6 * PAGE_SIZE..7 * PAGE_SIZE, Reason::Unmapped, 1));
        assert!(state.hit(2 * PAGE_SIZE..3 * PAGE_SIZE, Reason::MaybeStale, 2));
        let record = state.record();
        assert_eq!(record.cookie, 7);
        assert_eq!(record.start as usize, 2 * PAGE_SIZE);
        assert_eq!(record.end as usize, 7 * PAGE_SIZE);
        assert_eq!(record.generation, 2);
        assert_eq!(record.reasons, UNMAPPED | MAYBE_STALE);
    }

    #[test]
    fn delivery_begins_anew() {
        let mut state = State::new(PAGE_SIZE..9 * PAGE_SIZE, 7);

        state.go_live(0);
        state.hit(6 * PAGE_SIZE..7 * PAGE_SIZE, Reason::Unmapped, 1);
        state.delivered();
        assert_eq!(state.count(), 1);
        assert_eq!(state.record().reasons, 0);
        assert!(state.hit(2 * PAGE_SIZE..3 * PAGE_SIZE, Reason::MaybeStale, 2));
        assert_eq!(state.record().end as usize, 3 * PAGE_SIZE);
        assert_eq!(state.record().reasons, MAYBE_STALE);
    }

    #[test]
    fn hits_before_going_live_are_kept() {
        let mut state = State::new(PAGE_SIZE..9 * PAGE_SIZE, 7);

        assert!(!state.hit(2 * PAGE_SIZE..3 * PAGE_SIZE, Reason::MaybeStale, 1));
        assert!(state.go_live(5));
        assert_eq!(state.record().generation, 5);
        assert_eq!(state.record().start as usize, 2 * PAGE_SIZE);
    }
}

#[kunit_tests(ib_uverbs_mmu_notify_queue)]
mod queue_and_watches {
    use super::*;

    #[test]
    fn order_is_that_of_the_first_hit() -> Result {
        let queue = new_queue()?;
        let map = Map::new(4)?;
        let first = watch(&queue, &map, 0..1, 1)?;
        let second = watch(&queue, &map, 1..4, 2)?;

        map.unmap(3..4)?;
        map.unmap(0..1)?;
        map.unmap(1..2)?;
        assert_eq!(generation(&queue), 3);
        let records = read(&queue, 8, 8)?;
        assert_eq!(records.len(), 2);
        assert_eq!(records[0], map.record(1..4, 2, 3));
        assert_eq!(records[1], map.record(0..1, 1, 2));
        assert_eq!(read(&queue, 8, 8).err(), Some(EAGAIN));
        assert_eq!(queue::detach(first), 1);
        assert_eq!(queue::detach(second), 1);
        Ok(())
    }

    #[test]
    fn watched_anew_after_delivery() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = watch(&queue, &map, 0..2, 1)?;

        for page in 0..2 {
            map.unmap(page..page + 1)?;
            let records = read(&queue, 1, 1)?;
            assert_eq!(records[0], map.record(page..page + 1, 1, page as u64 + 1));
        }
        assert_eq!(queue::detach(watch), 2);
        Ok(())
    }

    #[test]
    fn born_stale() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = register(&queue, &map, 0..2, 1)?;

        map.unmap(1..2)?;
        assert_eq!(generation(&queue), 0);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        watch.object().as_arc_borrow().go_live();
        assert_eq!(generation(&queue), 1);
        assert_eq!(read(&queue, 1, 1)?[0], map.record(1..2, 1, 1));
        assert_eq!(queue::detach(watch), 1);
        Ok(())
    }

    #[test]
    fn failed_registration_reports_nothing() -> Result {
        let queue = new_queue()?;
        let map = Map::new(1)?;
        let watch = register(&queue, &map, 0..1, 1)?;

        map.unmap(0..1)?;
        assert_eq!(queue::detach(watch), 0);
        assert_eq!(generation(&queue), 0);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        Ok(())
    }

    #[test]
    fn more_than_a_batch() -> Result {
        const COUNT: usize = 40;
        let queue = new_queue()?;
        let map = Map::new(COUNT)?;
        let mut watches = KVec::with_capacity(COUNT, GFP_KERNEL)?;

        for page in 0..COUNT {
            let watch = watch(&queue, &map, page..page + 1, page as u64)?;
            watches.push(watch, GFP_KERNEL)?;
        }
        map.unmap(0..COUNT)?;
        // The first hit of one munmap() is that of any of them.
        let mut seen = [false; COUNT];
        for count in [33, COUNT - 33] {
            let records = read(&queue, 33, 33)?;
            assert_eq!(records.len(), count);
            for record in &records {
                seen[record.cookie as usize] = true;
            }
        }
        assert_eq!(seen, [true; COUNT]);
        for watch in watches {
            assert_eq!(queue::detach(watch), 1);
        }
        Ok(())
    }

    #[test]
    fn fault_consumes_nothing() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let first = watch(&queue, &map, 0..1, 1)?;
        let second = watch(&queue, &map, 1..2, 2)?;

        map.unmap(0..1)?;
        map.unmap(1..2)?;
        assert_eq!(read(&queue, 2, 0).err(), Some(EFAULT));
        assert_eq!(read(&queue, 2, 1)?.len(), 1);
        let records = read(&queue, 2, 2)?;
        assert_eq!(records.len(), 1);
        assert_eq!(records[0], map.record(1..2, 2, 2));
        assert_eq!(queue::detach(first), 1);
        assert_eq!(queue::detach(second), 1);
        Ok(())
    }

    #[test]
    fn fault_that_stays_ends_by_a_signal() -> Result {
        let queue = new_queue()?;
        let map = Map::new(1)?;
        let watch = watch(&queue, &map, 0..1, 1)?;

        map.unmap(0..1)?;
        assert_eq!(queue.read(1, true, &mut Stuck(0)).err(), Some(ERESTARTSYS));
        assert_eq!(read(&queue, 1, 1)?.len(), 1);
        assert_eq!(queue::detach(watch), 1);
        Ok(())
    }

    #[test]
    fn signal_does_not_end_a_read_half_way() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watches = [watch(&queue, &map, 0..1, 1)?, watch(&queue, &map, 1..2, 2)?];

        map.unmap(0..2)?;
        assert_eq!(queue.read(2, true, &mut Contended(0))?, 2);
        for watch in watches {
            assert_eq!(queue::detach(watch), 1);
        }
        Ok(())
    }

    #[test]
    fn watch_fits_its_slab() {
        // With the count of references. As the documentation says.
        assert!(size_of::<Watch>() + size_of::<usize>() <= 192);
    }

    #[test]
    fn dropped_registration_leaves_the_queue() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = watch(&queue, &map, 0..2, 1)?;

        map.unmap(0..1)?;
        drop(watch);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        Ok(())
    }

    #[test]
    fn detach_drops_what_is_pending() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = watch(&queue, &map, 0..2, 1)?;

        map.unmap(0..1)?;
        assert_eq!(queue::detach(watch), 0);
        map.unmap(1..2)?;
        assert_eq!(generation(&queue), 1);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        Ok(())
    }

    #[test]
    fn closed_queue() -> Result {
        let queue = new_queue()?;
        let map = Map::new(3)?;
        let watch = watch(&queue, &map, 0..3, 1)?;

        map.unmap(0..1)?;
        assert_eq!(read(&queue, 1, 1)?.len(), 1);
        map.unmap(1..2)?;
        queue.close();
        queue.close();
        assert_eq!(generation(&queue), 3);
        map.unmap(2..3)?;
        assert_eq!(generation(&queue), 3);
        assert_eq!(read(&queue, 1, 1).err(), Some(EIO));
        assert_eq!(register(&queue, &map, 0..1, 2).err(), Some(EIO));
        assert_eq!(queue::detach(watch), 1);
        Ok(())
    }

    #[test]
    fn refused_ranges() -> Result {
        let queue = new_queue()?;
        let try_watch = |range| {
            Watch::new(queue.as_arc_borrow(), mm_of(current!())?, range, 0).map(queue::detach)
        };

        assert_eq!(try_watch(PAGE_SIZE..PAGE_SIZE), Err(EINVAL));
        assert_eq!(try_watch(PAGE_SIZE..usize::MAX), Err(EINVAL));
        assert_eq!(try_watch(PAGE_SIZE..PAGE_SIZE + 1), Ok(0));
        Ok(())
    }
}

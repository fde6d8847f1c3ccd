// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! KUnit tests. The queue tests change real mappings; the state tests are pure computation.
//!
//! `uverbs_mmu_notify.rs` lists the guarantees that the comments name.

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
        Pending,
        Reason,
        Record,
        Region, //
    },
};
use core::{
    ops::Range,
    ptr, //
};
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

/// Attaches an address space to the test thread, which has none, and creates a queue for it.
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
                ptr::null_mut(),
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

    /// Returns the event for `pages` that were unmapped.
    fn event(&self, pages: Range<usize>, cookie: u64, generation: u64) -> Record {
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

/// A buffer that can be written up to a given point.
struct Sink {
    events: KVec<Record>,
    /// How many events fit before the fault.
    room: usize,
    /// A signal is pending.
    interrupted: bool,
}

impl Sink {
    fn new(max: usize, room: usize) -> Result<Self> {
        Ok(Self {
            events: KVec::with_capacity(max, GFP_KERNEL)?,
            room,
            interrupted: false,
        })
    }
}

impl Buffer for Sink {
    fn copy(&mut self, records: &[Record]) -> Result {
        if self.events.len() + records.len() > self.room {
            return Err(EFAULT);
        }
        // Called under a spinlock: the capacity is there.
        for record in records {
            self.events
                .push_within_capacity(*record)
                .map_err(|_| ENOMEM)?;
        }
        Ok(())
    }

    fn fault_in(&mut self, count: usize) -> Result<usize> {
        match (self.room - self.events.len()).min(count) {
            0 => Err(EFAULT),
            room => Ok(room),
        }
    }

    fn interrupted(&self) -> bool {
        self.interrupted
    }
}

/// A buffer that keeps losing its pages: only every `period`-th copy succeeds.
struct Contended {
    period: u32,
    copies: u32,
    since_success: u32,
}

impl Buffer for Contended {
    fn copy(&mut self, _records: &[Record]) -> Result {
        self.copies += 1;
        self.since_success += 1;
        if self.since_success < self.period {
            return Err(EFAULT);
        }
        self.since_success = 0;
        Ok(())
    }

    fn fault_in(&mut self, _count: usize) -> Result<usize> {
        Ok(1)
    }

    fn interrupted(&self) -> bool {
        false
    }
}

/// Reads up to `max` events to a buffer that faults after `room`.
fn read(queue: &Queue, max: usize, room: usize) -> Result<KVec<Record>> {
    let mut sink = Sink::new(max, room)?;
    let count = queue.read(max, true, &mut sink)?;

    if count == sink.events.len() {
        Ok(sink.events)
    } else {
        Err(EINVAL)
    }
}

/// Loads the generation as userspace does.
fn generation(queue: &Queue) -> u64 {
    queue.with_page(|page| {
        page.map_or(0, |page| {
            let page = ptr::from_ref(page).cast::<u8>();

            // SAFETY: The generation is at this offset, and the page is borrowed.
            unsafe { &*page.add(CounterPage::GENERATION).cast::<Atomic<u64>>() }.load(Acquire)
        })
    })
}

/// Starts watching `pages` of `map`, but does not go live.
fn start(
    queue: &Arc<Queue>,
    map: &Map,
    pages: Range<usize>,
    cookie: u64,
) -> Result<Registration<Watch>> {
    Watch::start(
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
    let registration = start(queue, map, pages, cookie)?;

    registration.object().as_arc_borrow().go_live();
    Ok(registration)
}

#[kunit_tests(ib_uverbs_mmu_notify_state)]
mod state {
    use super::*;

    /// Returns what userspace reads after an invalidation of `range` in the region `mr`.
    fn record(mr: Range<usize>, range: Range<usize>) -> Option<Record> {
        let region = Region::new(mr)?;
        let event = region.event(range, Reason::Unmapped)?;

        Some(region.record(event, 7, 1))
    }

    fn span(mr: Range<usize>, range: Range<usize>) -> Range<usize> {
        record(mr, range).map_or(0..0, |record| record.start as usize..record.end as usize)
    }

    /// G7: Changes that leave the pinned pages mapped are not reported.
    #[test]
    fn reason_of_each_event() {
        let of = |event| Reason::of(event).map_or(0, |reason| reason as u32);

        assert_eq!(of(Event::UNMAP), UNMAPPED);
        assert_eq!(of(Event::RELEASE), UNMAPPED);
        assert_eq!(of(Event::CLEAR), MAYBE_STALE);
        assert_eq!(of(Event::PROTECTION_VMA), 0);
        assert_eq!(of(Event::PROTECTION_PAGE), 0);
        assert_eq!(of(Event::SOFT_DIRTY), 0);
        assert_eq!(of(Event::MIGRATE), 0);
        assert_eq!(of(Event::EXCLUSIVE), 0);
    }

    /// G1: A change of any part of the MR is reported, clipped to the MR.
    #[test]
    fn clip_to_mr() {
        let mr = PAGE_SIZE + 0x100..5 * PAGE_SIZE + 0x200;

        assert!(record(mr.clone(), 0..PAGE_SIZE).is_none());
        assert!(record(mr.clone(), 6 * PAGE_SIZE..7 * PAGE_SIZE).is_none());
        assert_eq!(
            record(mr.clone(), 0..usize::MAX),
            Some(Record {
                cookie: 7,
                start: mr.start as u64,
                end: mr.end as u64,
                generation: 1,
                reasons: UNMAPPED,
                reserved: 0,
            })
        );
        assert_eq!(span(mr.clone(), 0..mr.start + 1), mr.start..2 * PAGE_SIZE);
        assert_eq!(
            span(mr.clone(), mr.end - 1..usize::MAX),
            5 * PAGE_SIZE..mr.end
        );
    }

    /// G1: Pages change as a whole.
    #[test]
    fn round_to_pages() {
        let mr = PAGE_SIZE..5 * PAGE_SIZE;

        assert_eq!(
            span(mr.clone(), 3 * PAGE_SIZE - 1..3 * PAGE_SIZE + 1),
            2 * PAGE_SIZE..4 * PAGE_SIZE
        );
        // The page of the first byte of the MR changes, though not this byte.
        assert_eq!(
            span(PAGE_SIZE + 0x100..5 * PAGE_SIZE, PAGE_SIZE..PAGE_SIZE + 1),
            PAGE_SIZE + 0x100..2 * PAGE_SIZE
        );
    }

    /// The last address that can be registered, and the first.
    #[test]
    fn ends_of_address_space() {
        let end = usize::MAX - (PAGE_SIZE - 1);

        assert_eq!(span(end - 1..end, 0..usize::MAX), end - 1..end);
        assert_eq!(span(0..1, 0..PAGE_SIZE), 0..1);
        assert_eq!(span(0..end, 0..usize::MAX), 0..end);
        assert!(Region::new(PAGE_SIZE..PAGE_SIZE).is_none());
    }

    /// G4: A merged event has the range that covers both, and all reasons.
    #[test]
    fn merge_events() -> Result {
        let region = Region::new(PAGE_SIZE..9 * PAGE_SIZE).ok_or(EINVAL)?;
        let event = |pages: Range<usize>, reason| {
            region.event(pages.start * PAGE_SIZE..pages.end * PAGE_SIZE, reason)
        };
        let late = event(6..7, Reason::Unmapped).ok_or(EINVAL)?;
        let early = event(2..3, Reason::MaybeStale).ok_or(EINVAL)?;
        let merged = region.record(late.merge(early), 7, 2);

        assert!(late.merge(early) == early.merge(late));
        assert!(late.merge(early).merge(late) == late.merge(early));
        assert!(late != Pending::NONE && early != Pending::NONE);
        assert_eq!(merged.start as usize, 2 * PAGE_SIZE);
        assert_eq!(merged.end as usize, 7 * PAGE_SIZE);
        assert_eq!(merged.reasons, UNMAPPED | MAYBE_STALE);
        assert_eq!(merged.generation, 2);
        Ok(())
    }

    /// An MR of 2^30 pages is reported to the page, a larger one in larger units.
    #[test]
    fn units_of_large_mr() {
        let limit = PAGE_SIZE << 30;
        let last = limit - PAGE_SIZE..limit;

        assert_eq!(span(0..limit, last.clone()), last.clone());
        assert_eq!(span(0..limit + 1, last), limit - 2 * PAGE_SIZE..limit);
        assert_eq!(
            span(0..limit + 1, limit..limit + PAGE_SIZE),
            limit..limit + 1
        );
    }

    /// A record has all of its event, whatever the units.
    #[test]
    fn event_of_record() -> Result {
        for size in [8 * PAGE_SIZE, (PAGE_SIZE << 30) + 1] {
            let region = Region::new(0..size).ok_or(EINVAL)?;
            let range = 3 * PAGE_SIZE..5 * PAGE_SIZE;
            let event = region.event(range, Reason::MaybeStale).ok_or(EINVAL)?;

            assert_eq!(region.pending(&region.record(event, 7, 1)), event);
        }
        Ok(())
    }
}

#[kunit_tests(ib_uverbs_mmu_notify_queue)]
mod queue_and_watches {
    use super::*;

    /// G2, G4: The generation advances once per event. Merging changes neither the generation nor
    /// the order.
    #[test]
    fn fifo_by_first_event() -> Result {
        let queue = new_queue()?;
        let map = Map::new(4)?;
        let first = watch(&queue, &map, 0..1, 1)?;
        let second = watch(&queue, &map, 1..4, 2)?;

        map.unmap(3..4)?;
        assert_eq!(generation(&queue), 1);
        map.unmap(0..1)?;
        assert_eq!(generation(&queue), 2);
        map.unmap(1..2)?;
        assert_eq!(generation(&queue), 2);
        let events = read(&queue, 8, 8)?;
        assert_eq!(events.len(), 2);
        assert_eq!(events[0], map.event(1..4, 2, 1));
        assert_eq!(events[1], map.event(0..1, 1, 2));
        assert_eq!(read(&queue, 8, 8).err(), Some(EAGAIN));
        assert_eq!(queue::stop(first), 1);
        assert_eq!(queue::stop(second), 1);
        Ok(())
    }

    /// G1: A watch queues again after delivery.
    #[test]
    fn queued_again_after_delivery() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = watch(&queue, &map, 0..2, 1)?;

        for page in 0..2 {
            map.unmap(page..page + 1)?;
            let events = read(&queue, 1, 1)?;
            assert_eq!(events[0], map.event(page..page + 1, 1, page as u64 + 1));
        }
        assert_eq!(queue::stop(watch), 2);
        Ok(())
    }

    /// G3: A change during registration is queued by go_live().
    #[test]
    fn born_stale() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = start(&queue, &map, 0..2, 1)?;

        map.unmap(1..2)?;
        assert_eq!(generation(&queue), 0);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        watch.object().as_arc_borrow().go_live();
        assert_eq!(generation(&queue), 1);
        // Without effect.
        watch.object().as_arc_borrow().go_live();
        assert_eq!(generation(&queue), 1);
        assert_eq!(read(&queue, 1, 1)?[0], map.event(1..2, 1, 1));
        assert_eq!(queue::stop(watch), 1);
        Ok(())
    }

    /// G3: No event is queued for a registration that fails.
    #[test]
    fn failed_registration_is_quiet() -> Result {
        let queue = new_queue()?;
        let map = Map::new(1)?;
        let watch = start(&queue, &map, 0..1, 1)?;
        let object = watch.object().clone();

        map.unmap(0..1)?;
        assert_eq!(queue::stop(watch), 0);
        object.as_arc_borrow().go_live();
        assert_eq!(generation(&queue), 0);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        Ok(())
    }

    /// G4: No event is lost if there are more than fit into a batch.
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
        assert_eq!(generation(&queue), COUNT as u64);
        // One munmap() calls the watches in any order.
        let mut seen = [false; COUNT];
        let mut next = 1;
        for count in [33, COUNT - 33] {
            let events = read(&queue, 33, 33)?;
            assert_eq!(events.len(), count);
            for event in &events {
                seen[event.cookie as usize] = true;
                assert_eq!(event.generation, next);
                next += 1;
            }
        }
        assert_eq!(seen, [true; COUNT]);
        for watch in watches {
            assert_eq!(queue::stop(watch), 1);
        }
        Ok(())
    }

    /// G4: An event that could not be copied stays pending, and is not counted.
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
        let events = read(&queue, 2, 2)?;
        assert_eq!(events.len(), 1);
        assert_eq!(events[0], map.event(1..2, 2, 2));
        assert_eq!(queue::stop(first), 1);
        assert_eq!(queue::stop(second), 1);
        Ok(())
    }

    /// G4: After a failed copy an invalidation still merges into the event.
    #[test]
    fn merge_after_fault() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = watch(&queue, &map, 0..2, 1)?;

        map.unmap(1..2)?;
        assert_eq!(read(&queue, 1, 0).err(), Some(EFAULT));
        map.unmap(0..1)?;
        assert_eq!(generation(&queue), 1);
        assert_eq!(read(&queue, 1, 1)?[0], map.event(0..2, 1, 1));
        assert_eq!(queue::stop(watch), 1);
        Ok(())
    }

    /// G4: read() gives up after 16 fault-ins in a row; the event stays pending.
    #[test]
    fn faults_in_a_row_are_bounded() -> Result {
        let queue = new_queue()?;
        let map = Map::new(1)?;
        let watch = watch(&queue, &map, 0..1, 1)?;
        let mut hopeless = Contended {
            period: 18,
            copies: 0,
            since_success: 0,
        };

        map.unmap(0..1)?;
        assert_eq!(queue.read(1, true, &mut hopeless).err(), Some(EFAULT));
        assert_eq!(hopeless.copies, 17);
        assert_eq!(read(&queue, 1, 1)?.len(), 1);
        assert_eq!(queue::stop(watch), 1);
        Ok(())
    }

    #[test]
    fn faults_with_progress_are_not_bounded() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watches = [watch(&queue, &map, 0..1, 1)?, watch(&queue, &map, 1..2, 2)?];
        let mut contended = Contended {
            period: 17,
            copies: 0,
            since_success: 0,
        };

        map.unmap(0..2)?;
        assert_eq!(queue.read(2, true, &mut contended)?, 2);
        assert_eq!(contended.copies, 34);
        for watch in watches {
            assert_eq!(queue::stop(watch), 1);
        }
        Ok(())
    }

    /// G4: A signal ends read() early; the other events stay pending.
    #[test]
    fn signal_after_progress() -> Result {
        const COUNT: usize = 20;
        let queue = new_queue()?;
        let map = Map::new(COUNT)?;
        let mut watches = KVec::with_capacity(COUNT, GFP_KERNEL)?;
        let mut sink = Sink::new(COUNT, COUNT)?;

        for page in 0..COUNT {
            let watch = watch(&queue, &map, page..page + 1, page as u64)?;
            watches.push(watch, GFP_KERNEL)?;
        }
        map.unmap(0..COUNT)?;
        sink.interrupted = true;
        assert_eq!(queue.read(COUNT, true, &mut sink)?, 16);
        assert_eq!(read(&queue, COUNT, COUNT)?.len(), COUNT - 16);
        for watch in watches {
            assert_eq!(queue::stop(watch), 1);
        }
        Ok(())
    }

    /// G8: Dropping the registration dequeues the watch.
    #[test]
    fn drop_dequeues() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = watch(&queue, &map, 0..2, 1)?;

        map.unmap(0..1)?;
        drop(watch);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        Ok(())
    }

    /// G5: A pending event is dropped and not counted.
    #[test]
    fn stop_dequeues() -> Result {
        let queue = new_queue()?;
        let map = Map::new(2)?;
        let watch = watch(&queue, &map, 0..2, 1)?;
        let object = watch.object().clone();

        map.unmap(0..1)?;
        assert_eq!(queue::stop(watch), 0);
        object.as_arc_borrow().go_live();
        map.unmap(1..2)?;
        assert_eq!(generation(&queue), 1);
        assert_eq!(read(&queue, 1, 1).err(), Some(EAGAIN));
        Ok(())
    }

    /// G8: A closed queue delivers nothing. Its watches can still be stopped, also after release.
    #[test]
    fn closed_queue() -> Result {
        let queue = new_queue()?;
        let map = Map::new(3)?;
        let pending = watch(&queue, &map, 0..3, 1)?;
        let idle = watch(&queue, &map, 2..3, 2)?;
        let late = start(&queue, &map, 2..3, 3)?;

        map.unmap(0..1)?;
        assert_eq!(read(&queue, 1, 1)?.len(), 1);
        map.unmap(1..2)?;
        queue.close();
        queue.close();
        assert_eq!(generation(&queue), 3);
        map.unmap(2..3)?;
        late.object().as_arc_borrow().go_live();
        assert_eq!(generation(&queue), 3);
        assert_eq!(read(&queue, 1, 1).err(), Some(EIO));
        assert_eq!(start(&queue, &map, 0..1, 4).err(), Some(EIO));
        queue.release();
        assert!(queue.with_page(|page| page.is_none()));
        assert_eq!(queue::stop(pending), 1);
        assert_eq!(queue::stop(idle), 0);
        assert_eq!(queue::stop(late), 0);
        Ok(())
    }

    #[test]
    fn range_checks() -> Result {
        let queue = new_queue()?;
        let try_start = |range| {
            Watch::start(queue.as_arc_borrow(), mm_of(current!())?, range, 0).map(queue::stop)
        };

        assert_eq!(try_start(PAGE_SIZE..PAGE_SIZE), Err(EINVAL));
        assert_eq!(try_start(PAGE_SIZE..usize::MAX), Err(EINVAL));
        assert_eq!(try_start(PAGE_SIZE..PAGE_SIZE + 1), Ok(0));
        Ok(())
    }
}

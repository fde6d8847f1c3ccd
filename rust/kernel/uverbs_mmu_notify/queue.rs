// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Watches, and the queue that their hits go to.
//!
//! # Locks
//!
//! The lock of a [`Queue`] also protects the state of each of its watches. The callback of the
//! notifier takes it, in the context of whoever changes a mapping. Nothing that sleeps, allocates
//! or frees happens under it, and the only lock that is taken under it is the one of the wait
//! queue, by a reader that goes to sleep. Waiters are woken after it has been released.
//!
//! # References
//!
//! A watch owns a reference to its queue. The queue owns one to a watch while a record of it waits
//! to be delivered, that is, while it is in the list. The watch lives longer than that: its
//! [`Registration`] owns another, until it has taken the watch out of the list.

use super::{
    state::{
        Reason,
        Record,
        State, //
    },
    trace, //
};
use core::{
    mem::offset_of,
    ops::Range,
    ptr, //
};
use kernel::{
    bindings,
    fs::File,
    list::{
        impl_list_arc_safe,
        impl_list_item,
        AtomicTracker,
        List,
        ListArc,
        ListLinks,
        TryNewListArc, //
    },
    mm::{
        interval_notifier::{
            self,
            impl_has_interval_notifier,
            IntervalNotifier,
            IntervalNotifierCallback,
            Invalidation,
            Registration, //
        },
        Mm,
        MmWithUser, //
    },
    new_spinlock,
    page::{
        page_align,
        PAGE_MASK,
        PAGE_SIZE, //
    },
    prelude::*,
    static_lock_class,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Release, //
        },
        lock::{
            spinlock::SpinLockBackend,
            Guard, //
        },
        poll::{
            PollCondVarBox,
            PollTable, //
        },
        Arc,
        ArcBorrow,
        LockedBy,
        SpinLock,
        UniqueArc, //
    }, //
};

/// The most records that are copied out under the lock at once.
///
/// The buffer may be slow, memory of a device for instance, and whoever changes a mapping waits.
const BATCH: usize = 16;

/// The page that userspace maps: `struct ib_uverbs_mmu_notify_page`.
#[repr(C)]
pub(crate) struct CounterPage {
    generation: Atomic<u64>,
    _rest: [u8; PAGE_SIZE - size_of::<u64>()],
}

impl CounterPage {
    /// The offset of the counter in the page, in bytes.
    pub(crate) const GENERATION: usize = offset_of!(Self, generation);
}

/// What an MMU notification FD reads from.
#[pin_data]
pub(crate) struct Queue {
    /// The address space of the creator: the only one that is watched, and that may read.
    mm: ARef<Mm>,
    page: VBox<CounterPage>,
    readers: PollCondVarBox,
    #[pin]
    inner: SpinLock<Inner>,
}

/// # Invariants
///
/// `pending` only holds watches whose `queue` is the one that this belongs to.
struct Inner {
    /// Watches that have been hit since the last delivery, in the order of their first hit.
    pending: List<Watch>,
    generation: u64,
    /// How many readers sleep.
    sleepers: u32,
    /// Somebody has polled, and may have been waiting ever since.
    polled: bool,
    closed: bool,
}

/// The record that one MR's range is observed.
#[pin_data]
pub(crate) struct Watch {
    #[pin]
    notifier: IntervalNotifier<Self>,
    queue: Arc<Queue>,
    state: LockedBy<State, Inner>,
    /// Only ever in `pending` of `queue`.
    #[pin]
    links: ListLinks,
    #[pin]
    tracker: AtomicTracker,
}

impl_list_arc_safe! {
    impl ListArcSafe<0> for Watch { tracked_by tracker: AtomicTracker; }
}

impl_list_item! {
    impl ListItem<0> for Watch { using ListLinks { self.links }; }
}

impl_has_interval_notifier! {
    impl HasIntervalNotifier for Watch { self.notifier }
}

impl Inner {
    /// The generation of the next hit.
    fn next_generation(&self) -> u64 {
        self.generation + 1
    }

    /// Fills `batch` with the oldest records and returns how many there are. They stay queued.
    fn peek(&self, batch: &mut [Record]) -> usize {
        batch
            .iter_mut()
            .zip(self.pending.iter())
            .map(|(record, watch)| *record = watch.state.access(self).record())
            .count()
    }

    /// Removes the oldest `count` records, which have been delivered.
    fn pop(&mut self, count: usize) {
        for _ in 0..count {
            // Dropped here, under the lock: the next hit must be able to queue the watch again.
            // It is not the last reference, see the top of this file.
            if let Some(watch) = self.pending.pop_front() {
                watch.state.access_mut(self).delivered();
            }
        }
    }
}

/// Where [`Queue::read`] puts records.
pub(crate) trait Buffer {
    /// Copies records to the end of what has been copied, or fails, having copied none.
    ///
    /// Called under the lock of the queue: must neither sleep nor fault.
    fn copy(&mut self, records: &[Record]) -> Result;

    /// Does what can be done, after `copy` has failed, to let it succeed. May sleep.
    ///
    /// `again` tells that this succeeded, and yet `copy` failed, and that nothing has been copied.
    /// Returns how many of the next `count` records may be copied now, at least one. Fails with
    /// `EFAULT` if none may, with `EINTR` if the task is being killed, and with `ERESTARTSYS` if it
    /// is `again` and a signal is pending.
    fn make_ready(&mut self, count: usize, again: bool) -> Result<usize>;
}

impl Queue {
    /// Creates a queue for watches in `mm`, and sets up the notifier tree of `mm`.
    ///
    /// Fails with `EINTR` if a signal is pending, and with `ENOMEM`. Process context, may sleep.
    pub(crate) fn new(mm: &MmWithUser) -> Result<Arc<Self>> {
        interval_notifier::prepare(mm)?;

        let page = VBox::init(
            init!(CounterPage {
                generation: Atomic::new(0),
                _rest <- pin_init::init_zeroed(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        Arc::pin_init(
            try_pin_init!(Self {
                mm: ARef::from(&**mm),
                page,
                readers: PollCondVarBox::new(c"uverbs_mmu_notify", static_lock_class!())?,
                inner <- new_spinlock!(Inner {
                    pending: List::new(),
                    generation: 0,
                    sleepers: 0,
                    polled: false,
                    closed: false,
                }, "uverbs_mmu_notify"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Returns the page with the counter.
    pub(crate) fn page(&self) -> &CounterPage {
        &self.page
    }

    /// Returns whether `mm` is the address space of the creator.
    pub(crate) fn belongs_to(&self, mm: &Mm) -> bool {
        ptr::eq(mm, &*self.mm)
    }

    /// Makes the next generation visible to userspace.
    fn bump(&self, inner: &mut Inner) {
        inner.generation = inner.next_generation();
        // Release: whoever loads this value with acquire order, and then reads the FD, finds all
        // that was queued before.
        self.page.generation.store(inner.generation, Release);
    }

    /// Sleeps until there is something to read. The lock is released meanwhile.
    ///
    /// Returns early without error now and then, and with `ERESTARTSYS` if a signal is pending and
    /// there is still nothing.
    fn wait(&self, inner: &mut Guard<'_, Inner, SpinLockBackend>) -> Result {
        inner.sleepers += 1;
        let signal = self.readers.wait_interruptible(inner);
        inner.sleepers -= 1;

        if signal && inner.pending.is_empty() && !inner.closed {
            Err(ERESTARTSYS)
        } else {
            Ok(())
        }
    }

    /// Copies up to `max` records to `buffer` and returns how many, which is not zero.
    ///
    /// Fewer than `max` means that there were no more at that moment, unless the buffer faulted.
    /// If nothing is queued it sleeps, or fails with `EAGAIN` if `nonblock`. Fails with `EIO` if
    /// the queue is closed and with what [`Buffer::make_ready`] fails with; then no record is
    /// removed. Process context, may sleep.
    pub(crate) fn read(
        &self,
        max: usize,
        nonblock: bool,
        buffer: &mut impl Buffer,
    ) -> Result<usize> {
        let mut batch = [Record::default(); BATCH];
        // How many the buffer was made ready for, if the last copy has failed.
        let mut ready = None;
        let mut done = 0;

        while done < max {
            let mut inner = self.inner.lock();

            if inner.closed {
                return if done == 0 { Err(EIO) } else { Ok(done) };
            }

            let count = inner.peek(&mut batch[..ready.unwrap_or(BATCH).min(max - done)]);
            if count == 0 {
                if done != 0 {
                    break;
                }
                if nonblock {
                    return Err(EAGAIN);
                }
                self.wait(&mut inner)?;
                ready = None;
                continue;
            }

            // Delivery and count are one step: after a deregistration has returned the count,
            // nothing more is copied out.
            if buffer.copy(&batch[..count]).is_ok() {
                inner.pop(count);
                for record in &batch[..count] {
                    trace::deliver(self, record);
                }
                done += count;
                ready = None;
                continue;
            }
            drop(inner);

            // After progress a signal must not end it, since a short count means something else.
            ready = match buffer.make_ready(count, done == 0 && ready.is_some()) {
                Ok(ready) => Some(ready),
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            };
        }

        Ok(done)
    }

    /// Registers `table` with the queue and returns the mask of what is ready.
    ///
    /// Process context, may sleep.
    pub(crate) fn poll(&self, file: &File, table: PollTable<'_>) -> c_uint {
        // Before the test below, so that nothing falls in between.
        table.register_wait(file, &self.readers);

        let mut inner = self.inner.lock();
        inner.polled = true;
        if inner.closed {
            bindings::POLLERR
        } else if inner.pending.is_empty() {
            0
        } else {
            bindings::POLLIN | bindings::POLLRDNORM
        }
    }

    /// Ends all delivery, with one last bump of the counter. Idempotent.
    ///
    /// What waits to be delivered is not delivered, nor counted, any more. Watches stay until they
    /// are detached, but report nothing. Process context.
    pub(crate) fn close(&self) {
        let mut inner = self.inner.lock();
        if inner.closed {
            return;
        }
        inner.closed = true;
        self.bump(&mut inner);
        drop(inner);

        self.readers.notify_all();
    }
}

impl Watch {
    /// Starts to observe the addresses `range`, untagged, the end not included, of `mm`.
    ///
    /// Nothing is reported before [`Watch::go_live`], but all changes of the mapping after the
    /// return of this function are seen. Goes on until the registration is dropped or [`detach`]ed.
    ///
    /// Fails with `EPERM` if `mm` is not that of the creator of the queue, with `EINVAL` if the
    /// range is empty or its pages reach to the end of the addresses, with `EIO` if the queue is
    /// closed, and with `ENOMEM`. Process context; sleeps, maybe until unrelated invalidations in
    /// `mm` are over; `mmap_lock` must not be held.
    pub(crate) fn new(
        queue: ArcBorrow<'_, Queue>,
        mm: &MmWithUser,
        range: Range<usize>,
        cookie: u64,
    ) -> Result<Registration<Self>> {
        if !queue.belongs_to(mm) {
            return Err(EPERM);
        }
        if range.is_empty() {
            return Err(EINVAL);
        }
        // Closed later on, the watch is of no use, but does no harm.
        if queue.inner.lock().closed {
            return Err(EIO);
        }

        let pages = range.start & PAGE_MASK..page_align(range.end).ok_or(EINVAL)?;
        let state = State::new(range.clone(), cookie);
        let watch = UniqueArc::pin_init(
            pin_init!(Self {
                notifier <- IntervalNotifier::new(),
                state: LockedBy::new(&queue.inner, state),
                queue: queue.into(),
                links <- ListLinks::new(),
                tracker <- AtomicTracker::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        let registration = Registration::insert(watch, mm, pages)?;
        trace::attach(&queue, cookie, &range);
        registration.wait_for_in_flight();
        Ok(registration)
    }

    /// Queues the watch that was hit, unless it is queued already, bumps the counter, and unlocks.
    ///
    /// # Panics
    ///
    /// If `inner` is not that of the queue of the watch.
    fn report(self: ArcBorrow<'_, Self>, mut inner: Guard<'_, Inner, SpinLockBackend>) {
        self.state.access(&inner);
        let queue = &self.queue;
        // Whoever waits does so for an empty queue to become another.
        let wake = inner.pending.is_empty() && (inner.sleepers != 0 || inner.polled);

        // There is no `ListArc` to be had of a watch that is in the list.
        if let Some(watch) = ListArc::try_from_arc_borrow(self) {
            // INVARIANT: `inner` belongs to the queue of the watch, or we had not come here.
            inner.pending.push_back(watch);
        }
        queue.bump(&mut inner);
        drop(inner);

        if wake {
            queue.readers.notify_all();
        }
    }

    /// Starts to report, beginning with what has been hit since [`Watch::new`]. Cannot fail.
    ///
    /// Process context, does not sleep.
    pub(crate) fn go_live(self: ArcBorrow<'_, Self>) {
        let mut inner = self.queue.inner.lock();
        let generation = inner.next_generation();

        if self.state.access_mut(&mut inner).go_live(generation) && !inner.closed {
            self.report(inner);
        }
    }
}

impl IntervalNotifierCallback for Watch {
    fn invalidate(this: ArcBorrow<'_, Self>, invalidation: &Invalidation) {
        let Some(reason) = Reason::of(invalidation.event()) else {
            return;
        };

        let mut inner = this.queue.inner.lock();
        let generation = inner.next_generation();
        let state = this.state.access_mut(&mut inner);
        let cookie = state.cookie();
        let reported = state.hit(invalidation.range(), reason, generation) && !inner.closed;

        trace::hit(
            &this.queue,
            cookie,
            invalidation,
            reported.then_some(generation),
        );
        if reported {
            this.report(inner);
        }
    }

    fn removed(this: ArcBorrow<'_, Self>) {
        let mut inner = this.queue.inner.lock();
        // SAFETY: `links` is only ever in the list `pending` of a queue: that is the only list of
        // this type, and it is never moved to another. By the invariant of `Inner` it is that of
        // the queue of the watch, which never changes, and `inner` belongs to this one.
        let queued = unsafe { inner.pending.remove(&this) };
        let state = this.state.access(&inner);
        let (cookie, count) = (state.cookie(), state.count());
        drop(inner);

        trace::detach(&this.queue, cookie, count);
        drop(queued);
    }
}

/// Ends a watch and returns how many of its records have been delivered, modulo 2^32.
///
/// A record that waits to be delivered is dropped, and not counted. After the return there is no
/// delivery any more. Process context; sleeps, maybe until unrelated invalidations in the address
/// space are over; no lock that is held around an invalidation may be held.
pub(crate) fn detach(registration: Registration<Watch>) -> u32 {
    let watch = registration.remove();
    let inner = watch.queue.inner.lock();

    watch.state.access(&inner).count()
}

// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Watches, and the queue that their hits go to.
//!
//! # Locks
//!
//! The lock of a [`Queue`] also protects the [`Entry`] of each of its watches. It is a leaf: the
//! callback of the notifier takes it in the context of whoever changes a mapping. Nothing that
//! sleeps, allocates, frees or takes another lock happens under it, and waiters are woken after it
//! has been released.
//!
//! # References
//!
//! A watch owns a reference to its queue. The queue owns one to a watch only while a record of it
//! waits to be delivered; at other times the watch keeps that reference, its [`ListArc`], in its
//! own entry. [`detach`] takes it away from either.

use super::state::{
    Reason,
    Record,
    State, //
};
use core::{
    cell::UnsafeCell,
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
#[repr(C)]
#[pin_data]
pub(crate) struct Watch {
    #[pin]
    notifier: IntervalNotifier<Self>,
    queue: Arc<Queue>,
    entry: UnsafeCell<Entry>,
    #[pin]
    links: ListLinks,
    #[pin]
    tracker: AtomicTracker,
}

// With the reference count of its `Arc` a watch fits in kmalloc-192.
const _: () = assert!(size_of::<Watch>() <= 192 - size_of::<usize>());

/// The part of a watch that the lock of its queue protects.
struct Entry {
    /// The reference to put into the queue, or `None` while it is there.
    idle: Option<ListArc<Watch>>,
    state: State,
}

// SAFETY: The fields other than `entry` may be sent to another thread, and so may what it holds: a
// reference to a `Watch`, for which this promise is made here, and plain data.
unsafe impl Send for Watch {}
// SAFETY: The fields other than `entry` may be shared, and `entry` is accessed only by methods of
// `Locked`, that is, under the lock of the queue.
unsafe impl Sync for Watch {}

impl_list_arc_safe! {
    impl ListArcSafe<0> for Watch { tracked_by tracker: AtomicTracker; }
}

impl_list_item! {
    impl ListItem<0> for Watch { using ListLinks { self.links }; }
}

impl_has_interval_notifier! {
    impl HasIntervalNotifier for Watch { self.notifier }
}

/// A queue whose lock is held.
///
/// # Invariants
///
/// `inner` is a guard of the lock of `queue`.
struct Locked<'a> {
    queue: &'a Queue,
    inner: Guard<'a, Inner, SpinLockBackend>,
}

impl Locked<'_> {
    /// Returns the entry of a watch of this queue. Panics if it belongs to another queue.
    ///
    /// Like [`LockedBy`](kernel::sync::LockedBy), which would need one more word in each watch to
    /// know its owner.
    fn entry<'a>(&'a self, watch: &'a Watch) -> &'a Entry {
        assert!(ptr::eq(self.queue, &*watch.queue));

        // SAFETY: The queue of a watch never changes. Its lock is held by the type invariants, so
        // that there is no other `Locked` for it, and this one is borrowed for as long as the
        // result is, so that nobody has a mutable reference.
        unsafe { &*watch.entry.get() }
    }

    /// Like [`Self::entry`], to change it.
    fn entry_mut<'a>(&'a mut self, watch: &'a Watch) -> &'a mut Entry {
        assert!(ptr::eq(self.queue, &*watch.queue));

        // SAFETY: The queue of a watch never changes. Its lock is held by the type invariants, so
        // that there is no other `Locked` for it, and this one is borrowed mutably for as long as
        // the result is, so that nobody has another reference.
        unsafe { &mut *watch.entry.get() }
    }

    /// Lets a watch keep the reference to itself.
    fn set_idle(&mut self, watch: ListArc<Watch>) {
        let entry: *mut Entry = self.entry_mut(&watch);

        // SAFETY: `entry_mut()` has shown that this is the entry of a watch of this queue, which is
        // still borrowed mutably. It is a part of the object that `watch` points at, and that does
        // not move with the pointer.
        unsafe { (*entry).idle = Some(watch) };
    }

    /// The generation of the next hit.
    fn next_generation(&self) -> u64 {
        self.inner.generation + 1
    }

    /// Makes the next generation visible to userspace.
    fn bump(&mut self) {
        let generation = self.next_generation();

        self.inner.generation = generation;
        // Release: whoever loads this value with acquire order, and then reads the FD, finds all
        // that was queued before.
        self.queue.page.generation.store(generation, Release);
    }

    /// Queues a watch that was hit unless it is queued already, and bumps the counter.
    fn report(mut self, watch: &Watch) {
        let idle = self.entry_mut(watch).idle.take();
        let wake = idle.is_some() && (self.inner.sleepers != 0 || self.inner.polled);
        let queue = self.queue;

        if let Some(watch) = idle {
            self.inner.pending.push_back(watch);
        }
        self.bump();
        drop(self);

        if wake {
            queue.readers.notify_all();
        }
    }

    /// Fills `batch` with the oldest records and returns how many there are. They stay queued.
    fn peek(&self, batch: &mut [Record]) -> usize {
        batch
            .iter_mut()
            .zip(self.inner.pending.iter())
            .map(|(record, watch)| *record = self.entry(&watch).state.record())
            .count()
    }

    /// Removes the oldest `count` records, which have been delivered.
    fn pop(&mut self, count: usize) {
        for _ in 0..count {
            if let Some(watch) = self.inner.pending.pop_front() {
                self.entry_mut(&watch).state.delivered();
                self.set_idle(watch);
            }
        }
    }

    /// Sleeps until there is something to read. The lock is released meanwhile.
    ///
    /// Returns early without error now and then, and with `ERESTARTSYS` if a signal is pending and
    /// there is still nothing.
    fn wait(&mut self) -> Result {
        self.inner.sleepers += 1;
        let signal = self.queue.readers.wait_interruptible(&mut self.inner);
        self.inner.sleepers -= 1;

        if signal && self.inner.pending.is_empty() && !self.inner.closed {
            Err(ERESTARTSYS)
        } else {
            Ok(())
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
    /// Returns how many of the next `count` records may be copied now, at least one. Fails with
    /// `EFAULT` if none may, and with `ERESTARTSYS` if a signal is pending.
    fn make_ready(&mut self, count: usize) -> Result<usize>;
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

    fn lock(&self) -> Locked<'_> {
        // INVARIANT: This is the lock of `self`.
        Locked {
            queue: self,
            inner: self.inner.lock(),
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
        let mut ready = BATCH;
        let mut done = 0;

        while done < max {
            let mut queue = self.lock();

            if queue.inner.closed {
                return if done == 0 { Err(EIO) } else { Ok(done) };
            }

            let count = queue.peek(&mut batch[..ready.min(max - done)]);
            if count == 0 {
                if done != 0 {
                    break;
                }
                if nonblock {
                    return Err(EAGAIN);
                }
                queue.wait()?;
                continue;
            }

            // Delivery and count are one step: after a deregistration has returned the count,
            // nothing more is copied out.
            if buffer.copy(&batch[..count]).is_ok() {
                queue.pop(count);
                done += count;
                ready = BATCH;
                continue;
            }
            drop(queue);

            ready = match buffer.make_ready(count) {
                Ok(ready) => ready,
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

        let mut queue = self.lock();
        queue.inner.polled = true;
        if queue.inner.closed {
            bindings::POLLERR
        } else if queue.inner.pending.is_empty() {
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
        let mut queue = self.lock();
        if queue.inner.closed {
            return;
        }
        queue.inner.closed = true;
        queue.bump();
        drop(queue);

        self.readers.notify_all();
    }
}

impl Watch {
    /// Starts to observe the addresses `range`, untagged, the end not included, of `mm`.
    ///
    /// Nothing is reported before [`Watch::go_live`], but all changes of the mapping after the
    /// return of this function are seen. Must be undone by [`detach`].
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

        let pages = range.start & PAGE_MASK..page_align(range.end).ok_or(EINVAL)?;
        let watch = UniqueArc::pin_init(
            pin_init!(Self {
                notifier <- IntervalNotifier::new(),
                queue: queue.into(),
                entry: UnsafeCell::new(Entry {
                    idle: None,
                    state: State::new(range, cookie),
                }),
                links <- ListLinks::new(),
                tracker <- AtomicTracker::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        let registration = Registration::insert(watch, mm, pages)?;
        // Nobody else has made one of the new object; while it is not live nobody looks for it.
        let idle = ListArc::try_from_arc(registration.object().clone()).map_err(|_| EBUSY)?;

        let mut locked = queue.lock();
        if locked.inner.closed {
            return Err(EIO);
        }
        locked.set_idle(idle);
        drop(locked);

        registration.wait_for_in_flight();
        Ok(registration)
    }

    /// Starts to report, beginning with what has been hit since [`Watch::new`]. Cannot fail.
    ///
    /// Any context that may take a spinlock.
    pub(crate) fn go_live(&self) {
        let mut queue = self.queue.lock();
        let generation = queue.next_generation();

        if queue.entry_mut(self).state.go_live(generation) && !queue.inner.closed {
            queue.report(self);
        }
    }
}

impl IntervalNotifierCallback for Watch {
    fn invalidate(this: ArcBorrow<'_, Self>, invalidation: &Invalidation) {
        let Some(reason) = Reason::of(invalidation.event()) else {
            return;
        };

        let mut queue = this.queue.lock();
        let generation = queue.next_generation();
        let state = &mut queue.entry_mut(&this).state;

        if state.hit(invalidation.range(), reason, generation) && !queue.inner.closed {
            queue.report(&this);
        }
    }
}

/// Ends a watch and returns how many of its records have been delivered, modulo 2^32.
///
/// A record that waits to be delivered is dropped, and not counted. After the return there is no
/// delivery any more. Process context; sleeps, maybe until unrelated invalidations in the address
/// space are over; no lock that is held around an invalidation may be held.
pub(crate) fn detach(registration: Registration<Watch>) -> u32 {
    // The callback has to end first: it would queue the watch again.
    let watch = registration.remove();

    let mut queue = watch.queue.lock();
    let reference = match queue.entry_mut(&watch).idle.take() {
        // SAFETY: A watch is put into a list in one place, `Locked::report()`, and that is the
        // list of its queue, which never changes.
        None => unsafe { queue.inner.pending.remove(&watch) },
        idle => idle,
    };
    let delivered = queue.entry_mut(&watch).state.detach();
    drop(queue);

    // Not under the lock: it may be the last reference but one.
    drop(reference);
    delivered
}

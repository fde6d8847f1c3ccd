// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Watches, and the queue that their events go to.
//!
//! # Events
//!
//! A watch has at most one pending event, kept in [`Watch::pending`]. The first invalidation queues
//! it and advances the generation; both happen under the lock of the queue. Further invalidations
//! merge into it by compare-exchange. They take no lock and leave the generation alone, for it is
//! already ahead of all that has been delivered. So the only shared memory that an invalidation of
//! a watch with a pending event writes to is its own watch.
//!
//! # Locks
//!
//! In this order:
//!
//! - [`Queue::reader`]: held while events are copied out, by one task at a time; not while it waits
//!   for events or faults in its buffer. Keeps concurrent readers away from the next lock.
//! - [`Queue::inner`]: also protects the [`State`] of each watch of the queue. Taken by the
//!   callback of the notifier. Nothing sleeps, allocates or frees memory under it.
//! - The lock of the wait queue. A reader takes it under `inner` before it sleeps. Waiters are
//!   woken without `inner`.
//!
//! # References
//!
//! A watch owns a reference to its queue. The queue owns one to each watch in its list. It is never
//! the last one: the [`Registration`] of the watch owns another until it has taken the watch out of
//! the list.

use super::{
    state::{
        Pending,
        Reason,
        Record,
        Region, //
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
    new_mutex,
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
            Acquire,
            Atomic,
            Full,
            Relaxed,
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
        Mutex,
        SpinLock,
        UniqueArc, //
    }, //
};

/// The most events that are copied out under the lock at once.
///
/// The buffer may be slow, device memory for example, and invalidations wait for the lock.
const BATCH: usize = 16;

/// How often in a row [`Queue::read`] faults in its buffer before it gives up.
const MAX_FAULTS: u32 = 16;

/// What poll() reports if an event is pending.
const READABLE: u32 = bindings::POLLIN | bindings::POLLRDNORM;

/// The page that userspace maps: `struct ib_uverbs_mmu_notify_page`.
#[repr(C)]
pub(crate) struct CounterPage {
    generation: Atomic<u64>,
    _rest: [u8; PAGE_SIZE - size_of::<u64>()],
}

impl CounterPage {
    /// The offset of the generation in the page, in bytes.
    pub(crate) const GENERATION: usize = offset_of!(Self, generation);
}

/// Collects events and backs one notification FD.
#[pin_data]
pub(crate) struct Queue {
    /// The address space of the creator, the only one that can be watched and that can read.
    mm: ARef<Mm>,
    /// Blocked readers, exclusively, and pollers.
    waiters: PollCondVarBox,
    /// What poll() reports: `READABLE`, `POLLERR` or zero. Written under `inner`.
    ready: Atomic<u32>,
    #[pin]
    reader: Mutex<()>,
    #[pin]
    inner: SpinLock<Inner>,
}

/// # Invariants
///
/// - `pending` only contains watches whose `queue` is the one that this belongs to.
/// - A watch in `pending` has a pending event and is live.
struct Inner {
    /// Watches with a pending event, in the order in which the generation advanced for them.
    pending: List<Watch>,
    generation: u64,
    /// `None` once nobody can map it any longer.
    page: Option<VBox<CounterPage>>,
    closed: bool,
}

/// Where a watch is between registration and deregistration of its MR.
#[derive(PartialEq, Eq)]
enum Phase {
    /// Invalidations are remembered.
    Registering,
    /// Invalidations are queued.
    Live,
    /// The notifier has been removed.
    Stopped,
}

/// What the lock of the queue protects of a watch.
struct State {
    /// Of the pending event.
    generation: u64,
    /// How many events have been delivered, modulo 2^32.
    delivered: u32,
    phase: Phase,
}

/// Observes the address range of one MR.
///
/// In the order of this declaration, so that an invalidation that merges touches two cache lines:
/// the one of the tree node, and the next.
#[pin_data]
#[repr(C)]
pub(crate) struct Watch {
    #[pin]
    notifier: IntervalNotifier<Self>,
    queue: Arc<Queue>,
    /// The pending event, a [`Pending`].
    ///
    /// It changes to and from [`Pending::NONE`] only under the lock of the queue. Other changes
    /// only add to the event.
    pending: Atomic<u64>,
    region: Region,
    cookie: u64,
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

/// Receives the events of [`Queue::read`].
pub(crate) trait Buffer {
    /// Appends `records`, or fails and appends none.
    ///
    /// Called with the lock of the queue held: must neither sleep nor take a page fault.
    fn copy(&mut self, records: &[Record]) -> Result;

    /// Faults in the memory for the next `count` records, after [`Self::copy`] has failed.
    ///
    /// Returns for how many it did, at least one. Fails with `EFAULT` if it cannot. May sleep.
    fn fault_in(&mut self, count: usize) -> Result<usize>;

    /// Returns whether a signal is pending, and lets other tasks run. May sleep.
    fn interrupted(&self) -> bool;
}

impl Inner {
    /// Advances the generation and makes it visible to userspace.
    fn advance(&mut self) -> u64 {
        self.generation += 1;
        if let Some(page) = &self.page {
            // Release: a reader that loads this value with acquire order finds all events that were
            // queued before.
            page.generation.store(self.generation, Release);
        }
        self.generation
    }

    /// Copies the oldest events to `buffer`, as many as `records` has room for, counts and removes
    /// them.
    ///
    /// This is one step for other holders of the lock, so that no event is delivered after
    /// deregistration has returned the count. Returns how many events there were, as an error if
    /// the copy failed: nothing has changed then.
    fn deliver(
        &mut self,
        buffer: &mut impl Buffer,
        records: &mut [Record],
    ) -> Result<usize, usize> {
        let mut taken = [Pending::NONE; BATCH];
        let mut count = 0;

        for ((record, taken), watch) in records.iter_mut().zip(&mut taken).zip(self.pending.iter())
        {
            // Taken before the copy: an invalidation either has merged into what is copied, or
            // finds no event and waits for the lock. Relaxed: the lock orders everything else.
            *taken = watch.pending.xchg(Pending::NONE.into(), Relaxed).into();
            let generation = watch.state.access(self).generation;
            *record = watch.region.record(*taken, watch.cookie, generation);
            count += 1;
        }

        if buffer.copy(&records[..count]).is_err() {
            for (taken, watch) in taken[..count].iter().zip(self.pending.iter()) {
                // Release: as in `Watch::report()`.
                watch.pending.store((*taken).into(), Release);
            }
            return Err(count);
        }

        for _ in 0..count {
            // Dropped here, under the lock: the next invalidation must be able to queue the watch
            // again. It is not the last reference, see the top of this file.
            if let Some(watch) = self.pending.pop_front() {
                let state = watch.state.access_mut(self);
                state.delivered = state.delivered.wrapping_add(1);
            }
        }
        Ok(count)
    }
}

impl Queue {
    /// Creates a queue for watches in `mm`, and sets up the notifier tree of `mm`.
    ///
    /// Fails with `EINTR` if a signal is pending, and with `ENOMEM`. Process context, may sleep;
    /// `mmap_lock` must not be held.
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
                waiters: PollCondVarBox::new(
                    c"uverbs_mmu_notify",
                    static_lock_class!(),
                    GFP_KERNEL_ACCOUNT
                )?,
                ready: Atomic::new(0),
                reader <- new_mutex!((), "uverbs_mmu_notify_reader"),
                // INVARIANT: The list is empty.
                inner <- new_spinlock!(Inner {
                    pending: List::new(),
                    generation: 0,
                    page: Some(page),
                    closed: false,
                }, "uverbs_mmu_notify"),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Calls `f` with the page that holds the generation, or with `None` after [`Self::release`].
    ///
    /// The page stays until then.
    pub(crate) fn with_page<R>(&self, f: impl FnOnce(Option<&CounterPage>) -> R) -> R {
        f(self.inner.lock().page.as_deref())
    }

    /// Returns whether `mm` is the address space of the creator.
    pub(crate) fn belongs_to(&self, mm: &Mm) -> bool {
        ptr::eq(mm, &*self.mm)
    }

    /// Wakes one blocked reader and all pollers.
    ///
    /// `inner` must not be held. Any context that a notifier callback may run in.
    fn wake(&self) {
        // Exact: a reader begins to wait with the lock of the queue held, and a poller before it
        // loads `ready`; `has_waiters()` orders that against what we have stored.
        if self.waiters.has_waiters() {
            self.waiters.notify_one();
        }
    }

    /// Wakes another reader if events are left.
    ///
    /// One was woken when the queue became readable, maybe the caller, which is about to do
    /// something else.
    fn pass_on(&self) {
        if self.ready.load(Relaxed) == READABLE {
            self.wake();
        }
    }

    /// Sleeps until an event is queued or the queue is closed. The lock is released meanwhile.
    ///
    /// May wake up spuriously. Fails with `ERESTARTSYS` if a signal is pending and there is still
    /// nothing.
    fn wait(&self, mut inner: Guard<'_, Inner, SpinLockBackend>) -> Result {
        if self.waiters.wait_interruptible(&mut inner) && inner.pending.is_empty() && !inner.closed
        {
            return Err(ERESTARTSYS);
        }
        Ok(())
    }

    /// Copies up to `max` events to `buffer` and returns how many, which is not zero.
    ///
    /// If no event is pending it sleeps, or fails with `EAGAIN` if `nonblock`; this is the only
    /// statement that the queue was empty. After the first event it returns early if a signal is
    /// pending, if the queue is empty or closed, or if the buffer faults. Before it, it fails with
    /// `EIO` if the queue is closed, with `ERESTARTSYS` if a signal ends the wait, with `EINTR` if
    /// the task is being killed, and with `EFAULT` if the buffer cannot be written. An error means
    /// that no event was removed. Process context, may sleep.
    pub(crate) fn read(
        &self,
        max: usize,
        nonblock: bool,
        buffer: &mut impl Buffer,
    ) -> Result<usize> {
        // A look at an empty queue takes no lock. Relaxed: who has loaded a generation with acquire
        // order sees what was stored before it, see `Watch::enqueue()`.
        match self.ready.load(Relaxed) {
            0 if nonblock => return Err(EAGAIN),
            bindings::POLLERR => return Err(EIO),
            _ => (),
        }

        let mut done = 0;
        let result = self.read_batches(max, nonblock, buffer, &mut done);

        self.pass_on();
        if done != 0 {
            Ok(done)
        } else {
            result.map(|()| 0)
        }
    }

    /// Does the work of [`Self::read`]; adds to `done` what was delivered.
    fn read_batches(
        &self,
        max: usize,
        nonblock: bool,
        buffer: &mut impl Buffer,
        done: &mut usize,
    ) -> Result {
        let mut records = [Record::default(); BATCH];
        // For how many events the buffer is writable, if that is known.
        let mut room = BATCH;
        let mut faults = 0;

        while *done < max {
            let reader = self.reader.lock_killable()?;
            let mut inner = self.inner.lock();

            if inner.closed {
                return Err(EIO);
            }
            if inner.pending.is_empty() {
                if nonblock || *done != 0 {
                    return Err(EAGAIN);
                }
                // Does not sleep, unlike locking it.
                drop(reader);
                self.wait(inner)?;
                (room, faults) = (BATCH, 0);
                continue;
            }

            let delivered = inner.deliver(buffer, &mut records[..room.min(max - *done)]);
            self.update_ready(&inner);
            drop(inner);
            drop(reader);

            match delivered {
                Ok(count) => {
                    for record in &records[..count] {
                        trace::deliver(self, record);
                    }
                    *done += count;
                    (room, faults) = (BATCH, 0);
                    if buffer.interrupted() {
                        return Err(ERESTARTSYS);
                    }
                }
                Err(_) if faults == MAX_FAULTS => return Err(EFAULT),
                Err(count) => {
                    faults += 1;
                    // May take for ever.
                    self.pass_on();
                    room = buffer.fault_in(count)?;
                }
            }
        }
        Ok(())
    }

    /// Lets poll() report the state of `inner`, which must be that of this queue.
    fn update_ready(&self, inner: &Inner) {
        let ready = if inner.closed {
            bindings::POLLERR
        } else if inner.pending.is_empty() {
            0
        } else {
            READABLE
        };
        self.ready.store(ready, Relaxed);
    }

    /// Registers `table` with the queue and returns the mask of what is ready.
    ///
    /// Process context, may sleep. Takes no lock but that of the wait queue.
    pub(crate) fn poll(&self, file: &File, table: PollTable<'_>) -> c_uint {
        // Orders the registration before the load: either we see what was stored, or the waker sees
        // us.
        table.register_wait(file, &self.waiters);

        self.ready.load(Relaxed)
    }

    /// Ends all delivery and advances the generation a last time. Idempotent.
    ///
    /// Pending events are neither delivered nor counted. Watches stay until they are stopped, but
    /// queue nothing. Process context.
    pub(crate) fn close(&self) {
        let mut inner = self.inner.lock();
        if inner.closed {
            return;
        }
        inner.closed = true;
        self.update_ready(&inner);
        inner.advance();
        drop(inner);

        self.waiters.notify_all();
    }

    /// Closes the queue and frees the page. Idempotent.
    ///
    /// To be called when the file is gone, and with it each mapping. Process context, may sleep.
    pub(crate) fn release(&self) {
        self.close();

        let page = self.inner.lock().page.take();
        drop(page);
    }
}

impl Watch {
    /// Starts to observe the addresses `range` of `mm`, untagged, the end not included.
    ///
    /// No event is queued before [`Watch::go_live`], but every change of the mapping that begins
    /// after the return of this function is seen. Lasts until the registration is dropped, or
    /// passed to [`stop`].
    ///
    /// Fails with `EPERM` if `mm` is not that of the creator of the queue, with `EINVAL` if the
    /// range is empty or if rounding its end up to a page overflows, with `EIO` if the queue is
    /// closed, and with `ENOMEM`. Process context; waits, uninterruptibly, for all invalidations
    /// that are running in `mm`; `mmap_lock` must not be held.
    pub(crate) fn start(
        queue: ArcBorrow<'_, Queue>,
        mm: &MmWithUser,
        range: Range<usize>,
        cookie: u64,
    ) -> Result<Registration<Self>> {
        if !queue.belongs_to(mm) {
            return Err(EPERM);
        }
        let region = Region::new(range.clone()).ok_or(EINVAL)?;
        let pages = range.start & PAGE_MASK..page_align(range.end).ok_or(EINVAL)?;
        // If the queue is closed after this check the watch is useless but harmless.
        if queue.ready.load(Relaxed) == bindings::POLLERR {
            return Err(EIO);
        }

        let state = State {
            generation: 0,
            delivered: 0,
            phase: Phase::Registering,
        };
        let watch = UniqueArc::pin_init(
            pin_init!(Self {
                notifier <- IntervalNotifier::new(),
                pending: Atomic::new(Pending::NONE.into()),
                region,
                cookie,
                state: LockedBy::new(&queue.inner, state),
                queue: queue.into(),
                links <- ListLinks::new(),
                tracker <- AtomicTracker::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;

        let registration = Registration::insert(watch, mm, pages)?;
        trace::start(&queue, cookie, &range);
        registration.wait_for_in_flight();
        Ok(registration)
    }

    /// Starts to queue events, first of all for what has been seen since [`Watch::start`].
    ///
    /// Has no effect on a watch that is live or stopped. Cannot fail. Process context, does not
    /// sleep.
    pub(crate) fn go_live(self: ArcBorrow<'_, Self>) {
        let mut inner = self.queue.inner.lock();
        let state = self.state.access_mut(&mut inner);
        if state.phase != Phase::Registering {
            return;
        }
        state.phase = Phase::Live;

        // Relaxed: there comes to be an event only under the lock.
        let seen = Pending::from(self.pending.load(Relaxed)) != Pending::NONE;
        if seen && !inner.closed {
            let wake = self.enqueue(&mut inner);
            drop(inner);
            if wake {
                self.queue.wake();
            }
        }
    }

    /// Queues the watch, which is not queued, and advances the generation.
    ///
    /// Returns whether the queue was empty, so that [`Queue::wake`] has to be called without the
    /// lock.
    ///
    /// # Panics
    ///
    /// If `inner` does not belong to the queue of the watch.
    fn enqueue(self: ArcBorrow<'_, Self>, inner: &mut Inner) -> bool {
        let was_empty = inner.pending.is_empty();

        // Before the generation: see `Queue::read()`.
        if was_empty {
            self.queue.ready.store(READABLE, Relaxed);
        }
        let generation = inner.advance();
        self.state.access_mut(inner).generation = generation;
        // Fails only for a watch that is in the list.
        if let Some(watch) = ListArc::try_from_arc_borrow(self) {
            // INVARIANT: `access_mut()` panics unless `inner` belongs to the queue of the watch.
            // The callers have found it live, with an event or one that they are about to store.
            inner.pending.push_back(watch);
        }
        was_empty
    }

    /// Merges `event` into the pending event, or returns false if there is none.
    fn merge(&self, event: Pending) -> bool {
        loop {
            // Acquire: a task that finds the event of a live watch sees the generation advanced for
            // it. Before the watch goes live no look-up can find the MR.
            let old = Pending::from(self.pending.load(Acquire));
            if old == Pending::NONE {
                return false;
            }
            let new = old.merge(event);
            // Full: orders like the load if it succeeds.
            if new == old || self.pending.cmpxchg(old.into(), new.into(), Full).is_ok() {
                return true;
            }
        }
    }

    /// Adds `event` to what is pending. Returns the generation if that advanced it.
    fn report(self: ArcBorrow<'_, Self>, event: Pending) -> Option<u64> {
        if self.merge(event) {
            return None;
        }

        let mut inner = self.queue.inner.lock();
        // Another task may have been faster to the lock.
        if self.merge(event) {
            return None;
        }
        let queued = self.state.access(&inner).phase == Phase::Live && !inner.closed;
        let wake = queued && self.enqueue(&mut inner);
        let generation = inner.generation;
        // Release: a task that merges into this event, without the lock, sees the generation.
        self.pending.store(event.into(), Release);
        drop(inner);

        if wake {
            self.queue.wake();
        }
        queued.then_some(generation)
    }
}

impl IntervalNotifierCallback for Watch {
    fn invalidate(this: ArcBorrow<'_, Self>, invalidation: &Invalidation) {
        let event = Reason::of(invalidation.event())
            .and_then(|reason| this.region.event(invalidation.range(), reason));

        if let Some(event) = event {
            let generation = this.report(event);
            trace::invalidate(&this.queue, this.cookie, invalidation, generation);
        }
    }

    fn removed(this: ArcBorrow<'_, Self>) {
        let mut inner = this.queue.inner.lock();
        // SAFETY: `links` is only ever in the list `pending` of a queue: that is the only list of
        // this type, and it is never moved to another. By the invariant of `Inner` it is that of
        // the queue of the watch, which never changes, and `inner` belongs to this one.
        let queued = unsafe { inner.pending.remove(&this) };
        this.queue.update_ready(&inner);
        let state = this.state.access_mut(&mut inner);
        state.phase = Phase::Stopped;
        let delivered = state.delivered;
        drop(inner);

        trace::stop(&this.queue, this.cookie, delivered);
        drop(queued);
    }
}

/// Stops a watch and returns how many of its events have been delivered, modulo 2^32.
///
/// A pending event is dropped and not counted. No event is delivered after the return. Process
/// context; waits, uninterruptibly, for all invalidations that are running in the address space; no
/// lock may be held that is held around an invalidation.
pub(crate) fn stop(registration: Registration<Watch>) -> u32 {
    let watch = registration.remove();
    let inner = watch.queue.inner.lock();

    watch.state.access(&inner).delivered
}

// A watch and the reference count that precedes it are to fit in an object of 192 bytes, and what
// an invalidation that merges uses is to end with the second cache line of 64 bytes.
const _: () = {
    let count = 8;

    assert!(count + size_of::<Watch>() <= 192);
    assert!(count + offset_of!(Watch, cookie) <= 128);
};

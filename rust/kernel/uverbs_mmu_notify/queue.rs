// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Watches, and the queue that their events go to.
//!
//! # Events
//!
//! A watch has at most one pending event, kept in [`Watch::pending`]. The first invalidation queues
//! the event and advances the generation; both happen under the lock of the queue. Further
//! invalidations merge into the event by compare-exchange. They take no lock and do not advance the
//! generation, which is already larger than that of all delivered events. So they write to nothing
//! but the watch.
//!
//! # Locks
//!
//! In this order:
//!
//! - [`Queue::reader`]: serializes readers while they copy events by way of its [`Batch`], so that
//!   at most one of them holds `inner` for long. Not held while a reader waits for events or faults
//!   in its buffer.
//! - [`Queue::inner`]: also protects the [`State`] of each watch of the queue. Taken by the
//!   notifier callback. Nothing sleeps, allocates or frees memory under it.
//! - The lock of the wait queue. A reader takes it under `inner`, before and after it sleeps.
//!   Waiters are woken without `inner`.
//!
//! # References
//!
//! A watch owns a reference to its queue. A live watch also owns a reference to itself, its
//! [`ListArc`]. Queueing an event moves the `ListArc` to the list of the queue, and delivery moves
//! it back, so neither changes a reference count. Removal of the notifier drops the `ListArc`,
//! which ends the cycle.

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

/// The maximum number of events that are copied under the lock at once.
///
/// The buffer may be slow, device memory for example, and invalidations wait for the lock.
const BATCH: usize = 16;

/// How many times in a row [`Queue::read`] faults in its buffer before it gives up.
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
    /// Blocked readers (exclusive waiters) and pollers.
    waiters: PollCondVarBox,
    /// What poll() reports: `READABLE`, `POLLERR` or zero. Written under `inner`.
    ready: Atomic<u32>,
    #[pin]
    reader: Mutex<Batch>,
    #[pin]
    inner: SpinLock<Inner>,
}

/// The events that a reader is copying. Part of the queue only to keep it off the stack.
type Batch = [Record; BATCH];

/// # Invariants
///
/// - `pending` only contains watches whose `queue` is the one that this `Inner` belongs to. The
///   [`ListArc`] of a live watch is in `pending` or in [`State::entry`].
/// - A watch in `pending` has a pending event and is live.
struct Inner {
    /// Watches with a pending event, in the order of the events' generations.
    pending: List<Watch>,
    generation: u64,
    /// `None` after [`Queue::release`].
    page: Option<VBox<CounterPage>>,
    closed: bool,
}

/// Lifecycle of a watch.
#[derive(PartialEq, Eq)]
enum Phase {
    /// Invalidations are recorded, but not queued.
    Registering,
    /// Invalidations are queued.
    Live,
    /// The notifier has been removed.
    Stopped,
}

/// The part of a watch that the lock of the queue protects.
struct State {
    /// The generation of the pending event.
    generation: u64,
    /// The number of events that have been delivered, modulo 2^32.
    delivered: u32,
    phase: Phase,
    /// The entry for the list of the queue. `Some` only while the watch is live and not in the
    /// list.
    entry: Option<ListArc<Watch>>,
}

/// Watches the address range of one MR.
///
/// The order of the fields lets an invalidation that merges touch only two cache lines: that of the
/// tree node, and the next.
#[pin_data]
#[repr(C)]
pub(crate) struct Watch {
    #[pin]
    notifier: IntervalNotifier<Self>,
    queue: Arc<Queue>,
    /// The pending event, a [`Pending`].
    ///
    /// It changes to and from [`Pending::NONE`] only under the lock of the queue. Without the lock,
    /// an event only changes to one that covers it.
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
    /// Returns the number of records that now fit, at least one, or fails with `EFAULT`. May sleep.
    fn fault_in(&mut self, count: usize) -> Result<usize>;

    /// Reschedules if needed, and returns whether a signal is pending. May sleep.
    fn interrupted(&self) -> bool;
}

impl Inner {
    /// Advances the generation and makes it visible to userspace.
    fn advance(&mut self) -> u64 {
        self.generation += 1;
        if let Some(page) = &self.page {
            // Release: a task that loads this value with acquire ordering also sees the `ready`
            // that was stored before. So `Queue::read()` takes the lock, and finds all events up to
            // this generation.
            page.generation.store(self.generation, Release);
        }
        self.generation
    }

    /// Delivers the oldest events, at most `max` and at most [`BATCH`]: copies them to `buffer` by
    /// way of `batch`, counts them, and removes them from the queue.
    ///
    /// All of this happens under the lock, so no event is delivered after deregistration has
    /// returned the count. Returns the number of events: `Ok` if they were delivered, `Err` if the
    /// copy failed and nothing has changed.
    fn deliver(
        &mut self,
        buffer: &mut impl Buffer,
        batch: &mut Batch,
        max: usize,
    ) -> Result<usize, usize> {
        let mut count = 0;

        for (record, watch) in batch[..max.min(BATCH)].iter_mut().zip(self.pending.iter()) {
            // Clear `pending` before the copy: an invalidation either has already merged into the
            // event that is taken here, or finds no event and waits for the lock. Relaxed: the lock
            // orders everything else.
            let event = watch.pending.xchg(Pending::NONE.into(), Relaxed).into();
            let generation = watch.state.access(self).generation;
            *record = watch.region.record(event, watch.cookie, generation);
            count += 1;
        }

        let records = &batch[..count];
        if buffer.copy(records).is_err() {
            // Nothing has merged meanwhile, so the record has all of the event.
            for (record, watch) in records.iter().zip(self.pending.iter()) {
                let event = watch.region.pending(record);
                // Release: as in `Watch::report()`.
                watch.pending.store(event.into(), Release);
            }
            return Err(count);
        }

        for _ in 0..count {
            if let Some(watch) = self.pending.pop_front() {
                let state = ptr::from_mut(watch.state.access_mut(self));

                // SAFETY: `watch` keeps the state alive, and is moved into it. `access_mut()`
                // accepted `self`, which nothing else borrows meanwhile.
                let state = unsafe { &mut *state };
                state.delivered = state.delivered.wrapping_add(1);
                // INVARIANT: The watch has left `pending`.
                state.entry = Some(watch);
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
                reader <- new_mutex!(Batch::default(), "uverbs_mmu_notify_reader"),
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

    /// Calls `f` with the page that holds the generation, or with `None` after [`Self::release`],
    /// which frees the page.
    pub(crate) fn with_page<R>(&self, f: impl FnOnce(Option<&CounterPage>) -> R) -> R {
        f(self.inner.lock().page.as_deref())
    }

    /// Returns whether `mm` is the address space of the creator.
    pub(crate) fn belongs_to(&self, mm: &Mm) -> bool {
        ptr::eq(mm, &*self.mm)
    }

    /// Wakes one blocked reader and all pollers.
    ///
    /// `inner` must not be held. Runs in any context in which a notifier callback may run.
    fn wake(&self) {
        // No wake-up is lost: a reader joins the wait queue under `inner`, a poller before it loads
        // `ready`, and `has_waiters()` has a barrier between our stores and its check.
        if self.waiters.has_waiters() {
            self.waiters.notify_one();
        }
    }

    /// Wakes another reader if events are left.
    ///
    /// Only one reader is woken when the queue becomes readable. That may have been the caller,
    /// which now returns or faults in its buffer, so another one must take over.
    fn pass_on(&self) {
        if self.ready.load(Relaxed) == READABLE {
            self.wake();
        }
    }

    /// Sleeps until an event is queued or the queue is closed. Releases the lock while it sleeps.
    ///
    /// May wake up spuriously. Fails with `ERESTARTSYS` if a signal is pending and the queue is
    /// still empty and open.
    fn wait(&self, mut inner: Guard<'_, Inner, SpinLockBackend>) -> Result {
        if self.waiters.wait_interruptible(&mut inner) && inner.pending.is_empty() && !inner.closed
        {
            return Err(ERESTARTSYS);
        }
        Ok(())
    }

    /// Copies up to `max` events to `buffer` and returns their number, at least one. `max` must not
    /// be zero.
    ///
    /// Sleeps if no event is pending, or fails with `EAGAIN` if `nonblock`. Only `EAGAIN` means
    /// that the queue is empty. After the first event it returns early if a signal is pending, if
    /// the queue is empty or closed, or if the buffer cannot be written.
    ///
    /// If it fails no event has been removed. The other errors are:
    ///
    /// - `EIO`: the queue is closed.
    /// - `ERESTARTSYS`: a signal ended the wait.
    /// - `EINTR`: the task is being killed.
    /// - `EFAULT`: the buffer cannot be faulted in, or the copy still fails after [`MAX_FAULTS`]
    ///   of these in a row.
    ///
    /// Process context, may sleep.
    pub(crate) fn read(
        &self,
        max: usize,
        nonblock: bool,
        buffer: &mut impl Buffer,
    ) -> Result<usize> {
        // Check for an empty queue without a lock. Relaxed: a task that loaded a generation with
        // acquire ordering also sees the earlier store to `ready`, see `Inner::advance()`.
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

    /// Does the work of [`Self::read`]. Adds the number of delivered events to `done`.
    fn read_batches(
        &self,
        max: usize,
        nonblock: bool,
        buffer: &mut impl Buffer,
        done: &mut usize,
    ) -> Result {
        // How many events fit into the part of the buffer that is known to be writable, or `BATCH`
        // if unknown.
        let mut room = BATCH;
        let mut faults = 0;

        loop {
            let mut batch = self.reader.lock_killable()?;
            let mut inner = self.inner.lock();

            if inner.closed {
                return Err(EIO);
            }
            if inner.pending.is_empty() {
                if nonblock || *done != 0 {
                    return Err(EAGAIN);
                }
                // Unlocking the mutex under the spinlock is fine: it does not sleep.
                drop(batch);
                self.wait(inner)?;
                (room, faults) = (BATCH, 0);
                continue;
            }

            let delivered = inner.deliver(buffer, &mut batch, room.min(max - *done));
            let more = !inner.pending.is_empty();
            self.update_ready(&inner);
            drop(inner);

            match delivered {
                Ok(count) => {
                    trace::deliver(self, &batch[..count]);
                    drop(batch);
                    *done += count;
                    if *done == max || !more || buffer.interrupted() {
                        return Ok(());
                    }
                    (room, faults) = (BATCH, 0);
                }
                Err(_) if faults == MAX_FAULTS => return Err(EFAULT),
                Err(count) => {
                    drop(batch);
                    faults += 1;
                    // `fault_in()` may block indefinitely.
                    self.pass_on();
                    room = buffer.fault_in(count)?;
                }
            }
        }
    }

    /// Updates `ready` from `inner`, which must belong to this queue.
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
        // `register_wait()` orders the registration before the load: either we see the new `ready`,
        // or the waker sees us.
        table.register_wait(file, &self.waiters);

        self.ready.load(Relaxed)
    }

    /// Ends all delivery and advances the generation one last time. Idempotent.
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
    /// To be called on release of the file, when no mapping of the page is left. Process context,
    /// may sleep.
    pub(crate) fn release(&self) {
        self.close();

        let page = self.inner.lock().page.take();
        drop(page);
    }
}

impl Watch {
    /// Starts watching the addresses `range` of `mm`, untagged, the end not included.
    ///
    /// Every change of the mapping that begins after this function has returned is recorded, but
    /// no event is queued before [`Watch::go_live`]. The watch lasts until the registration is
    /// dropped or passed to [`stop`].
    ///
    /// Fails with `EPERM` if `mm` is not that of the creator of the queue, with `EINVAL` if the
    /// range is empty or if rounding its end up to a page overflows, with `EIO` if the queue is
    /// closed, and with `ENOMEM`. Process context; waits uninterruptibly for the running
    /// invalidations of `mm`; `mmap_lock` must not be held.
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
            entry: None,
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

    /// Starts queueing events. If an invalidation was recorded since [`Watch::start`], its event is
    /// queued at once.
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
        // INVARIANT: Succeeds, because a `ListArc` is only created here, and this is reached once.
        state.entry = ListArc::try_from_arc_borrow(self);

        // Relaxed: `NONE` is replaced by an event only under the lock.
        let seen = Pending::from(self.pending.load(Relaxed)) != Pending::NONE;
        if seen && !inner.closed {
            let wake = self.enqueue(&mut inner);
            drop(inner);
            if wake {
                self.queue.wake();
            }
        }
    }

    /// Queues the watch, which must not be queued already, and advances the generation.
    ///
    /// Returns whether the queue was empty. If so, the caller must call [`Queue::wake`] after
    /// dropping the lock.
    ///
    /// # Panics
    ///
    /// If `inner` does not belong to the queue of the watch.
    fn enqueue(self: ArcBorrow<'_, Self>, inner: &mut Inner) -> bool {
        let was_empty = inner.pending.is_empty();

        // Store before advancing the generation, see `Inner::advance()`.
        if was_empty {
            self.queue.ready.store(READABLE, Relaxed);
        }
        let generation = inner.advance();
        let state = self.state.access_mut(inner);
        state.generation = generation;
        if let Some(entry) = state.entry.take() {
            // INVARIANT: `access_mut()` panics unless `inner` belongs to the queue of the watch.
            // The watch is live: the callers checked. It has a pending event, or the caller stores
            // one before it drops the lock.
            inner.pending.push_back(entry);
        }
        was_empty
    }

    /// Merges `event` into the pending event, or returns false if there is none.
    fn merge(&self, event: Pending) -> bool {
        loop {
            // Acquire: pairs with Release in `report()`, so that a task that finds the event of a
            // live watch also sees its generation. An event that `go_live()` queued needs no
            // barrier: userspace does not have the MR before `go_live()` returns.
            let old = Pending::from(self.pending.load(Acquire));
            if old == Pending::NONE {
                return false;
            }
            let new = old.merge(event);
            // Full: on success at least as strong as the load.
            if new == old || self.pending.cmpxchg(old.into(), new.into(), Full).is_ok() {
                return true;
            }
        }
    }

    /// Merges `event` into the pending event, or makes it the pending one.
    ///
    /// Returns the new generation if it advanced.
    fn report(self: ArcBorrow<'_, Self>, event: Pending) -> Option<u64> {
        if self.merge(event) {
            return None;
        }

        let mut inner = self.queue.inner.lock();
        // Recheck: another task may have stored an event meanwhile.
        if self.merge(event) {
            return None;
        }
        let queued = self.state.access(&inner).phase == Phase::Live && !inner.closed;
        let wake = queued && self.enqueue(&mut inner);
        let generation = inner.generation;
        // Release: a task that merges into this event without the lock sees the generation.
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
        // SAFETY: `links` can only be in the list `pending` of a queue, as there is no other list
        // of this type. By the invariant of `Inner` that queue is the watch's own `queue`, which
        // never changes, and `inner` belongs to it.
        let queued = unsafe { inner.pending.remove(&this) };
        this.queue.update_ready(&inner);
        let state = this.state.access_mut(&mut inner);
        state.phase = Phase::Stopped;
        let delivered = state.delivered;
        let entry = queued.or_else(|| state.entry.take());
        drop(inner);

        trace::stop(&this.queue, this.cookie, delivered);
        drop(entry);
    }
}

/// Stops a watch and returns the number of its events that were delivered, modulo 2^32.
///
/// A pending event is dropped and not counted. No event is delivered after the return. Process
/// context; may wait uninterruptibly for running invalidations of the address space. The caller
/// must not hold a lock that is also held across an invalidation, such as `mmap_lock`.
pub(crate) fn stop(registration: Registration<Watch>) -> u32 {
    let watch = registration.remove();
    let inner = watch.queue.inner.lock();

    watch.state.access(&inner).delivered
}

// A watch with its reference count must fit into kmalloc-192, and the fields that a merge uses into
// the first two cache lines of 64 bytes.
const _: () = {
    let count = 8;

    assert!(count + size_of::<Watch>() <= 192);
    assert!(count + offset_of!(Watch, cookie) <= 128);
};

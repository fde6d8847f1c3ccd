// SPDX-License-Identifier: GPL-2.0

//! References, atomics and locks.

use crate::{
    alloc::{Flags, VBox},
    check,
    error::{Error, Result}, //
};
use core::{ops::Deref, pin::Pin};
use pinned_init::PinInit;

pub mod aref {
    use super::Deref;
    use crate::mm::Mm;

    pub struct ARef<T>(std::sync::Arc<T>);

    impl From<&Mm> for ARef<Mm> {
        fn from(mm: &Mm) -> Self {
            Self(mm.grab())
        }
    }

    impl<T> Deref for ARef<T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.0
        }
    }
}

pub mod atomic {
    use crate::check;
    use loom::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

    /// An atomic of loom, with a repair.
    ///
    /// Before a store, loom 0.7 looks for orders to be tried at the last access to the atomic only.
    /// If that was a load by the thread that stores, it misses those in which the store precedes an
    /// earlier load by another thread. So each access is announced by a read-modify-write, which
    /// conflicts with all others and, being relaxed, orders no memory without a fence.
    pub(crate) struct Announced<A> {
        atomic: A,
        announced: AtomicUsize,
    }

    impl<A> Announced<A> {
        pub(crate) fn new(atomic: A) -> Self {
            Self {
                atomic,
                announced: AtomicUsize::new(0),
            }
        }

        /// Returns the atomic, for one access.
        pub(crate) fn access(&self) -> &A {
            if check::repairs() {
                self.announced.fetch_add(0, Ordering::Relaxed);
            }
            &self.atomic
        }
    }

    /// A barrier on both sides. What loom has instead orders less.
    pub struct Full;
    pub struct Acquire;
    pub struct Release;
    pub struct Relaxed;

    pub trait AnyOrdering {
        const ORDERING: Ordering;
    }

    macro_rules! ordering {
        ($($name:ident => $ordering:ident),*) => {
            $(impl AnyOrdering for $name {
                const ORDERING: Ordering = Ordering::$ordering;
            })*
        };
    }
    ordering!(Full => AcqRel, Acquire => Acquire, Release => Release, Relaxed => Relaxed);

    pub trait AcquireOrRelaxed: AnyOrdering {}
    impl AcquireOrRelaxed for Acquire {}
    impl AcquireOrRelaxed for Relaxed {}

    pub trait ReleaseOrRelaxed: AnyOrdering {}
    impl ReleaseOrRelaxed for Release {}
    impl ReleaseOrRelaxed for Relaxed {}

    pub trait AtomicType: Copy {
        type Atomic;

        fn new(value: Self) -> Self::Atomic;
        fn load(atomic: &Self::Atomic, ordering: Ordering) -> Self;
        fn store(self, atomic: &Self::Atomic, ordering: Ordering);
        fn xchg(self, atomic: &Self::Atomic, ordering: Ordering) -> Self;
        fn cmpxchg(self, new: Self, atomic: &Self::Atomic, o: Ordering) -> Result<Self, Self>;
    }

    macro_rules! atomic {
        ($($type:ty => $atomic:ty),*) => {
            $(impl AtomicType for $type {
                type Atomic = $atomic;

                fn new(value: $type) -> $atomic {
                    <$atomic>::new(value)
                }

                fn load(atomic: &$atomic, ordering: Ordering) -> $type {
                    atomic.load(ordering)
                }

                fn store(self, atomic: &$atomic, ordering: Ordering) {
                    atomic.store(self, ordering);
                }

                fn xchg(self, atomic: &$atomic, ordering: Ordering) -> $type {
                    atomic.swap(self, ordering)
                }

                fn cmpxchg(self, new: $type, atomic: &$atomic, o: Ordering) -> Result<$type, $type> {
                    atomic.compare_exchange(self, new, o, Ordering::Relaxed)
                }
            })*
        };
    }
    atomic!(u32 => AtomicU32, u64 => AtomicU64);

    pub struct Atomic<T: AtomicType>(Announced<T::Atomic>);

    impl<T: AtomicType> Atomic<T> {
        pub fn new(value: T) -> Self {
            Self(Announced::new(T::new(value)))
        }

        pub fn load<O: AcquireOrRelaxed>(&self, _: O) -> T {
            T::load(self.0.access(), O::ORDERING)
        }

        pub fn store<O: ReleaseOrRelaxed>(&self, value: T, _: O) {
            value.store(self.0.access(), O::ORDERING);
        }

        pub fn xchg<O: AnyOrdering>(&self, new: T, _: O) -> T {
            new.xchg(self.0.access(), O::ORDERING)
        }

        /// Orders only if it succeeds.
        pub fn cmpxchg<O: AnyOrdering>(&self, old: T, new: T, _: O) -> Result<T, T> {
            old.cmpxchg(new, self.0.access(), O::ORDERING)
        }
    }
}

/// A counted reference. The last one must not be dropped under a spinlock.
pub struct Arc<T>(loom::sync::Arc<VBox<T>>);

impl<T> Arc<T> {
    pub fn pin_init<E>(init: impl PinInit<T, E>, flags: Flags) -> Result<Self>
    where
        Error: From<E>,
    {
        Ok(Self(loom::sync::Arc::new(VBox::pin_init(init, flags)?)))
    }

    pub fn as_arc_borrow(&self) -> ArcBorrow<'_, T> {
        ArcBorrow(self)
    }
}

impl<T> Clone for Arc<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Deref for Arc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

pub struct ArcBorrow<'a, T>(&'a Arc<T>);

impl<T> Clone for ArcBorrow<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for ArcBorrow<'_, T> {}

impl<T> Deref for ArcBorrow<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0
    }
}

impl<T> From<ArcBorrow<'_, T>> for Arc<T> {
    fn from(borrow: ArcBorrow<'_, T>) -> Self {
        borrow.0.clone()
    }
}

pub struct UniqueArc<T>(Arc<T>);

impl<T> UniqueArc<T> {
    pub fn pin_init<E>(init: impl PinInit<T, E>, flags: Flags) -> Result<Pin<Self>>
    where
        Error: From<E>,
    {
        let unique = Self(Arc::pin_init(init, flags)?);

        // SAFETY: What a `VBox` holds is pinned.
        Ok(unsafe { Pin::new_unchecked(unique) })
    }
}

impl<T> Deref for UniqueArc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> From<Pin<UniqueArc<T>>> for Arc<T> {
    fn from(unique: Pin<UniqueArc<T>>) -> Self {
        // SAFETY: An `Arc` does not give a mutable reference to its object.
        unsafe { Pin::into_inner_unchecked(unique) }.0
    }
}

#[macro_export]
macro_rules! new_spinlock {
    ($value:expr, $name:literal) => {
        $crate::sync::SpinLock::new($value)
    };
}

#[macro_export]
macro_rules! new_mutex {
    ($value:expr, $name:literal) => {
        $crate::sync::Mutex::new($value)
    };
}

pub type SpinLock<T> = lock::Lock<T, lock::spinlock::SpinLockBackend>;
pub type Mutex<T> = lock::Lock<T, lock::mutex::MutexBackend>;

pub mod lock {
    use super::{Deref, PinInit, Result, check};
    use crate::error::code::EINTR;
    use core::{cell::UnsafeCell, convert::Infallible, marker::PhantomData, ops::DerefMut};

    pub trait Backend {
        /// Checks that the current thread may take the lock.
        fn check();
        fn locked();
        fn unlocked();
    }

    pub mod spinlock {
        use crate::check::{self, Held};

        pub struct SpinLockBackend;

        impl super::Backend for SpinLockBackend {
            /// A leaf: a thread holds one at most.
            fn check() {
                check::might_sleep();
            }

            fn locked() {
                Held::Spinlock.locked();
            }

            fn unlocked() {
                Held::Spinlock.unlocked();
            }
        }
    }

    pub mod mutex {
        use crate::check::{self, Held};

        pub struct MutexBackend;

        impl super::Backend for MutexBackend {
            fn check() {
                check::might_sleep_long();
            }

            fn locked() {
                Held::Mutex.locked();
            }

            fn unlocked() {
                Held::Mutex.unlocked();
            }
        }
    }

    pub struct Lock<T, B> {
        mutex: loom::sync::Mutex<()>,
        data: UnsafeCell<T>,
        _backend: PhantomData<B>,
    }

    // SAFETY: Only the holder of the mutex has a reference to the data.
    unsafe impl<T: Send, B> Sync for Lock<T, B> {}

    impl<T, B: Backend> Lock<T, B> {
        #[allow(clippy::new_ret_no_self)]
        pub fn new(value: T) -> impl PinInit<Self, Infallible> {
            Self {
                mutex: loom::sync::Mutex::new(()),
                data: UnsafeCell::new(value),
                _backend: PhantomData,
            }
        }

        pub(super) fn data(&self) -> *const T {
            self.data.get()
        }

        pub fn lock(&self) -> Guard<'_, T, B> {
            let mut guard = Guard {
                lock: self,
                held: None,
            };

            guard.acquire();
            guard
        }
    }

    impl<T> Lock<T, mutex::MutexBackend> {
        /// Fails if the thread has been killed, also where the kernel's would not have to wait.
        pub fn lock_killable(&self) -> Result<Guard<'_, T, mutex::MutexBackend>> {
            if check::killed() {
                return Err(EINTR);
            }
            Ok(self.lock())
        }
    }

    pub struct Guard<'a, T, B: Backend> {
        lock: &'a Lock<T, B>,
        held: Option<loom::sync::MutexGuard<'a, ()>>,
    }

    impl<T, B: Backend> Guard<'_, T, B> {
        fn acquire(&mut self) {
            B::check();
            self.held = Some(self.lock.mutex.lock().unwrap());
            B::locked();
        }

        fn release(&mut self) {
            B::unlocked();
            self.held = None;
        }

        pub(crate) fn do_unlocked(&mut self, f: impl FnOnce()) {
            self.release();
            f();
            self.acquire();
        }
    }

    impl<T, B: Backend> Drop for Guard<'_, T, B> {
        fn drop(&mut self) {
            self.release();
        }
    }

    impl<T, B: Backend> Deref for Guard<'_, T, B> {
        type Target = T;

        fn deref(&self) -> &T {
            // SAFETY: The mutex is held, except in `do_unlocked()`, which borrows mutably.
            unsafe { &*self.lock.data.get() }
        }
    }

    impl<T, B: Backend> DerefMut for Guard<'_, T, B> {
        fn deref_mut(&mut self) -> &mut T {
            // SAFETY: As above, and `self` is borrowed mutably.
            unsafe { &mut *self.lock.data.get() }
        }
    }
}

/// Data that the lock of something else protects. loom sees each access.
pub struct LockedBy<T, U> {
    owner: *const U,
    data: loom::cell::UnsafeCell<T>,
}

// SAFETY: The pointer is only compared with others.
unsafe impl<T: Send, U> Send for LockedBy<T, U> {}
// SAFETY: Access to the data takes a reference to the owner, of the same kind.
unsafe impl<T: Send + Sync, U> Sync for LockedBy<T, U> {}

impl<T, U> LockedBy<T, U> {
    pub fn new(owner: &SpinLock<U>, data: T) -> Self {
        Self {
            owner: owner.data(),
            data: loom::cell::UnsafeCell::new(data),
        }
    }

    pub fn access<'a>(&'a self, owner: &'a U) -> &'a T {
        assert!(core::ptr::eq(owner, self.owner), "mismatched owners");
        // SAFETY: There is one owner, and nobody has a mutable reference to it.
        self.data.with(|data| unsafe { &*data })
    }

    pub fn access_mut<'a>(&'a self, owner: &'a mut U) -> &'a mut T {
        assert!(core::ptr::eq(owner, self.owner), "mismatched owners");
        // SAFETY: There is one owner, and nobody else has a reference to it.
        self.data.with_mut(|data| unsafe { &mut *data })
    }
}

pub mod poll {
    use super::{
        Deref,
        atomic::Announced,
        check,
        lock::{Backend, Guard}, //
    };
    use crate::{
        alloc::{AllocError, Flags},
        check::Allocation,
        fs::File, //
    };
    use loom::{
        sync::{
            Condvar,
            Mutex,
            MutexGuard,
            atomic::{AtomicUsize, Ordering, fence}, //
        },
        thread::{self, ThreadId}, //
    };
    use std::{
        cell::RefCell,
        collections::VecDeque,
        ffi::CStr,
        sync::Arc, //
    };

    /// A thread that waits exclusively.
    struct Sleeper {
        thread: ThreadId,
        woken: Condvar,
    }

    #[derive(Default)]
    struct Waiters {
        sleepers: VecDeque<Arc<Sleeper>>,
        /// How often pollers have been woken.
        wakeups: usize,
        /// Threads with a pending signal. Only those that use this queue matter.
        signals: Vec<ThreadId>,
        /// Pollers have to forget it: `POLLFREE`.
        freed: bool,
    }

    impl Waiters {
        fn signal_pending(&self) -> bool {
            self.signals.contains(&thread::current().id())
        }
    }

    /// `struct wait_queue_head`.
    pub struct WaitQueue {
        waiters: Mutex<Waiters>,
        pollers_woken: Condvar,
        /// How many are waiting, for readers without the lock.
        count: Announced<AtomicUsize>,
    }

    impl WaitQueue {
        fn lock(&self) -> MutexGuard<'_, Waiters> {
            self.waiters.lock().unwrap()
        }

        /// Counts another waiter. As in the kernel, what the waiter tests is loaded after that.
        fn add(&self, _: &mut Waiters) {
            self.count.access().fetch_add(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }

        fn remove(&self, _: &mut Waiters) {
            self.count.access().fetch_sub(1, Ordering::Relaxed);
        }

        /// Like `prepare_to_wait_exclusive()`.
        fn prepare_to_wait(&self) -> Arc<Sleeper> {
            let sleeper = Arc::new(Sleeper {
                thread: thread::current().id(),
                woken: Condvar::new(),
            });
            let mut waiters = self.lock();

            waiters.sleepers.push_back(sleeper.clone());
            self.add(&mut waiters);
            sleeper
        }

        /// Waits for a wake-up of `sleeper` or a signal. Returns whether a signal is pending.
        fn sleep(&self, sleeper: &Arc<Sleeper>) -> bool {
            let mut waiters = self.lock();

            loop {
                let position = waiters
                    .sleepers
                    .iter()
                    .position(|other| Arc::ptr_eq(other, sleeper));
                let Some(position) = position else {
                    return waiters.signal_pending();
                };
                if waiters.signal_pending() {
                    waiters.sleepers.remove(position);
                    self.remove(&mut waiters);
                    return true;
                }
                waiters = sleeper.woken.wait(waiters).unwrap();
            }
        }

        /// Wakes all pollers, and the `exclusive` sleepers that were first to come.
        ///
        /// One with a pending signal that has not left yet counts. This is so in the kernel while
        /// it has not seen the signal; later the next one would be woken instead.
        fn wake(&self, exclusive: usize) {
            check::woken();

            let mut waiters = self.lock();

            waiters.wakeups += 1;
            self.pollers_woken.notify_all();
            for _ in 0..exclusive.min(waiters.sleepers.len()) {
                let sleeper = waiters.sleepers.pop_front().unwrap();

                self.remove(&mut waiters);
                sleeper.woken.notify_one();
            }
        }

        /// Waits for more wake-ups of pollers than `seen`. Returns how many there are, or `None` if
        /// the queue has been freed.
        fn wait_polling(&self, seen: usize) -> Option<usize> {
            let mut waiters = self.lock();

            while waiters.wakeups == seen && !waiters.freed {
                waiters = self.pollers_woken.wait(waiters).unwrap();
            }
            (!waiters.freed).then_some(waiters.wakeups)
        }

        /// Like `wake_up_pollfree()` and the grace period after it.
        fn free(&self) {
            check::might_sleep();

            let mut waiters = self.lock();

            assert!(waiters.sleepers.is_empty(), "somebody sleeps on it");
            waiters.freed = true;
            self.pollers_woken.notify_all();
        }

        pub(crate) fn set_signal_pending(&self, thread: ThreadId, pending: bool) {
            let mut waiters = self.lock();

            waiters.signals.retain(|signal| *signal != thread);
            if pending {
                waiters.signals.push(thread);
                waiters
                    .sleepers
                    .iter()
                    .filter(|sleeper| sleeper.thread == thread)
                    .for_each(|sleeper| sleeper.woken.notify_one());
            }
        }
    }

    pub struct PollCondVarBox {
        queue: Arc<WaitQueue>,
        _allocation: Allocation,
    }

    impl PollCondVarBox {
        pub fn new(_: &'static CStr, _key: (), _: Flags) -> Result<Self, AllocError> {
            let allocation = Allocation::new()?;
            let queue = Arc::new(WaitQueue {
                waiters: Mutex::new(Waiters::default()),
                pollers_woken: Condvar::new(),
                count: Announced::new(AtomicUsize::new(0)),
            });

            check::new_wait_queue(&queue);
            Ok(Self {
                queue,
                _allocation: allocation,
            })
        }

        /// Like the kernel's, is on the queue before it releases the lock.
        pub fn wait_interruptible<T, B: Backend>(&self, guard: &mut Guard<'_, T, B>) -> bool {
            let sleeper = self.queue.prepare_to_wait();
            let mut signal_pending = false;

            guard.do_unlocked(|| {
                check::might_sleep_long();
                if let Some(hook) = check::sleep_hook() {
                    hook();
                }
                signal_pending = self.queue.sleep(&sleeper);
            });
            check::killed_on_wakeup() || signal_pending
        }

        pub fn has_waiters(&self) -> bool {
            fence(Ordering::SeqCst);
            self.queue.count.access().load(Ordering::Relaxed) != 0
        }

        pub fn notify_one(&self) {
            self.queue.wake(1);
        }

        pub fn notify_all(&self) {
            self.queue.wake(usize::MAX);
        }
    }

    impl Drop for PollCondVarBox {
        fn drop(&mut self) {
            if !std::thread::panicking() {
                self.queue.free();
            }
        }
    }

    impl Deref for PollCondVarBox {
        type Target = WaitQueue;

        fn deref(&self) -> &WaitQueue {
            &self.queue
        }
    }

    /// Somebody in poll(), or an epoll instance.
    #[derive(Default)]
    pub struct Poller {
        /// What it waits on, and the wake-ups that were before.
        waits: RefCell<Vec<(Arc<WaitQueue>, usize)>>,
    }

    impl Poller {
        /// Returns what to pass to the first call of a poll method, which registers.
        pub fn table(&self) -> PollTable<'_> {
            PollTable(Some(self))
        }

        /// Sleeps until there has been a wake-up since the registration or the last call. Forgets
        /// what has been freed, and returns whether something is left.
        pub fn wait(&self) -> bool {
            let mut waits = self.waits.borrow_mut();

            waits.retain_mut(|(queue, seen)| {
                let wakeups = queue.wait_polling(*seen);

                *seen = wakeups.unwrap_or(0);
                wakeups.is_some()
            });
            !waits.is_empty()
        }
    }

    #[derive(Clone, Copy)]
    pub struct PollTable<'a>(Option<&'a Poller>);

    impl PollTable<'_> {
        /// Passed to a poll method that only has to return what is ready.
        pub const NULL: Self = Self(None);

        pub fn register_wait(&self, _: &File, cv: &PollCondVarBox) {
            check::might_sleep();
            if let Some(poller) = self.0 {
                let mut waiters = cv.queue.lock();
                let seen = waiters.wakeups;

                cv.queue.add(&mut waiters);
                drop(waiters);
                poller.waits.borrow_mut().push((cv.queue.clone(), seen));
            }
        }
    }
}

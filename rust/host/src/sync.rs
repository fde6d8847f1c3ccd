// SPDX-License-Identifier: GPL-2.0

//! References, atomics and locks.

use crate::{
    alloc::{Flags, VBox},
    check,
    error::{Error, Result}, //
};
use core::{ops::Deref, pin::Pin};
use pinned_init::PinInit;

#[doc(inline)]
pub use lock::SpinLock;

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
    use loom::sync::atomic::{AtomicU64, Ordering};

    pub struct Acquire;
    pub struct Release;

    pub struct Atomic<T>(AtomicU64, core::marker::PhantomData<T>);

    impl Atomic<u64> {
        // `loom` has to know each value.
        #[allow(clippy::new_without_default)]
        pub fn new(value: u64) -> Self {
            Self(AtomicU64::new(value), core::marker::PhantomData)
        }

        pub fn load(&self, _: Acquire) -> u64 {
            self.0.load(Ordering::Acquire)
        }

        pub fn store(&self, value: u64, _: Release) {
            self.0.store(value, Ordering::Release);
        }
    }
}

/// A reference that is counted, and is not given up under a spinlock if it is the last.
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

pub mod lock {
    use super::{Deref, PinInit, check};
    use core::{cell::UnsafeCell, convert::Infallible, marker::PhantomData, ops::DerefMut};

    pub mod spinlock {
        pub struct SpinLockBackend;
    }

    /// A leaf: a thread holds one at most.
    pub struct SpinLock<T> {
        mutex: loom::sync::Mutex<()>,
        data: UnsafeCell<T>,
    }

    // SAFETY: Only who holds the mutex has a reference to the data.
    unsafe impl<T: Send> Sync for SpinLock<T> {}

    impl<T> SpinLock<T> {
        #[allow(clippy::new_ret_no_self)]
        pub fn new(value: T) -> impl PinInit<Self, Infallible> {
            Self {
                mutex: loom::sync::Mutex::new(()),
                data: UnsafeCell::new(value),
            }
        }

        pub(super) fn data(&self) -> *const T {
            self.data.get()
        }

        pub fn lock(&self) -> Guard<'_, T, spinlock::SpinLockBackend> {
            let mut guard = Guard {
                lock: self,
                held: None,
                _backend: PhantomData,
            };

            guard.acquire();
            guard
        }
    }

    pub struct Guard<'a, T, B> {
        lock: &'a SpinLock<T>,
        held: Option<loom::sync::MutexGuard<'a, ()>>,
        _backend: PhantomData<B>,
    }

    impl<T, B> Guard<'_, T, B> {
        fn acquire(&mut self) {
            check::might_sleep();
            self.held = Some(self.lock.mutex.lock().unwrap());
            check::locked();
        }

        fn release(&mut self) {
            check::unlocked();
            self.held = None;
        }

        pub(crate) fn do_unlocked(&mut self, f: impl FnOnce()) {
            self.release();
            f();
            self.acquire();
        }
    }

    impl<T, B> Drop for Guard<'_, T, B> {
        fn drop(&mut self) {
            self.release();
        }
    }

    impl<T, B> Deref for Guard<'_, T, B> {
        type Target = T;

        fn deref(&self) -> &T {
            // SAFETY: The mutex is held, but in `do_unlocked()`, which borrows mutably.
            unsafe { &*self.lock.data.get() }
        }
    }

    impl<T, B> DerefMut for Guard<'_, T, B> {
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
// SAFETY: Only who has a reference to the owner can get one to the data, of the same kind.
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
    use super::{Deref, check, lock::Guard};
    use crate::{alloc::AllocError, check::Allocation, fs::File};
    use loom::{
        sync::{Condvar, Mutex},
        thread::{self, ThreadId}, //
    };
    use std::{
        cell::RefCell,
        ffi::CStr,
        sync::Arc, //
    };

    #[derive(Default)]
    struct Waiters {
        wakeups: usize,
        /// Who has a signal pending. Only those that use this queue are known.
        signals: Vec<ThreadId>,
    }

    /// `struct wait_queue_head`.
    pub struct WaitQueue {
        waiters: Mutex<Waiters>,
        changed: Condvar,
    }

    impl WaitQueue {
        fn wakeups(&self) -> usize {
            self.waiters.lock().unwrap().wakeups
        }

        fn signal_pending(&self) -> bool {
            let current = thread::current().id();

            self.waiters.lock().unwrap().signals.contains(&current)
        }

        /// Waits for more wake-ups than `seen`, or a signal.
        fn wait(&self, seen: usize) {
            let current = thread::current().id();
            let mut waiters = self.waiters.lock().unwrap();

            while waiters.wakeups == seen && !waiters.signals.contains(&current) {
                waiters = self.changed.wait(waiters).unwrap();
            }
        }

        pub(crate) fn set_signal_pending(&self, thread: ThreadId, pending: bool) {
            let mut waiters = self.waiters.lock().unwrap();

            waiters.signals.retain(|signal| *signal != thread);
            if pending {
                waiters.signals.push(thread);
            }
            self.changed.notify_all();
        }
    }

    pub struct PollCondVarBox {
        queue: Arc<WaitQueue>,
        _allocation: Allocation,
    }

    impl PollCondVarBox {
        pub fn new(_: &'static CStr, _key: ()) -> Result<Self, AllocError> {
            let allocation = Allocation::new()?;
            let queue = Arc::new(WaitQueue {
                waiters: Mutex::new(Waiters::default()),
                changed: Condvar::new(),
            });

            check::new_wait_queue(&queue);
            Ok(Self {
                queue,
                _allocation: allocation,
            })
        }

        /// Like the kernel's, is on the queue before it releases the lock.
        pub fn wait_interruptible<T, B>(&self, guard: &mut Guard<'_, T, B>) -> bool {
            let seen = self.queue.wakeups();

            guard.do_unlocked(|| {
                check::might_sleep();
                if let Some(hook) = check::sleep_hook() {
                    hook();
                    assert!(self.queue.wakeups() != seen || self.queue.signal_pending());
                }
                self.queue.wait(seen);
            });
            self.queue.signal_pending()
        }

        pub fn notify_all(&self) {
            check::woken();
            self.queue.waiters.lock().unwrap().wakeups += 1;
            self.queue.changed.notify_all();
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

        /// Sleeps until there has been a wake-up since the registration or the last call.
        pub fn wait(&self) {
            for (queue, seen) in self.waits.borrow_mut().iter_mut() {
                queue.wait(*seen);
                *seen = queue.wakeups();
            }
        }
    }

    #[derive(Clone, Copy)]
    pub struct PollTable<'a>(Option<&'a Poller>);

    impl PollTable<'_> {
        /// What a poll method gets that only is to tell what is ready.
        pub const NULL: Self = Self(None);

        pub fn register_wait(&self, _: &File, cv: &PollCondVarBox) {
            check::might_sleep();
            if let Some(poller) = self.0 {
                let seen = cv.queue.wakeups();

                poller.waits.borrow_mut().push((cv.queue.clone(), seen));
            }
        }
    }
}

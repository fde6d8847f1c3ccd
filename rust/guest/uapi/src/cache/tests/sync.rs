// SPDX-License-Identifier: GPL-2.0
//! The types of loom, with a repair.
//!
//! Before a store, loom 0.7 looks for orders to be tried at the last access to
//! the atomic only. If that was a load by the thread that stores, it misses those
//! in which the store precedes an earlier load by another thread. So each access
//! is announced by a read-modify-write, which conflicts with all others and,
//! being relaxed, orders no memory.

pub use loom::sync::{Arc, Mutex, MutexGuard};

pub mod atomic {
    use loom::sync::atomic::AtomicUsize;
    pub use loom::sync::atomic::Ordering;

    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            #[derive(Debug, Default)]
            pub struct $name {
                inner: loom::sync::atomic::$name,
                announced: AtomicUsize,
            }

            impl $name {
                pub fn new(value: $value) -> Self {
                    Self {
                        inner: loom::sync::atomic::$name::new(value),
                        announced: AtomicUsize::new(0),
                    }
                }

                pub fn load(&self, order: Ordering) -> $value {
                    self.announced.fetch_add(0, Ordering::Relaxed);
                    self.inner.load(order)
                }

                pub fn store(&self, value: $value, order: Ordering) {
                    self.announced.fetch_add(0, Ordering::Relaxed);
                    self.inner.store(value, order);
                }
            }
        };
    }

    atomic!(AtomicBool, bool);
    atomic!(AtomicU64, u64);
}

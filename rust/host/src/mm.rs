// SPDX-License-Identifier: GPL-2.0

//! Address spaces, whose mappings tests change.

use crate::{
    check::{self, Allocation},
    error::Result, //
};
use core::ops::{Deref, Range};
use interval_notifier::{Event, Invalidation};
use loom::sync::{Condvar, Mutex};
use std::sync::{Arc, Weak};

type Callback = Arc<dyn Fn(&Invalidation) + Send + Sync>;

struct Node {
    id: usize,
    range: Range<usize>,
    callback: Callback,
}

/// `struct notifier_subscriptions`.
#[derive(Default)]
struct Tree {
    /// Odd while the nodes may not change. Then additions are deferred, and removals wait.
    seq: usize,
    active: usize,
    last_id: usize,
    nodes: Vec<Node>,
    deferred: Vec<Node>,
}

/// Where notifiers are, as long as there is a reference: `struct mm_struct`.
pub struct Mm {
    this: Weak<Self>,
    tree: Mutex<Tree>,
    seq_changed: Condvar,
    _allocation: Allocation,
}

impl Mm {
    pub(crate) fn grab(&self) -> Arc<Self> {
        self.this.upgrade().unwrap()
    }

    /// Calls back all whose range has a part of `range`, then makes the `change` itself.
    pub fn invalidate(&self, event: Event, range: Range<usize>, change: impl FnOnce()) {
        let callbacks: Vec<Callback> = {
            let mut tree = self.tree.lock().unwrap();
            let hit: Vec<_> = tree
                .nodes
                .iter()
                .filter(|node| node.range.start < range.end && range.start < node.range.end)
                .map(|node| node.callback.clone())
                .collect();

            tree.active += 1;
            if !hit.is_empty() {
                tree.seq |= 1;
            }
            hit
        };
        let invalidation = Invalidation::new(event, range);

        for callback in callbacks {
            callback(&invalidation);
        }
        change();

        let mut tree = self.tree.lock().unwrap();

        tree.active -= 1;
        if tree.active == 0 && tree.seq % 2 == 1 {
            tree.seq += 1;
            let mut deferred = core::mem::take(&mut tree.deferred);

            tree.nodes.append(&mut deferred);
            self.seq_changed.notify_all();
        }
    }

    /// Returns the identity of the new node, and the sequence number to wait for the end of.
    fn insert(&self, range: Range<usize>, callback: Callback) -> (usize, Option<usize>) {
        check::might_sleep();

        let mut tree = self.tree.lock().unwrap();
        let id = tree.last_id + 1;
        let node = Node {
            id,
            range,
            callback,
        };

        tree.last_id = id;
        if tree.seq % 2 == 1 {
            tree.deferred.push(node);
        } else {
            tree.nodes.push(node);
            if tree.active != 0 {
                tree.seq += 1;
            }
        }
        (id, (tree.active != 0).then_some(tree.seq))
    }

    fn wait_while(&self, seq: usize) {
        check::might_sleep();

        let mut tree = self.tree.lock().unwrap();

        while tree.seq == seq {
            tree = self.seq_changed.wait(tree).unwrap();
        }
    }

    fn remove(&self, id: usize) {
        check::might_sleep();

        let mut tree = self.tree.lock().unwrap();

        while tree.seq % 2 == 1 {
            tree = self.seq_changed.wait(tree).unwrap();
        }

        let position = tree.nodes.iter().position(|node| node.id == id).unwrap();
        let node = tree.nodes.remove(position);

        drop(tree);
        drop(node);
    }
}

/// An address space that has not been torn down.
pub struct MmWithUser(Arc<Mm>);

impl MmWithUser {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Arc::new_cyclic(|this| Mm {
            this: this.clone(),
            tree: Mutex::default(),
            seq_changed: Condvar::new(),
            _allocation: Allocation::new().unwrap(),
        }))
    }
}

impl Deref for MmWithUser {
    type Target = Mm;

    fn deref(&self) -> &Mm {
        &self.0
    }
}

pub mod interval_notifier {
    use super::{Allocation, Arc, Mm, MmWithUser, Range, Result, check};
    use crate::sync::{self, ArcBorrow, UniqueArc};
    use core::{convert::Infallible, marker::PhantomData, pin::Pin};
    use pinned_init::PinInit;

    #[doc(inline)]
    pub use crate::impl_has_interval_notifier;

    /// `enum mmu_notifier_event`. Tests also use values that the kernel does not have yet.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Event(pub u32);

    impl Event {
        pub const UNMAP: Self = Self(0);
        pub const CLEAR: Self = Self(1);
        pub const PROTECTION_VMA: Self = Self(2);
        pub const PROTECTION_PAGE: Self = Self(3);
        pub const SOFT_DIRTY: Self = Self(4);
        pub const RELEASE: Self = Self(5);
        pub const MIGRATE: Self = Self(6);
        pub const EXCLUSIVE: Self = Self(7);
    }

    pub struct Invalidation {
        event: Event,
        range: Range<usize>,
    }

    impl Invalidation {
        pub(super) fn new(event: Event, range: Range<usize>) -> Self {
            Self { event, range }
        }

        pub fn event(&self) -> Event {
            self.event
        }

        pub fn range(&self) -> Range<usize> {
            self.range.clone()
        }
    }

    pub struct IntervalNotifier<T>(PhantomData<fn() -> T>);

    impl<T> IntervalNotifier<T> {
        #[allow(clippy::new_ret_no_self)]
        pub fn new() -> impl PinInit<Self, Infallible> {
            Self(PhantomData)
        }
    }

    pub trait HasIntervalNotifier: Sized {
        fn notifier(&self) -> &IntervalNotifier<Self>;
    }

    pub trait IntervalNotifierCallback: HasIntervalNotifier + Send + Sync + 'static {
        fn invalidate(this: ArcBorrow<'_, Self>, invalidation: &Invalidation);
        fn removed(_this: ArcBorrow<'_, Self>) {}
    }

    pub struct Registration<T: IntervalNotifierCallback> {
        // The callback has the other reference. No operation of loom is spent on it.
        object: Arc<sync::Arc<T>>,
        mm: Arc<Mm>,
        id: usize,
        in_flight: Option<usize>,
    }

    impl<T: IntervalNotifierCallback> Registration<T> {
        pub fn insert(
            object: Pin<UniqueArc<T>>,
            mm: &MmWithUser,
            range: Range<usize>,
        ) -> Result<Self> {
            assert!(!range.is_empty());

            let object = Arc::new(sync::Arc::from(object));
            let called = object.clone();
            let (id, in_flight) = mm.insert(
                range,
                Arc::new(move |invalidation| T::invalidate(called.as_arc_borrow(), invalidation)),
            );

            Ok(Self {
                object,
                mm: mm.grab(),
                id,
                in_flight,
            })
        }

        pub fn wait_for_in_flight(&self) {
            check::might_sleep();
            if let Some(seq) = self.in_flight {
                self.mm.wait_while(seq);
            }
        }

        pub fn object(&self) -> &sync::Arc<T> {
            &self.object
        }

        pub fn remove(self) -> sync::Arc<T> {
            let object = (*self.object).clone();

            drop(self);
            object
        }
    }

    impl<T: IntervalNotifierCallback> Drop for Registration<T> {
        fn drop(&mut self) {
            self.mm.remove(self.id);
            T::removed(self.object.as_arc_borrow());
        }
    }

    pub fn prepare(_: &MmWithUser) -> Result {
        // Makes, and removes, an object of its own.
        Allocation::new()?;
        Ok(())
    }
}

#[macro_export]
macro_rules! impl_has_interval_notifier {
    (impl HasIntervalNotifier for $t:ty { self.$field:ident }) => {
        impl $crate::mm::interval_notifier::HasIntervalNotifier for $t {
            fn notifier(&self) -> &IntervalNotifier<Self> {
                &self.$field
            }
        }
    };
}

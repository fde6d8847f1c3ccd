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

/// What is done when the last invalidation ends.
enum Deferred {
    Insert(Node),
    Remove(usize),
}

/// `struct mmu_notifier_subscriptions`.
struct Tree {
    /// Odd while the nodes may not change. Then changes are deferred.
    seq: usize,
    active: usize,
    last_id: usize,
    nodes: Vec<Node>,
    deferred: Vec<Deferred>,
    /// The tree itself. There is none before the first insertion or preparation.
    allocation: Option<Allocation>,
}

impl Tree {
    fn prepare(&mut self) -> Result {
        if self.allocation.is_none() {
            self.allocation = Some(Allocation::new()?);
        }
        Ok(())
    }
}

/// Keeps the notifiers until the last reference is dropped: `struct mm_struct`.
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

    /// Calls back the nodes that overlap with `range`, then makes the `change` itself.
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
        if tree.active == 0 && !tree.seq.is_multiple_of(2) {
            tree.seq += 1;
            for change in core::mem::take(&mut tree.deferred) {
                match change {
                    Deferred::Insert(node) => tree.nodes.push(node),
                    Deferred::Remove(id) => tree.nodes.retain(|node| node.id != id),
                }
            }
            self.seq_changed.notify_all();
        }
    }

    /// Like `mmu_notifier_register()` without a subscription.
    fn prepare(&self) -> Result {
        check::might_sleep();
        check::notifier_result()?;

        self.tree.lock().unwrap().prepare()
    }

    /// Returns the identity of the new node, and the sequence number to wait for the end of.
    ///
    /// The kernel, to wait, compares with what the last callback has stored. That only adds waits
    /// for invalidations that have called back.
    fn insert(&self, range: Range<usize>, callback: Callback) -> Result<(usize, Option<usize>)> {
        check::might_sleep();
        check::notifier_result()?;

        let mut tree = self.tree.lock().unwrap();

        tree.prepare()?;
        tree.last_id += 1;

        let id = tree.last_id;
        let node = Node {
            id,
            range,
            callback,
        };

        if !tree.seq.is_multiple_of(2) {
            check::insertion_deferred();
            tree.deferred.push(Deferred::Insert(node));
        } else {
            tree.nodes.push(node);
            if tree.active != 0 {
                tree.seq |= 1;
            }
        }
        Ok((id, (tree.active != 0).then_some(tree.seq)))
    }

    fn wait_while(&self, seq: usize) {
        check::might_sleep_long();

        let mut tree = self.tree.lock().unwrap();

        while tree.seq == seq {
            tree = self.seq_changed.wait(tree).unwrap();
        }
    }

    fn remove(&self, id: usize) {
        check::might_sleep_long();

        let mut tree = self.tree.lock().unwrap();

        if tree.seq.is_multiple_of(2) {
            tree.nodes.retain(|node| node.id != id);
            return;
        }

        let is_inserted =
            |change: &Deferred| matches!(change, Deferred::Insert(node) if node.id == id);

        if let Some(position) = tree.deferred.iter().position(is_inserted) {
            tree.deferred.remove(position);
            return;
        }
        tree.deferred.push(Deferred::Remove(id));

        let seq = tree.seq;

        drop(tree);
        self.wait_while(seq);
    }
}

/// An address space that has not been torn down.
pub struct MmWithUser(Arc<Mm>);

impl MmWithUser {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Arc::new_cyclic(|this| Mm {
            this: this.clone(),
            tree: Mutex::new(Tree {
                seq: 2,
                active: 0,
                last_id: 0,
                nodes: Vec::new(),
                deferred: Vec::new(),
                allocation: None,
            }),
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
    use super::{Arc, Mm, MmWithUser, Range, Result, check};
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
            )?;

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
            // A panic may have left a lock locked. Another one would abort all tests.
            if std::thread::panicking() {
                return;
            }
            self.mm.remove(self.id);
            T::removed(self.object.as_arc_borrow());
        }
    }

    pub fn prepare(mm: &MmWithUser) -> Result {
        mm.prepare()
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

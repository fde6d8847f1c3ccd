// SPDX-License-Identifier: GPL-2.0

//! Lists of objects that each are in one list at most.

use crate::sync::{Arc, ArcBorrow};
use core::{convert::Infallible, ops::Deref};
use pinned_init::PinInit;
use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst}, //
};

#[doc(inline)]
pub use crate::{impl_list_arc_safe, impl_list_item};

/// Knows whether there is a [`ListArc`].
pub struct AtomicTracker(AtomicBool);

impl AtomicTracker {
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> impl PinInit<Self, Infallible> {
        Self(AtomicBool::new(false))
    }
}

pub trait ListArcSafe {
    fn tracker(&self) -> &AtomicTracker;
}

pub trait TryNewListArc: ListArcSafe {}

/// The one reference to an object by which it can be put into a list.
pub struct ListArc<T: ListArcSafe>(Arc<T>);

impl<T: TryNewListArc> ListArc<T> {
    pub fn try_from_arc_borrow(arc: ArcBorrow<'_, T>) -> Option<Self> {
        let is_new = !arc.tracker().0.swap(true, SeqCst);

        is_new.then(|| Self(arc.into()))
    }
}

impl<T: ListArcSafe> Deref for ListArc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: ListArcSafe> Drop for ListArc<T> {
    fn drop(&mut self) {
        assert!(self.0.tracker().0.swap(false, SeqCst), "two ListArcs");
    }
}

/// Knows the list that an object is in, zero being none.
pub struct ListLinks(AtomicUsize);

impl ListLinks {
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> impl PinInit<Self, Infallible> {
        Self(AtomicUsize::new(0))
    }
}

pub trait ListItem: ListArcSafe {
    fn links(&self) -> &ListLinks;
}

pub struct List<T: ListItem> {
    id: usize,
    items: VecDeque<ListArc<T>>,
}

impl<T: ListItem> List<T> {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        static LAST: AtomicUsize = AtomicUsize::new(0);

        Self {
            id: LAST.fetch_add(1, SeqCst) + 1,
            items: VecDeque::new(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = ArcBorrow<'_, T>> {
        self.items.iter().map(|item| item.0.as_arc_borrow())
    }

    pub fn push_back(&mut self, item: ListArc<T>) {
        assert_eq!(item.links().0.swap(self.id, SeqCst), 0, "in two lists");
        self.items.push_back(item);
    }

    pub fn pop_front(&mut self) -> Option<ListArc<T>> {
        let item = self.items.pop_front()?;

        item.links().0.store(0, SeqCst);
        Some(item)
    }

    /// # Safety
    ///
    /// `item` must not be in another list.
    pub unsafe fn remove(&mut self, item: &T) -> Option<ListArc<T>> {
        match item.links().0.swap(0, SeqCst) {
            0 => None,
            id => {
                assert_eq!(id, self.id, "in another list");
                let position = self.items.iter().position(|i| core::ptr::eq(&**i, item));
                self.items.remove(position.expect("not in its list"))
            }
        }
    }
}

#[macro_export]
macro_rules! impl_list_arc_safe {
    (impl ListArcSafe<0> for $t:ty { tracked_by $field:ident: AtomicTracker; }) => {
        impl $crate::list::ListArcSafe for $t {
            fn tracker(&self) -> &AtomicTracker {
                &self.$field
            }
        }
        impl TryNewListArc for $t {}
    };
}

#[macro_export]
macro_rules! impl_list_item {
    (impl ListItem<0> for $t:ty { using ListLinks { self.$field:ident }; }) => {
        impl $crate::list::ListItem for $t {
            fn links(&self) -> &ListLinks {
                &self.$field
            }
        }

        // Here since it needs private fields: the one item that the kernel's files have is a watch.
        impl $t {
            /// Lets the count start near its end, which no test lives to see otherwise.
            pub(crate) fn set_delivered(&self, delivered: u32) {
                let mut inner = self.queue.inner.lock();

                self.state.access_mut(&mut inner).delivered = delivered;
            }
        }
    };
}

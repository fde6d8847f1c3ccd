// SPDX-License-Identifier: GPL-2.0

//! Interval notifiers: callbacks for changes to the mapping of a range of user addresses.
//!
//! An interval notifier observes one range of one address space, an [`Mm`](super::Mm). Memory
//! management calls [`IntervalNotifierCallback::invalidate`] before it removes or replaces a page
//! table entry in the range, or restricts access through it, and waits for the callback to return.
//!
//! The object to notify embeds an [`IntervalNotifier`] and implements [`HasIntervalNotifier`] (by
//! [`impl_has_interval_notifier!`]) and [`IntervalNotifierCallback`]. [`Registration::insert`]
//! consumes the only reference to the object, so an object cannot be inserted twice. The result is
//! a [`Registration`], which owns a reference to the object for as long as callbacks can run.
//!
//! # Which changes invoke the callback
//!
//! The callback is not invoked for a change that was already running at [`Registration::insert`],
//! and possibly not for changes that begin while that change is still running. Call
//! [`Registration::wait_for_in_flight`] before reading the page tables, for example to pin pages.
//! After that, every such change either has completed or invokes the callback.
//!
//! # Examples
//!
//! Count the invalidations of a range of the current process, except changes of protection:
//!
//! ```
//! use core::ops::Range;
//! use kernel::{
//!     mm::interval_notifier::{
//!         impl_has_interval_notifier,
//!         Event,
//!         IntervalNotifier,
//!         IntervalNotifierCallback,
//!         Invalidation,
//!         Registration, //
//!     },
//!     new_spinlock,
//!     prelude::*,
//!     sync::{
//!         ArcBorrow,
//!         SpinLock,
//!         UniqueArc, //
//!     }, //
//! };
//!
//! #[pin_data]
//! struct Counter {
//!     #[pin]
//!     notifier: IntervalNotifier<Self>,
//!     #[pin]
//!     count: SpinLock<u64>,
//! }
//!
//! impl_has_interval_notifier! {
//!     impl HasIntervalNotifier for Counter { self.notifier }
//! }
//!
//! impl IntervalNotifierCallback for Counter {
//!     fn invalidate(this: ArcBorrow<'_, Self>, invalidation: &Invalidation) {
//!         match invalidation.event() {
//!             Event::PROTECTION_VMA | Event::PROTECTION_PAGE | Event::SOFT_DIRTY => (),
//!             // Unknown events belong here.
//!             _ => *this.count.lock() += 1,
//!         }
//!     }
//! }
//!
//! fn count_invalidations(range: Range<usize>) -> Result<Registration<Counter>> {
//!     let counter = UniqueArc::pin_init(
//!         pin_init!(Counter {
//!             notifier <- IntervalNotifier::new(),
//!             count <- new_spinlock!(0),
//!         }),
//!         GFP_KERNEL,
//!     )?;
//!
//!     let registration = Registration::insert(counter, current!().mm().ok_or(EINVAL)?, range)?;
//!     registration.wait_for_in_flight();
//!     Ok(registration)
//! }
//!
//! /// Sleeps until no callback is running, and returns the final count.
//! fn stop_counting(registration: Registration<Counter>) -> u64 {
//!     let counter = registration.remove();
//!     let count = *counter.count.lock();
//!     count
//! }
//! ```
//!
//! C header: [`include/linux/mmu_notifier.h`](srctree/include/linux/mmu_notifier.h)

use crate::{
    bindings,
    error::to_result,
    mm::MmWithUser,
    prelude::*,
    sync::{
        Arc,
        ArcBorrow,
        UniqueArc, //
    },
    types::{
        ForeignOwnable,
        Opaque, //
    }, //
};
use core::{
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::Range, //
};

/// Why a range is invalidated.
///
/// Wraps [`enum mmu_notifier_event`]. Other values than the constants below may occur.
///
/// [`enum mmu_notifier_event`]: srctree/include/linux/mmu_notifier.h
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(bindings::mmu_notifier_event);

impl Event {
    /// The range is unmapped, or moved to another address.
    pub const UNMAP: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_UNMAP);
    /// Page table entries are cleared.
    pub const CLEAR: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_CLEAR);
    /// The protection of the range changes.
    pub const PROTECTION_VMA: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_VMA);
    /// The protection of page table entries changes, but not that of the range.
    pub const PROTECTION_PAGE: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_PROTECTION_PAGE);
    /// Entries are write-protected for soft-dirty tracking.
    pub const SOFT_DIRTY: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_SOFT_DIRTY);
    /// The address space is torn down.
    pub const RELEASE: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_RELEASE);
    /// Pages migrate to or from device memory.
    pub const MIGRATE: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_MIGRATE);
    /// A device gets exclusive access to the range.
    pub const EXCLUSIVE: Self = Self(bindings::mmu_notifier_event_MMU_NOTIFY_EXCLUSIVE);

    /// Returns the value of the C enum.
    #[inline]
    pub const fn as_raw(self) -> bindings::mmu_notifier_event {
        self.0
    }
}

/// The event and the range of an invalidation.
///
/// Wraps [`struct mmu_notifier_range`]. The range may reach beyond that of the notifier. The flag
/// that says whether the callback may sleep is not exposed: a callback must never sleep.
///
/// [`struct mmu_notifier_range`]: srctree/include/linux/mmu_notifier.h
#[repr(transparent)]
pub struct Invalidation(Opaque<bindings::mmu_notifier_range>);

impl Invalidation {
    /// Returns the reason.
    #[inline]
    pub fn event(&self) -> Event {
        // SAFETY: By `from_raw`, the pointer is valid for reads while `self` is borrowed.
        Event(unsafe { (*self.0.get()).event })
    }

    /// Returns the user addresses that are invalidated, the end not included.
    ///
    /// This is `0..usize::MAX` when the address space is torn down.
    #[inline]
    pub fn range(&self) -> Range<usize> {
        let range = self.0.get();
        // SAFETY: By `from_raw`, the pointer is valid for reads while `self` is borrowed.
        unsafe { (*range).start..(*range).end }
    }

    /// Creates a reference from the pointer that is passed to a callback.
    ///
    /// # Safety
    ///
    /// `ptr` must point at an initialized `struct mmu_notifier_range` that is not written to during
    /// `'a`.
    unsafe fn from_raw<'a>(ptr: *const bindings::mmu_notifier_range) -> &'a Self {
        // SAFETY: The caller promises that the pointer is valid for `'a`, and `Invalidation` is a
        // transparent wrapper.
        unsafe { &*ptr.cast() }
    }
}

/// The part of an object of type `T` that links it to an address space.
///
/// Contains a [`struct mmu_interval_notifier`].
///
/// [`struct mmu_interval_notifier`]: srctree/include/linux/mmu_notifier.h
#[repr(transparent)]
#[pin_data]
pub struct IntervalNotifier<T> {
    #[pin]
    inner: Opaque<bindings::mmu_interval_notifier>,
    _phantom: PhantomData<fn() -> T>,
}

// SAFETY: Without a `Registration` the contents are never accessed, and the functions that a
// `Registration` calls on them may be called on any thread.
unsafe impl<T> Send for IntervalNotifier<T> {}
// SAFETY: There are no methods on `&IntervalNotifier`.
unsafe impl<T> Sync for IntervalNotifier<T> {}

impl<T> IntervalNotifier<T> {
    /// Creates an initializer for a notifier that is not inserted.
    pub fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // `mmu_interval_notifier_insert()` initializes all that is ever read.
            inner: Opaque::uninit(),
            _phantom: PhantomData,
        })
    }
}

/// Declares that `Self` embeds an [`IntervalNotifier<Self>`].
///
/// Use [`impl_has_interval_notifier!`] to implement it.
///
/// # Safety
///
/// [`Self::raw_get_notifier`] must return a pointer to a field of `this`, and
/// [`Self::notifier_container_of`] must be its inverse.
pub unsafe trait HasIntervalNotifier: Sized {
    /// Returns a pointer to the notifier of `this`.
    ///
    /// # Safety
    ///
    /// `this` must point at a valid object.
    unsafe fn raw_get_notifier(this: *const Self) -> *const IntervalNotifier<Self>;

    /// Returns a pointer to the object that the notifier is part of.
    ///
    /// # Safety
    ///
    /// `notifier` must point at the [`IntervalNotifier`] in an object of type `Self`.
    unsafe fn notifier_container_of(notifier: *const IntervalNotifier<Self>) -> *const Self;
}

/// Implements [`HasIntervalNotifier`] for a type with a field of type [`IntervalNotifier`].
///
/// See the [module] documentation for an example.
///
/// [module]: crate::mm::interval_notifier
#[macro_export]
#[doc(hidden)]
macro_rules! impl_has_interval_notifier {
    (impl HasIntervalNotifier for $self:ty { self.$field:ident }) => {
        // SAFETY: Both methods name the same field, and only compile if it has the right type.
        unsafe impl $crate::mm::interval_notifier::HasIntervalNotifier for $self {
            #[inline]
            unsafe fn raw_get_notifier(
                this: *const Self,
            ) -> *const $crate::mm::interval_notifier::IntervalNotifier<Self> {
                // SAFETY: The caller promises that the pointer is not dangling.
                unsafe { &raw const (*this).$field }
            }

            #[inline]
            unsafe fn notifier_container_of(
                notifier: *const $crate::mm::interval_notifier::IntervalNotifier<Self>,
            ) -> *const Self {
                // SAFETY: The caller promises that the pointer points at this field of a `Self`.
                unsafe { $crate::container_of!(notifier, Self, $field) }
            }
        }
    };
}
#[doc(inline)]
pub use impl_has_interval_notifier;

/// The callbacks of an object with an [`IntervalNotifier`].
pub trait IntervalNotifierCallback: HasIntervalNotifier + Send + Sync + 'static {
    /// Called before page table entries in the range of the notifier change, see the [module].
    ///
    /// May run concurrently with itself, and runs again when the same addresses change again. When
    /// the address space is torn down it runs with [`Event::RELEASE`] first, and then with
    /// [`Event::UNMAP`].
    ///
    /// # Context
    ///
    /// Runs in the task that changes the mapping, possibly in memory reclaim or in the OOM reaper,
    /// and with sleeping locks of memory management held. Must not sleep, must not allocate memory
    /// except with [`GFP_NOWAIT`], and must not take a lock under which a [`Registration`] is
    /// inserted, waited for or dropped.
    ///
    /// [module]: crate::mm::interval_notifier
    /// [`GFP_NOWAIT`]: crate::alloc::flags::GFP_NOWAIT
    fn invalidate(this: ArcBorrow<'_, Self>, invalidation: &Invalidation);

    /// Called once, after the notifier has been removed. [`Self::invalidate`] does not run again.
    ///
    /// # Context
    ///
    /// The one in which the [`Registration`] is dropped.
    fn removed(_this: ArcBorrow<'_, Self>) {}
}

/// The insertion of an object into the notifier tree of an address space.
///
/// Dropping a registration removes the object from the tree and waits uninterruptibly for running
/// callbacks. The drop may also wait for unrelated invalidations in the same address space,
/// including the callbacks of other subscribers.
///
/// A registration must not be dropped in a callback, nor while holding a lock that a callback or
/// the invalidating task takes; lockdep only catches the locks taken in callbacks. It can be
/// dropped after the address space has been torn down: it keeps the `mm_struct` alive, but not the
/// mappings.
///
/// [`mem::forget()`](core::mem::forget) leaks the object and the `mm_struct`, but is sound, unless
/// the module that contains the callbacks is unloaded.
///
/// # Invariants
///
/// The notifier in `inner` is inserted: it is in the tree of the address space, or is added to the
/// tree when the running invalidations end. No other registration contains this notifier.
#[must_use = "dropping it ends the observation"]
pub struct Registration<T: IntervalNotifierCallback> {
    inner: Arc<T>,
}

impl<T: IntervalNotifierCallback> Registration<T> {
    const OPS: bindings::mmu_interval_notifier_ops = bindings::mmu_interval_notifier_ops {
        invalidate: Some(Self::invalidate),
        invalidate_start: None,
        invalidate_finish: None,
    };

    /// Starts observing the user addresses `range` of `mm`, the end not included.
    ///
    /// Callbacks may run before this function returns. See the [module] documentation for the
    /// changes that do not invoke the callback.
    ///
    /// Fails with `EOVERFLOW` if the range is empty. The first insertion into an address space can
    /// also fail with `ENOMEM`, or with `EINTR` if a signal is pending; call [`prepare`] in advance
    /// to avoid that.
    ///
    /// # Context
    ///
    /// Process context, may sleep. `mmap_lock` of `mm` must not be held.
    ///
    /// [module]: crate::mm::interval_notifier
    pub fn insert(object: Pin<UniqueArc<T>>, mm: &MmWithUser, range: Range<usize>) -> Result<Self> {
        let inner = Arc::from(object);
        let ops: &'static bindings::mmu_interval_notifier_ops = &Self::OPS;

        // SAFETY:
        // - `inner` is a valid object, and the notifier in it is pinned because an `Arc` is.
        // - The notifier is not in a tree: the object was in a `UniqueArc`, while an object in a
        //   tree is in an `Arc` that a `Registration` owns.
        // - `mm_users` is not zero by the type invariants of `MmWithUser`.
        // - `ops` is static, and `invalidate()` expects a notifier in a `T`.
        to_result(unsafe {
            bindings::mmu_interval_notifier_insert(
                Self::raw_notifier(&inner),
                mm.as_raw(),
                range.start,
                range.end.saturating_sub(range.start),
                ops,
            )
        })?;

        // INVARIANT: The notifier was just inserted, and only `drop()` removes it. The `UniqueArc`
        // of the object was consumed, so no other registration contains it.
        Ok(Self { inner })
    }

    /// Waits until the changes that were running when the object was inserted are complete.
    ///
    /// # Context
    ///
    /// Process context, waits uninterruptibly. The restrictions for dropping a registration apply.
    pub fn wait_for_in_flight(&self) {
        // The sequence number is for users that retry when a callback has run. An object that
        // records its callbacks needs only the wait.
        //
        // SAFETY: The notifier is inserted by the type invariants.
        unsafe { bindings::mmu_interval_read_begin(Self::raw_notifier(&self.inner)) };
    }

    /// Returns a reference to the object.
    pub fn object(&self) -> &Arc<T> {
        &self.inner
    }

    /// Removes the object from the tree, as dropping the registration does, and returns it.
    ///
    /// # Context
    ///
    /// The same as for dropping the registration.
    pub fn remove(self) -> Arc<T> {
        let inner = self.inner.clone();
        drop(self);
        inner
    }

    fn raw_notifier(inner: &Arc<T>) -> *mut bindings::mmu_interval_notifier {
        // SAFETY: An `Arc` points at a valid object.
        let notifier = unsafe { T::raw_get_notifier(Arc::as_ptr(inner)) };

        // SAFETY: By the safety requirements of `HasIntervalNotifier`, `notifier` points into the
        // object.
        Opaque::cast_into(unsafe { &raw const (*notifier).inner })
    }

    /// # Safety
    ///
    /// Only to be called by the C side for a notifier that [`Self::insert`] inserted.
    unsafe extern "C" fn invalidate(
        notifier: *mut bindings::mmu_interval_notifier,
        range: *const bindings::mmu_notifier_range,
        cur_seq: c_ulong,
    ) -> bool {
        // This abstraction never calls `mmu_interval_read_retry()`, so the lock that orders it is
        // not needed.
        //
        // SAFETY: The C side passes the notifier that it is calling.
        unsafe { bindings::mmu_interval_set_seq(notifier, cur_seq) };

        // SAFETY: `insert()` passed a pointer to the `IntervalNotifier`, a transparent wrapper, in
        // an object of type `T`.
        let object = unsafe { T::notifier_container_of(notifier.cast_const().cast()) };

        // SAFETY: The object is in an `Arc`. `insert()`, and then the registration, own a reference
        // to the object until the notifier has been removed, and the removal waits for this
        // callback. While that reference exists no `UniqueArc` to the object can be created.
        let object = unsafe { ArcBorrow::from_raw(object) };

        // SAFETY: The C side passes a valid range, which is constant during the callback.
        T::invalidate(object, unsafe { Invalidation::from_raw(range) });

        // Returning `false` is only allowed if the callback would have to sleep.
        true
    }
}

impl<T: IntervalNotifierCallback> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: The notifier is inserted by the type invariants, and is removed exactly once,
        // here.
        unsafe { bindings::mmu_interval_notifier_remove(Self::raw_notifier(&self.inner)) };

        T::removed(self.inner.as_arc_borrow());
    }
}

// SAFETY: The pointer is that of the `Arc`, for which the same guarantees hold.
unsafe impl<T: IntervalNotifierCallback> ForeignOwnable for Registration<T> {
    const FOREIGN_ALIGN: usize = <Arc<T> as ForeignOwnable>::FOREIGN_ALIGN;

    type Borrowed<'a> = ArcBorrow<'a, T>;
    type BorrowedMut<'a> = ArcBorrow<'a, T>;

    fn into_foreign(self) -> *mut c_void {
        let this = ManuallyDrop::new(self);

        // SAFETY: `this` is not dropped, so this is the only use of its reference.
        unsafe { core::ptr::read(&this.inner) }.into_foreign()
    }

    unsafe fn from_foreign(ptr: *mut c_void) -> Self {
        // INVARIANT: The `Arc` is that of a registration, which was not dropped.
        Self {
            // SAFETY: The caller promises that `ptr` came from `into_foreign()` and is not used
            // again.
            inner: unsafe { Arc::from_foreign(ptr) },
        }
    }

    unsafe fn borrow<'a>(ptr: *mut c_void) -> ArcBorrow<'a, T> {
        // SAFETY: The caller promises that `ptr` came from `into_foreign()` and outlives `'a`.
        unsafe { <Arc<T> as ForeignOwnable>::borrow(ptr) }
    }

    unsafe fn borrow_mut<'a>(ptr: *mut c_void) -> ArcBorrow<'a, T> {
        // SAFETY: As for `borrow()`.
        unsafe { <Arc<T> as ForeignOwnable>::borrow(ptr) }
    }
}

/// Sets up the notifier tree of `mm`, so that [`Registration::insert`] need not.
///
/// The tree lives as long as the `mm_struct`. If there is one already, this function does nothing.
/// Otherwise it takes all locks of the address space (`mm_take_all_locks()`), so it waits for
/// changes of the mapping that hold one of these locks. In that case it can fail with `EINTR`, if a
/// signal is pending, and with `ENOMEM`.
///
/// # Context
///
/// Process context, may sleep. `mmap_lock` of `mm` must not be held.
pub fn prepare(mm: &MmWithUser) -> Result {
    const OPS: &bindings::mmu_interval_notifier_ops = &bindings::mmu_interval_notifier_ops {
        invalidate: None,
        invalidate_start: None,
        invalidate_finish: None,
    };
    let notifier = Opaque::uninit();

    // The C function sets up the tree if there is none. Then it refuses to insert a notifier for an
    // empty range.
    //
    // SAFETY:
    // - `notifier` is valid for writes, and is not inserted.
    // - `mm_users` is not zero by the type invariants of `MmWithUser`.
    // - `OPS` is static.
    let result =
        unsafe { bindings::mmu_interval_notifier_insert(notifier.get(), mm.as_raw(), 0, 0, OPS) };

    match to_result(result) {
        Err(EOVERFLOW) => Ok(()),
        result => result,
    }
}

#[cfg(CONFIG_RUST_MM_INTERVAL_NOTIFIER_KUNIT_TEST)]
#[macros::kunit_tests(rust_mm_interval_notifier)]
mod tests {
    use super::*;
    use crate::{
        new_spinlock,
        page::PAGE_SIZE,
        sync::{
            aref::ARef,
            Completion,
            SpinLock, //
        },
        task::cond_resched,
        workqueue, //
    };

    #[derive(Clone, Copy, Default)]
    struct Seen {
        calls: u32,
        last: Option<(Event, usize, usize)>,
        removed: u32,
        /// Callbacks do not return while this is set.
        hold: bool,
        /// The number of running callbacks.
        inside: u32,
    }

    /// Records its callbacks.
    #[pin_data]
    struct Recorder {
        #[pin]
        notifier: IntervalNotifier<Self>,
        #[pin]
        seen: SpinLock<Seen>,
    }

    impl_has_interval_notifier! {
        impl HasIntervalNotifier for Recorder { self.notifier }
    }

    impl IntervalNotifierCallback for Recorder {
        fn invalidate(this: ArcBorrow<'_, Self>, invalidation: &Invalidation) {
            let Range { start, end } = invalidation.range();
            {
                let mut seen = this.seen.lock();
                seen.calls += 1;
                seen.last = Some((invalidation.event(), start, end));
                seen.inside += 1;
            }
            // For this test alone: a callback must not sleep, but these invalidations may.
            while this.seen.lock().hold {
                cond_resched();
            }
            this.seen.lock().inside -= 1;
        }

        fn removed(this: ArcBorrow<'_, Self>) {
            this.seen.lock().removed += 1;
        }
    }

    impl Recorder {
        fn new() -> Result<Pin<UniqueArc<Self>>> {
            UniqueArc::pin_init(
                pin_init!(Self {
                    notifier <- IntervalNotifier::new(),
                    seen <- new_spinlock!(Seen::default()),
                }),
                GFP_KERNEL,
            )
        }

        fn insert(mm: &MmWithUser, range: Range<usize>) -> Result<Registration<Self>> {
            Registration::insert(Self::new()?, mm, range)
        }

        fn seen(&self) -> Seen {
            *self.seen.lock()
        }
    }

    /// An invalidation that is running.
    struct Running {
        range: bindings::mmu_notifier_range,
        // Keeps the pointer in `range` valid.
        _mm: ARef<MmWithUser>,
    }

    // SAFETY: An invalidation can be ended by any thread.
    unsafe impl Send for Running {}

    impl Running {
        /// Begins an invalidation, which invokes the callbacks.
        fn begin(mm: &MmWithUser, event: Event, range: Range<usize>) -> Self {
            let mut range = bindings::mmu_notifier_range {
                mm: mm.as_raw(),
                start: range.start,
                end: range.end,
                flags: bindings::MMU_NOTIFIER_RANGE_BLOCKABLE,
                event: event.as_raw(),
                owner: core::ptr::null_mut(),
            };

            // SAFETY: The range is that of a valid `mm`, whose notifier tree has been set up.
            unsafe { bindings::__mmu_notifier_invalidate_range_start(&mut range) };
            Self {
                range,
                _mm: mm.into(),
            }
        }

        fn end(mut self) {
            // SAFETY: The invalidation of this range was begun and not ended.
            unsafe { bindings::__mmu_notifier_invalidate_range_end(&mut self.range) };
        }
    }

    /// Returns the address space of the test, with a notifier tree.
    fn mm() -> Result<ARef<MmWithUser>> {
        // SAFETY: Always safe to call in a thread of KUnit.
        to_result(unsafe { bindings::kunit_attach_mm() })?;

        let mm = ARef::from(current!().mm().ok_or(EINVAL)?);
        prepare(&mm)?;
        Ok(mm)
    }

    fn pages(pages: Range<usize>) -> Range<usize> {
        pages.start * PAGE_SIZE..pages.end * PAGE_SIZE
    }

    #[test]
    fn event_and_range() -> Result {
        let mm = mm()?;
        let registration = Recorder::insert(&mm, pages(4..8))?;
        let recorder = registration.object();

        registration.wait_for_in_flight();
        assert_eq!(recorder.seen().calls, 0);

        // Not clipped.
        Running::begin(&mm, Event::CLEAR, pages(7..9)).end();
        assert_eq!(recorder.seen().calls, 1);
        assert!(recorder.seen().last == Some((Event::CLEAR, 7 * PAGE_SIZE, 9 * PAGE_SIZE)));

        Running::begin(&mm, Event::RELEASE, 0..usize::MAX).end();
        assert_eq!(recorder.seen().calls, 2);
        assert!(recorder.seen().last == Some((Event::RELEASE, 0, usize::MAX)));
        Ok(())
    }

    #[test]
    fn adjacent_range_not_called() -> Result {
        let mm = mm()?;
        let registration = Recorder::insert(&mm, pages(4..8))?;

        Running::begin(&mm, Event::UNMAP, pages(0..4)).end();
        Running::begin(&mm, Event::UNMAP, pages(8..9)).end();
        assert_eq!(registration.object().seen().calls, 0);
        Running::begin(&mm, Event::UNMAP, pages(3..5)).end();
        assert_eq!(registration.object().seen().calls, 1);
        Ok(())
    }

    #[test]
    fn overlapping_all_called() -> Result {
        let mm = mm()?;
        let [first, second] = [pages(1..3), pages(2..4)].map(|range| Recorder::insert(&mm, range));
        let (first, second) = (first?, second?);

        Running::begin(&mm, Event::UNMAP, pages(2..3)).end();
        assert_eq!(first.object().seen().calls, 1);
        assert_eq!(second.object().seen().calls, 1);
        drop(first);
        Running::begin(&mm, Event::UNMAP, pages(2..3)).end();
        assert_eq!(second.object().seen().calls, 2);
        Ok(())
    }

    #[test]
    fn unmap_invokes_callback() -> Result {
        let mm = mm()?;
        // SAFETY: This maps and unmaps pages that nobody else uses.
        let addr = unsafe {
            bindings::vm_mmap(
                core::ptr::null_mut(),
                0,
                2 * PAGE_SIZE,
                bindings::PROT_READ as usize,
                (bindings::MAP_PRIVATE | bindings::MAP_ANONYMOUS) as usize,
                0,
            )
        };
        let registration = Recorder::insert(&mm, addr..addr + PAGE_SIZE)?;

        // SAFETY: As above.
        to_result(unsafe { bindings::vm_munmap(addr, 2 * PAGE_SIZE) })?;
        assert!(
            registration.object().seen().last == Some((Event::UNMAP, addr, addr + 2 * PAGE_SIZE))
        );
        Ok(())
    }

    #[test]
    fn empty_range_is_refused() -> Result {
        let mm = mm()?;

        assert_eq!(
            Recorder::insert(&mm, PAGE_SIZE..PAGE_SIZE).err(),
            Some(EOVERFLOW)
        );
        assert_eq!(
            Recorder::insert(
                &mm,
                Range {
                    start: PAGE_SIZE,
                    end: 0
                }
            )
            .err(),
            Some(EOVERFLOW)
        );
        Ok(())
    }

    #[test]
    fn remove_returns_the_object() -> Result {
        let mm = mm()?;
        let registration = Recorder::insert(&mm, pages(1..2))?;
        let recorder = registration.object().clone();
        let removed = registration.remove();

        assert!(Arc::ptr_eq(&recorder, &removed));
        assert_eq!(removed.seen().removed, 1);
        Running::begin(&mm, Event::UNMAP, pages(1..2)).end();
        assert_eq!(removed.seen().calls, 0);
        Ok(())
    }

    #[test]
    fn foreign_ownable() -> Result {
        let mm = mm()?;
        let ptr = Recorder::insert(&mm, pages(1..2))?.into_foreign();

        Running::begin(&mm, Event::UNMAP, pages(1..2)).end();
        // SAFETY: The pointer comes from `into_foreign()` and is used for the last time below.
        let recorder =
            Arc::from(unsafe { <Registration<Recorder> as ForeignOwnable>::borrow(ptr) });
        assert_eq!(recorder.seen().calls, 1);
        assert_eq!(recorder.seen().removed, 0);
        // SAFETY: As above.
        drop(unsafe { <Registration<Recorder> as ForeignOwnable>::from_foreign(ptr) });
        assert_eq!(recorder.seen().removed, 1);
        Ok(())
    }

    /// An insertion is deferred while an invalidation that has invoked a callback is running.
    #[test]
    fn deferred_insertion() -> Result {
        let mm = mm()?;
        let other = Recorder::insert(&mm, pages(1..2))?;
        let running = Running::begin(&mm, Event::UNMAP, pages(1..2));
        let registration = Recorder::insert(&mm, pages(1..2))?;

        Running::begin(&mm, Event::UNMAP, pages(1..2)).end();
        assert_eq!(other.object().seen().calls, 2);
        assert_eq!(registration.object().seen().calls, 0);

        // Does not wait.
        let dropped = Recorder::insert(&mm, pages(1..2))?.remove();
        assert_eq!(dropped.seen().removed, 1);

        running.end();
        Running::begin(&mm, Event::UNMAP, pages(1..2)).end();
        assert_eq!(registration.object().seen().calls, 1);
        assert_eq!(dropped.seen().calls, 0);
        Ok(())
    }

    /// If there is a tree already, `prepare()` does not wait for invalidations.
    #[test]
    fn prepare_does_not_wait() -> Result {
        let mm = mm()?;
        let registration = Recorder::insert(&mm, pages(1..2))?;
        let running = Running::begin(&mm, Event::UNMAP, pages(1..2));

        prepare(&mm)?;
        running.end();
        assert_eq!(registration.object().seen().calls, 1);
        Ok(())
    }

    #[test]
    fn wait_for_in_flight() -> Result {
        let mm = mm()?;
        let ended = Arc::pin_init(new_spinlock!(false), GFP_KERNEL)?;
        let waiting = Arc::pin_init(Completion::new(), GFP_KERNEL)?;
        let running = Running::begin(&mm, Event::UNMAP, pages(0..9));
        let registration = Recorder::insert(&mm, pages(1..2))?;

        {
            let (ended, waiting) = (ended.clone(), waiting.clone());
            workqueue::system_unbound().try_spawn(GFP_KERNEL, move || {
                waiting.wait_for_completion();
                *ended.lock() = true;
                running.end();
            })?;
        }
        waiting.complete_all();
        registration.wait_for_in_flight();
        assert!(*ended.lock());
        assert_eq!(registration.object().seen().calls, 0);
        Ok(())
    }

    /// Dropping a registration waits for a running callback.
    #[test]
    fn drop_while_callback_runs() -> Result {
        let mm = mm()?;
        let registration = Recorder::insert(&mm, pages(1..2))?;
        let recorder = registration.object().clone();
        let done = Arc::pin_init(Completion::new(), GFP_KERNEL)?;

        recorder.seen.lock().hold = true;
        {
            let (mm, done) = (mm.clone(), done.clone());
            workqueue::system_unbound().try_spawn(GFP_KERNEL, move || {
                Running::begin(&mm, Event::UNMAP, pages(1..2)).end();
                drop(mm);
                done.complete_all();
            })?;
        }
        while recorder.seen().inside == 0 {
            cond_resched();
        }
        {
            let recorder = recorder.clone();
            workqueue::system_unbound()
                .try_spawn(GFP_KERNEL, move || recorder.seen.lock().hold = false)?;
        }
        drop(registration);

        let seen = recorder.seen();
        assert_eq!(seen.inside, 0);
        assert_eq!(seen.removed, 1);
        done.wait_for_completion();
        assert_eq!(recorder.seen().calls, 1);
        Ok(())
    }
}

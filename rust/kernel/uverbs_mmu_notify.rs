// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Tells a process when the mapping behind one of its memory regions (MRs) changes.
//!
//! A [`Watch`] detects changes of the mapping of one MR. A [`Queue`] collects events and backs one
//! notification FD. This file contains the C entry points declared in [`uverbs_mmu_notify.h`];
//! `queue` implements watches and queues, `state` the representation of events.
//!
//! # Registration
//!
//! 1. Allocate the watch and insert its notifier.
//! 2. Wait for the running invalidations of the address space. Later invalidations invoke the
//!    callback of the watch.
//! 3. The driver pins the pages.
//! 4. Finalize the uobject and copy all responses to userspace.
//! 5. The watch goes live. If it has recorded an invalidation since step 1, the MR is *born stale*:
//!    an event is queued at once. Neither this step nor anything after it can fail.
//!
//! So each change of the mapping either completes before the pages are pinned or is reported.
//!
//! If one of the steps 1 to 4 fails, the watch is stopped. No event has been queued for it.
//!
//! # States
//!
//! A watch is *registering* until step 5, then *live*, and finally *stopped*. Only a live watch
//! queues events. A queue is *closed* as soon as its context, its device or its file goes away:
//! the generation advances one last time, and no more events are delivered. The watches of
//! the queue remain until their MRs are deregistered.
//!
//! # Deregistration
//!
//! The driver's `dereg_mr` comes first, so that the device does not access unwatched pages. Then
//! the watch is stopped: its notifier is removed, which waits for running callbacks, and a pending
//! event is dropped. The result is the number of delivered events.
//!
//! # Guarantees
//!
//! Most tests name the guarantee that they check:
//!
//! - G1, nothing missed: every change that can make a live MR stale is reported.
//! - G2, in time: when the call that makes the change returns, the generation has advanced, or an
//!   event that covers the change is pending.
//! - G3, registration: a change during a registration completes before the pages are pinned, or is
//!   reported. A registration that fails queues no event.
//! - G4, nothing lost: later changes merge into the pending event of the MR. A read() that fails
//!   consumes no event.
//! - G5, exact count: deregistration returns the number of delivered events. No event is delivered
//!   afterwards.
//! - G6, waits: no wake-up is lost. An invalidation waits for at most one batch of events.
//! - G7, quiet: changes of protection and similar events are not reported.
//! - G8, lifetimes: close, deregistration, exit, exec, fork and removal of the device are safe in
//!   any order.
//!
//! Locks and references are described in `queue`.
//!
//! [`uverbs_mmu_notify.h`]: srctree/drivers/infiniband/core/uverbs_mmu_notify.h

use core::{
    mem::offset_of,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    alloc::allocator::Vmalloc,
    bindings,
    fs::File,
    iov::IovIterDest,
    mm::{
        interval_notifier::Registration,
        MmWithUser, //
    },
    prelude::*,
    sync::{
        poll::PollTable,
        Arc,
        ArcBorrow, //
    },
    task::{
        cond_resched,
        CurrentTask, //
    },
    transmute::AsBytes,
    types::ForeignOwnable, //
};

// Without a path rustc looks for the modules of a crate root next to it, among the C files.
#[path = "uverbs_mmu_notify/queue.rs"]
mod queue;
#[path = "uverbs_mmu_notify/state.rs"]
mod state;
#[cfg(CONFIG_INFINIBAND_USER_MMU_NOTIFY_KUNIT_TEST)]
#[path = "uverbs_mmu_notify/tests.rs"]
mod tests;
#[path = "uverbs_mmu_notify/trace.rs"]
mod trace;

use queue::{
    Buffer,
    CounterPage,
    Queue,
    Watch, //
};
use state::{
    Reason,
    Record, //
};

// Check that `state` and `queue` agree with the uAPI.
const _: () = {
    use bindings::{
        ib_uverbs_mmu_notify_event as UapiEvent,
        ib_uverbs_mmu_notify_page as UapiPage, //
    };

    assert!(size_of::<Record>() == size_of::<UapiEvent>());
    assert!(offset_of!(Record, cookie) == offset_of!(UapiEvent, cookie));
    assert!(offset_of!(Record, start) == offset_of!(UapiEvent, start));
    assert!(offset_of!(Record, end) == offset_of!(UapiEvent, end));
    assert!(offset_of!(Record, generation) == offset_of!(UapiEvent, generation));
    assert!(offset_of!(Record, reasons) == offset_of!(UapiEvent, reasons));
    assert!(CounterPage::GENERATION == offset_of!(UapiPage, generation));
    assert!(
        Reason::Unmapped as u32
            == bindings::ib_uverbs_mmu_notify_reason_IB_UVERBS_MMU_NOTIFY_UNMAPPED
    );
    assert!(
        Reason::MaybeStale as u32
            == bindings::ib_uverbs_mmu_notify_reason_IB_UVERBS_MMU_NOTIFY_MAYBE_STALE
    );
};

// SAFETY: `Record` consists of integers, and its size is the sum of theirs: there is no padding.
unsafe impl AsBytes for Record {}

impl Buffer for IovIterDest<'_> {
    fn copy(&mut self, records: &[Record]) -> Result {
        self.copy_to_iter_nofault(records.as_bytes())
    }

    fn fault_in(&mut self, count: usize) -> Result<usize> {
        match self.fault_in_writeable(count * size_of::<Record>()) / size_of::<Record>() {
            0 => Err(EFAULT),
            count => Ok(count),
        }
    }

    fn interrupted(&self) -> bool {
        cond_resched();
        current!().signal_pending()
    }
}

/// Returns the address space of a task, or `EPERM` for a kernel thread without one.
fn mm_of(task: &CurrentTask) -> Result<&MmWithUser> {
    task.mm().ok_or(EPERM)
}

/// # Safety
///
/// `queue` must come from [`ib_uverbs_mmu_queue_alloc`], and the reference that goes with it must
/// not be put during `'a`.
unsafe fn borrow_queue<'a>(queue: *mut bindings::ib_uverbs_mmu_queue) -> ArcBorrow<'a, Queue> {
    // SAFETY: The pointer comes from `Arc::into_foreign()`, and by the requirements of this
    // function the `Arc` lives long enough.
    unsafe { <Arc<Queue> as ForeignOwnable>::borrow(queue.cast()) }
}

fn into_err_ptr<T>(result: Result<*mut c_void>) -> *mut T {
    result.map_or_else(Error::to_ptr, <*mut c_void>::cast)
}

/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_alloc() -> *mut bindings::ib_uverbs_mmu_queue {
    into_err_ptr(
        mm_of(current!())
            .and_then(Queue::new)
            .map(ForeignOwnable::into_foreign),
    )
}

/// # Safety
///
/// The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`].
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_get(queue: *mut bindings::ib_uverbs_mmu_queue) {
    // SAFETY: The caller owns a reference during this call.
    let queue = unsafe { borrow_queue(queue) };

    // The new reference is dropped by `ib_uverbs_mmu_queue_close_put()` or
    // `ib_uverbs_mmu_queue_release_put()`.
    let _ = Arc::from(queue).into_foreign();
}

/// # Safety
///
/// The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`], which
/// this function takes over.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_close_put(queue: *mut bindings::ib_uverbs_mmu_queue) {
    // SAFETY: The pointer comes from `into_foreign()`, and each reference is taken over once.
    let queue = unsafe { <Arc<Queue> as ForeignOwnable>::from_foreign(queue.cast()) };

    queue.close();
}

/// # Safety
///
/// The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`], which
/// this function takes over. After this call the page of the queue must only be used through
/// references to the page itself.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_release_put(
    queue: *mut bindings::ib_uverbs_mmu_queue,
) {
    // SAFETY: The pointer comes from `into_foreign()`, and each reference is taken over once.
    let queue = unsafe { <Arc<Queue> as ForeignOwnable>::from_foreign(queue.cast()) };

    queue.release();
}

/// # Safety
///
/// - The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`].
/// - `to` must be a valid `iov_iter` for writing to, which nobody else uses during this call.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_read(
    queue: *mut bindings::ib_uverbs_mmu_queue,
    to: *mut bindings::iov_iter,
    nonblock: bool,
) -> isize {
    // SAFETY: The caller owns a reference during this call.
    let queue = unsafe { borrow_queue(queue) };
    // SAFETY: The caller promises that the `iov_iter` is valid, a destination, and ours alone.
    let to = unsafe { IovIterDest::from_raw(to) };

    let mut read = || {
        if !queue.belongs_to(mm_of(current!())?) {
            return Err(EPERM);
        }
        match to.len() / size_of::<Record>() {
            0 => Err(EINVAL),
            max => queue.read(max, nonblock, to),
        }
    };

    match read() {
        Ok(events) => (events * size_of::<Record>()) as isize,
        Err(error) => error.to_errno() as isize,
    }
}

/// # Safety
///
/// - The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`].
/// - `file` must be a valid file that is a stream, and `wait` null or a valid `poll_table`.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_poll(
    queue: *mut bindings::ib_uverbs_mmu_queue,
    file: *mut bindings::file,
    wait: *mut bindings::poll_table_struct,
) -> bindings::__poll_t {
    // SAFETY: The caller owns a reference during this call.
    let queue = unsafe { borrow_queue(queue) };
    // SAFETY: The caller promises that the file is valid during this call, and a stream. So the
    // rules about `fdget_pos` do not apply.
    let file = unsafe { File::from_raw_file(file) };
    // SAFETY: The caller promises that the table is null or valid.
    let table = unsafe { PollTable::from_raw(wait) };

    queue.poll(file, table)
}

/// # Safety
///
/// The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`].
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_page(
    queue: *mut bindings::ib_uverbs_mmu_queue,
) -> *mut bindings::page {
    // SAFETY: The caller owns a reference during this call.
    let queue = unsafe { borrow_queue(queue) };

    queue.with_page(|page| {
        page.map_or(ptr::null_mut(), |page| {
            // SAFETY: The page comes from vmalloc, and is not freed while it is borrowed.
            unsafe { Vmalloc::to_page(NonNull::from(page).cast()) }.as_ptr()
        })
    })
}

/// # Safety
///
/// The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`].
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_watch_start(
    queue: *mut bindings::ib_uverbs_mmu_queue,
    start: u64,
    length: u64,
    cookie: u64,
) -> *mut bindings::ib_uverbs_mmu_watch {
    // SAFETY: The caller owns a reference during this call.
    let queue = unsafe { borrow_queue(queue) };

    let watch = || {
        let end = start.checked_add(length).ok_or(EINVAL)?;
        // CAST: Only 64-bit architectures build this file.
        let range = start as usize..end as usize;

        Watch::start(queue, mm_of(current!())?, range, cookie)
    };

    into_err_ptr(watch().map(ForeignOwnable::into_foreign))
}

/// # Safety
///
/// `watch` must come from [`ib_uverbs_mmu_watch_start`], and not be stopped during this call.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_watch_go_live(watch: *mut bindings::ib_uverbs_mmu_watch) {
    // SAFETY: The pointer comes from `into_foreign()`, and the caller promises that the
    // registration lives during this call.
    unsafe { <Registration<Watch> as ForeignOwnable>::borrow(watch.cast()) }.go_live();
}

/// # Safety
///
/// `watch` must come from [`ib_uverbs_mmu_watch_start`], and not be stopped yet.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_watch_stop(
    watch: *mut bindings::ib_uverbs_mmu_watch,
) -> u32 {
    // SAFETY: The pointer comes from `into_foreign()`, and the caller promises that it is not used
    // again.
    queue::stop(unsafe { <Registration<Watch> as ForeignOwnable>::from_foreign(watch.cast()) })
}

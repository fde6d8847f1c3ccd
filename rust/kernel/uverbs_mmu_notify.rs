// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! The core of MMU notification for userspace verbs: watches of the mapping under memory regions,
//! and the queues that userspace reads from what has happened to them.
//!
//! This file is the border to the C half, [`uverbs_mmu_notify.h`] documents what it exports.
//! `queue` has the logic, and `state` what is known of one memory region.
//!
//! [`uverbs_mmu_notify.h`]: srctree/drivers/infiniband/core/uverbs_mmu_notify.h

use core::{
    mem::offset_of,
    ptr::NonNull, //
};
use kernel::{
    alloc::allocator::Vmalloc,
    bindings,
    fs::File,
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
    task::CurrentTask,
    transmute::AsBytes,
    types::ForeignOwnable,
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceWriter, //
    }, //
};

// A crate root looks for its modules beside itself, among the C files.
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

// `state` and `queue` know the uAPI by these.
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
    assert!(
        Reason::Exited as u32 == bindings::ib_uverbs_mmu_notify_reason_IB_UVERBS_MMU_NOTIFY_EXITED
    );
};

// SAFETY: `Record` consists of integers, and its size is the sum of theirs: there is no padding.
unsafe impl AsBytes for Record {}

impl Buffer for UserSliceWriter {
    fn copy(&mut self, records: &[Record]) -> Result {
        // New records may come for as long as this goes on.
        if current!().fatal_signal_pending() {
            return Err(EINTR);
        }
        self.write_slice_nofault(records.as_bytes())
    }

    fn make_ready(&mut self, count: usize, again: bool) -> Result<usize> {
        if current!().fatal_signal_pending() {
            return Err(EINTR);
        }
        // No other signal ends the call for pages that only have to be faulted in. But if that
        // does not help, it may never do.
        if again && current!().signal_pending() {
            return Err(ERESTARTSYS);
        }
        match self.fault_in(count * size_of::<Record>()) / size_of::<Record>() {
            0 => Err(EFAULT),
            count => Ok(count),
        }
    }
}

/// Returns the address space of a task, or `EPERM` if it has none, as kernel threads do not.
fn mm_of(task: &CurrentTask) -> Result<&MmWithUser> {
    task.mm().ok_or(EPERM)
}

/// # Safety
///
/// `queue` must come from [`ib_uverbs_mmu_queue_alloc`], and the reference that goes with it must
/// not be given up during `'a`.
unsafe fn borrow_queue<'a>(queue: *mut bindings::ib_uverbs_mmu_queue) -> ArcBorrow<'a, Queue> {
    // SAFETY: The pointer comes from `Arc::into_foreign()`, and by the requirements of this
    // function the `Arc` lives long enough.
    unsafe { <Arc<Queue> as ForeignOwnable>::borrow(queue.cast()) }
}

fn err_ptr_or<T>(result: Result<*mut c_void>) -> *mut T {
    result.map_or_else(Error::to_ptr, <*mut c_void>::cast)
}

/// # Safety
///
/// Always safe to call.
// Required to be unsafe due to the `#[export]` annotation.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_alloc() -> *mut bindings::ib_uverbs_mmu_queue {
    err_ptr_or(
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

    // `ib_uverbs_mmu_queue_close_put()` gives it up.
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
/// The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`].
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_read(
    queue: *mut bindings::ib_uverbs_mmu_queue,
    buf: *mut c_char,
    count: usize,
    nonblock: bool,
) -> isize {
    // SAFETY: The caller owns a reference during this call.
    let queue = unsafe { borrow_queue(queue) };
    let mut buffer = UserSlice::new(UserPtr::from_ptr(buf.cast()), count).writer();

    let mut read = || {
        if !queue.belongs_to(mm_of(current!())?) {
            return Err(EPERM);
        }
        match count / size_of::<Record>() {
            0 => Err(EINVAL),
            max => queue.read(max, nonblock, &mut buffer),
        }
    };

    match read() {
        Ok(records) => (records * size_of::<Record>()) as isize,
        Err(error) => error.to_errno() as isize,
    }
}

/// # Safety
///
/// - The caller must own a reference to `queue`, an object from [`ib_uverbs_mmu_queue_alloc`].
/// - `file` must be a valid file, and `wait` null or a valid `poll_table`.
#[export]
pub unsafe extern "C" fn ib_uverbs_mmu_queue_poll(
    queue: *mut bindings::ib_uverbs_mmu_queue,
    file: *mut bindings::file,
    wait: *mut bindings::poll_table_struct,
) -> bindings::__poll_t {
    // SAFETY: The caller owns a reference during this call.
    let queue = unsafe { borrow_queue(queue) };
    // SAFETY: The caller promises that the file is valid. `fdget_pos()` takes no lock for a file
    // without a position, but nothing reads or writes the position of this one, and the reference
    // is used for `poll_wait()` only.
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

    // SAFETY: The counter page is an allocation of vmalloc, which lives as long as the queue.
    unsafe { Vmalloc::to_page(NonNull::from(queue.page()).cast()) }.as_ptr()
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

        Watch::new(queue, mm_of(current!())?, range, cookie)
    };

    err_ptr_or(watch().map(ForeignOwnable::into_foreign))
}

/// # Safety
///
/// `watch` must come from [`ib_uverbs_mmu_watch_start`], and not be stopped before the return.
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
    // SAFETY: The pointer comes from `into_foreign()`, and the caller promises that it is used for
    // the last time.
    queue::detach(unsafe { <Registration<Watch> as ForeignOwnable>::from_foreign(watch.cast()) })
}

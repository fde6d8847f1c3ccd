// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Tracepoints that show why a registration was invalidated.
//!
//! `include/trace/events/ib_uverbs_mmu_notify.h` describes their fields. Trace events are emitted
//! without the lock of the queue, so trace events of different tasks can be out of order.

use super::{
    queue::Queue,
    state::Record, //
};
use core::{
    ops::Range,
    ptr, //
};
#[cfg(CONFIG_TRACEPOINTS)]
use kernel::jump_label::static_branch_unlikely;
use kernel::{
    bindings,
    mm::interval_notifier::Invalidation,
    prelude::*, //
};

kernel::declare_trace! {
    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn uverbs_mmu_notify_start(queue: *const c_void, cookie: u64, start: u64, end: u64);

    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn uverbs_mmu_notify_invalidate(
        queue: *const c_void,
        cookie: u64,
        event: c_int,
        start: u64,
        end: u64,
        generation: u64,
    );

    /// # Safety
    ///
    /// `record` must be valid for reads.
    unsafe fn uverbs_mmu_notify_deliver(
        queue: *const c_void,
        record: *const bindings::ib_uverbs_mmu_notify_event,
    );

    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn uverbs_mmu_notify_stop(queue: *const c_void, cookie: u64, events_reported: u32);
}

/// A watch of the addresses `range` was started.
#[inline]
pub(crate) fn start(queue: &Queue, cookie: u64, range: &Range<usize>) {
    let queue = ptr::from_ref(queue).cast();

    // SAFETY: Always safe to call.
    unsafe { uverbs_mmu_notify_start(queue, cookie, range.start as u64, range.end as u64) }
}

/// A watched range was invalidated. `generation` is the new generation, or `None` if it did not
/// advance.
#[inline]
pub(crate) fn invalidate(
    queue: &Queue,
    cookie: u64,
    invalidation: &Invalidation,
    generation: Option<u64>,
) {
    let queue = ptr::from_ref(queue).cast();
    let Range { start, end } = invalidation.range();
    let (start, end) = (start as u64, end as u64);
    let event = invalidation.event().as_raw() as c_int;
    let generation = generation.unwrap_or(0);

    // SAFETY: Always safe to call.
    unsafe { uverbs_mmu_notify_invalidate(queue, cookie, event, start, end, generation) }
}

/// Events were delivered.
#[inline]
pub(crate) fn deliver(queue: &Queue, records: &[Record]) {
    // Test the key once for all records: without CONFIG_JUMP_LABEL the test is a call.
    //
    // SAFETY: The static key of a tracepoint can always be queried.
    #[cfg(CONFIG_TRACEPOINTS)]
    let enabled = unsafe {
        static_branch_unlikely!(
            bindings::__tracepoint_uverbs_mmu_notify_deliver,
            bindings::tracepoint,
            key
        )
    };
    #[cfg(not(CONFIG_TRACEPOINTS))]
    let enabled = false;

    if enabled {
        for record in records {
            let queue = ptr::from_ref(queue).cast();

            // SAFETY: The reference is valid for reads, and `Record` has the layout of the C
            // struct.
            unsafe { uverbs_mmu_notify_deliver(queue, ptr::from_ref(record).cast()) }
        }
    }
}

/// A watch was stopped. `delivered` is the number of its events that had been delivered.
#[inline]
pub(crate) fn stop(queue: &Queue, cookie: u64, delivered: u32) {
    let queue = ptr::from_ref(queue).cast();

    // SAFETY: Always safe to call.
    unsafe { uverbs_mmu_notify_stop(queue, cookie, delivered) }
}

// SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB

//! Tracepoints, so that a person can see why a cached registration was dropped.
//!
//! `include/trace/events/ib_uverbs_mmu_notify.h` tells what each is about. They may be hit under
//! the lock of a queue.

use super::{
    queue::Queue,
    state::Record, //
};
use core::{
    ops::Range,
    ptr, //
};
use kernel::{
    bindings,
    mm::interval_notifier::Invalidation,
    prelude::*, //
};

kernel::declare_trace! {
    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn uverbs_mmu_notify_attach(queue: *const c_void, cookie: u64, start: u64, end: u64);

    /// # Safety
    ///
    /// Always safe to call.
    unsafe fn uverbs_mmu_notify_hit(
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
    unsafe fn uverbs_mmu_notify_detach(queue: *const c_void, cookie: u64, events_reported: u32);
}

/// An MR with the addresses `range` is watched.
#[inline]
pub(crate) fn attach(queue: &Queue, cookie: u64, range: &Range<usize>) {
    let queue = ptr::from_ref(queue).cast();

    // SAFETY: Always safe to call.
    unsafe { uverbs_mmu_notify_attach(queue, cookie, range.start as u64, range.end as u64) }
}

/// An invalidation concerns an MR; `generation` if it is reported now.
#[inline]
pub(crate) fn hit(
    queue: &Queue,
    cookie: u64,
    invalidation: &Invalidation,
    generation: Option<u64>,
) {
    let queue = ptr::from_ref(queue).cast();
    let Range { start, end } = invalidation.range();
    let event = invalidation.event().as_raw() as c_int;
    let generation = generation.unwrap_or(0);

    // SAFETY: Always safe to call.
    unsafe { uverbs_mmu_notify_hit(queue, cookie, event, start as u64, end as u64, generation) }
}

/// A record was copied to userspace.
#[inline]
pub(crate) fn deliver(queue: &Queue, record: &Record) {
    let queue = ptr::from_ref(queue).cast();

    // SAFETY: The reference is valid for reads, and `Record` has the layout of the C struct.
    unsafe { uverbs_mmu_notify_deliver(queue, ptr::from_ref(record).cast()) }
}

/// An MR, of which `events_reported` records were delivered, is not watched any more.
#[inline]
pub(crate) fn detach(queue: &Queue, cookie: u64, events_reported: u32) {
    let queue = ptr::from_ref(queue).cast();

    // SAFETY: Always safe to call.
    unsafe { uverbs_mmu_notify_detach(queue, cookie, events_reported) }
}

// SPDX-License-Identifier: GPL-2.0

//! Checks of the files of the kernel themselves, compiled against the shim in `src`.

// As the kernel does.
#![feature(arbitrary_self_types)]

extern crate kernel as pin_init;

#[rustfmt::skip]
#[path = "../../../kernel/uverbs_mmu_notify/queue.rs"]
mod queue;
#[rustfmt::skip]
#[path = "../../../kernel/uverbs_mmu_notify/state.rs"]
mod state;

/// The kernel's are of no interest here.
mod trace {
    use crate::{queue::Queue, state::Record};
    use core::ops::Range;
    use kernel::mm::interval_notifier::Invalidation;

    pub(crate) fn attach(_: &Queue, _: u64, _: &Range<usize>) {}
    pub(crate) fn hit(_: &Queue, _: u64, _: &Invalidation, _: Option<u64>) {}
    pub(crate) fn deliver(_: &Queue, _: &Record) {}
    pub(crate) fn detach(_: &Queue, _: u64, _: u32) {}
}

mod concurrent;
mod sequential;
mod single;

use kernel::sync::atomic::{Acquire, Atomic};
use queue::{CounterPage, Queue};

/// Loads the counter as userspace does.
fn generation(queue: &Queue) -> u64 {
    let page = core::ptr::from_ref(queue.page()).cast::<u8>();

    // SAFETY: This is where the page has its counter, and it lives as long as the queue.
    unsafe { &*page.add(CounterPage::GENERATION).cast::<Atomic<u64>>() }.load(Acquire)
}

// SPDX-License-Identifier: GPL-2.0
//! The cache on a kernel, by the verbs of this crate.

use super::Backend;
use crate::{
    mr::{Mr, MrArgs, Pd},
    queue::{Event, GenerationPage, NotifyQueue},
};
use std::{io, ops::Range, ptr, sync::Arc};

/// A kernel, by the verbs of this crate.
pub struct Verbs {
    pd: Arc<Pd>,
    queue: NotifyQueue,
    page: GenerationPage,
}

impl Verbs {
    /// Makes the queue. `EPROTONOSUPPORT` if the kernel cannot watch.
    ///
    /// # Safety
    ///
    /// What [`Mr::reg`] asks for holds for every range that the cache is asked
    /// to register.
    pub unsafe fn new(pd: &Arc<Pd>) -> io::Result<Self> {
        let queue = NotifyQueue::alloc(pd.context())?;
        queue.set_nonblocking(true)?;
        let page = queue.generation_page()?;
        let pd = pd.clone();
        Ok(Self { pd, queue, page })
    }

    /// The queue, for poll(). Only the cache may read it.
    pub fn queue(&self) -> &NotifyQueue {
        &self.queue
    }
}

impl Backend for Verbs {
    type Mr = Mr;

    #[inline]
    fn generation(&self) -> u64 {
        self.page.load()
    }

    fn read(&self, events: &mut [Event]) -> io::Result<usize> {
        self.queue.read(events)
    }

    fn register(&self, range: &Range<u64>, cookie: u64) -> io::Result<Mr> {
        let addr = ptr::with_exposed_provenance(range.start as usize);
        let length = range.end.saturating_sub(range.start) as usize;
        // SAFETY: By the contract of `new`.
        unsafe {
            Mr::reg(
                &self.pd,
                &MrArgs::new(addr, length).watched(&self.queue, cookie),
            )
        }
    }

    fn deregister(&self, mr: &mut Mr) -> io::Result<u32> {
        mr.destroy()
    }
}

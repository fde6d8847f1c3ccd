// SPDX-License-Identifier: GPL-2.0
//! The MMU notification FD: a queue of events and a page with a counter.

use crate::{context::Context, ioctl::Request, sys::uapi::*};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::read,
    mm::{MapFlags, ProtFlags, mmap, munmap},
    param::page_size,
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::{self, NonNull},
    slice,
    sync::atomic::{AtomicU64, Ordering, fence},
};

/// A change of the mapping under a watched memory region, as read() returns
/// it: `start` is inclusive, `end` exclusive, both are addresses of the CPU,
/// and unknown bits of `reasons` mean the same as
/// `IB_UVERBS_MMU_NOTIFY_MAYBE_STALE`.
pub type Event = ib_uverbs_mmu_notify_event;

/// An MMU notification FD.
///
/// It is a file: it outlives its context, and closing it leaves the regions
/// that it watched registered. Only the process that made it may read it
/// (`EPERM`). It fails with `EIO` when the context or the device is gone.
#[derive(Debug)]
pub struct NotifyQueue {
    fd: OwnedFd,
}

impl NotifyQueue {
    /// Makes a queue; it is blocking. `EPROTONOSUPPORT` if the kernel has none.
    pub fn alloc(context: &Context) -> io::Result<Self> {
        let id = UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE;
        let mut request =
            Request::new(UVERBS_OBJECT_MMU_NOTIFY, UVERBS_METHOD_MMU_NOTIFY_ALLOC).object(id, 0);
        context.call(&mut request)?;
        let fd = request.data(id).expect("it was added above") as i32;
        // SAFETY: The call has just made this FD for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// Makes read() fail with `EAGAIN` (`WouldBlock`) rather than wait.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        let mut flags = fcntl_getfl(self)?;
        flags.set(OFlags::NONBLOCK, on);
        Ok(fcntl_setfl(self, flags)?)
    }

    /// Reads events and returns how many. Only `EAGAIN` (`WouldBlock`) says that
    /// none is left; fewer than asked for does not. It fails without consuming
    /// anything: `EAGAIN`, `EINTR`, `EIO`, `EPERM`, `EINVAL` if there is no room.
    pub fn read(&self, events: &mut [Event]) -> io::Result<usize> {
        // SAFETY: An event is 40 bytes without padding, valid whatever they
        // are, so its bytes may be written one by one.
        let bytes = unsafe {
            slice::from_raw_parts_mut(events.as_mut_ptr().cast::<u8>(), size_of_val(events))
        };
        Ok(read(self, bytes)? / size_of::<Event>())
    }

    /// Reads until `EAGAIN`, and yields event by event; ends after another error
    /// too. The queue must be non-blocking.
    pub fn events(&self) -> Events<'_> {
        Events {
            queue: Some(self),
            batch: [Event::default(); BATCH],
            next: 0,
            len: 0,
        }
    }

    /// Waits until there is something to read (`IN`) or the queue is dead
    /// (`ERR`), for at most `timeout`; `None` waits for ever. Empty flags mean
    /// that the time is over.
    pub fn poll(&self, timeout: Option<Timespec>) -> io::Result<PollFlags> {
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        poll(&mut fds, timeout.as_ref())?;
        Ok(fds[0].revents())
    }

    /// Maps the page with the generation.
    pub fn generation_page(&self) -> io::Result<GenerationPage> {
        // SAFETY: A new mapping, at an address of the kernel's choice.
        let page = unsafe {
            mmap(
                ptr::null_mut(),
                page_size(),
                ProtFlags::READ,
                MapFlags::SHARED,
                self,
                0,
            )
        }?;
        Ok(GenerationPage {
            page: NonNull::new(page.cast()).expect("mmap never returns NULL"),
        })
    }
}

impl AsFd for NotifyQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for NotifyQueue {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<NotifyQueue> for OwnedFd {
    fn from(queue: NotifyQueue) -> Self {
        queue.fd
    }
}

const BATCH: usize = 16;

/// The events of a queue, see [`NotifyQueue::events`].
pub struct Events<'a> {
    /// `None` after an error.
    queue: Option<&'a NotifyQueue>,
    batch: [Event; BATCH],
    next: usize,
    len: usize,
}

impl Iterator for Events<'_> {
    type Item = io::Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next == self.len {
            self.next = 0;
            self.len = match self.queue?.read(&mut self.batch) {
                Ok(count) => count,
                Err(e) => {
                    (self.queue, self.len) = (None, 0);
                    return (e.kind() != io::ErrorKind::WouldBlock).then_some(Err(e));
                }
            };
        }
        let event = self.batch[..self.len].get(self.next)?;
        self.next += 1;
        Some(Ok(*event))
    }
}

/// The mapped page with the generation.
///
/// A forked child does not inherit the mapping: [`GenerationPage::load`] there
/// is a SIGSEGV.
#[derive(Debug)]
pub struct GenerationPage {
    page: NonNull<ib_uverbs_mmu_notify_page>,
}

// SAFETY: The page is only read, and atomically.
unsafe impl Send for GenerationPage {}
// SAFETY: As above.
unsafe impl Sync for GenerationPage {}

impl GenerationPage {
    /// Loads the generation with acquire order: what was changed before the
    /// generation that is returned is seen by the loads and reads that follow.
    #[inline]
    pub fn load(&self) -> u64 {
        // SAFETY: The page is mapped until `self` is dropped, and aligned.
        let generation = unsafe { AtomicU64::from_ptr(&raw mut (*self.page.as_ptr()).generation) };
        // Only a relaxed load is sure not to write, and the page is read-only.
        let value = generation.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        value
    }
}

impl Drop for GenerationPage {
    fn drop(&mut self) {
        // SAFETY: This is the mapping made by `generation_page`. Unmapping a
        // whole mapping does not fail.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), page_size()) };
    }
}

// SPDX-License-Identifier: GPL-2.0
//! userfaultfd: page faults that a test resolves.

use crate::map::{Map, PAGE};
use linux_raw_sys::{general::*, ioctl::*};
use rustix::{
    io::read,
    ioctl::{Opcode, Updater, ioctl, opcode},
    mm::{UserfaultfdFlags, userfaultfd},
};
use std::{ops::Range, os::fd::OwnedFd};

/// A userfaultfd.
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Lets accesses to missing ones of `pages` wait for [`Self::fill`].
    pub fn missing(map: Map, pages: Range<usize>) -> Self {
        Self::register(map, pages, UFFDIO_REGISTER_MODE_MISSING, 0)
    }

    /// Allows `pages` to be write-protected.
    pub fn writes(map: Map, pages: Range<usize>) -> Self {
        Self::register(map, pages, UFFDIO_REGISTER_MODE_WP, 0)
    }

    /// Allows a scan of /proc/self/pagemap to write-protect `pages`. A write ends it.
    pub fn written(map: Map, pages: Range<usize>) -> Self {
        let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED;
        Self::register(map, pages, UFFDIO_REGISTER_MODE_WP, features)
    }

    fn register(map: Map, pages: Range<usize>, mode: u32, features: u32) -> Self {
        // SAFETY: The tests access no such memory by a reference.
        let fd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }.expect("userfaultfd");
        let this = Self(fd);
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: features.into(),
            ioctls: 0,
        };
        this.call::<UFFDIO_API, _>(&mut api);
        this.call::<UFFDIO_REGISTER, _>(&mut uffdio_register {
            range: range(map, pages),
            mode: mode.into(),
            ioctls: 0,
        });
        this
    }

    /// Waits for a page fault, and returns its address.
    pub fn wait_for_fault(&self) -> u64 {
        let mut message = [0_u8; size_of::<uffd_msg>()];
        let len = read(&self.0, &mut message).expect("read the userfaultfd");
        assert_eq!(len, message.len(), "bytes read from the userfaultfd");
        // SAFETY: The kernel wrote a message, all of whose members are numbers.
        let message = unsafe { message.as_ptr().cast::<uffd_msg>().read_unaligned() };
        assert_eq!(
            u32::from(message.event),
            UFFD_EVENT_PAGEFAULT,
            "the event of the userfaultfd"
        );
        // SAFETY: It is of the event of a page fault.
        unsafe { message.arg.pagefault.address }
    }

    /// Fills `pages` with zeros, which resolves faults.
    pub fn fill(&self, map: Map, pages: Range<usize>) {
        self.call::<UFFDIO_ZEROPAGE, _>(&mut uffdio_zeropage {
            range: range(map, pages),
            mode: 0,
            zeropage: 0,
        });
    }

    /// As [`Self::missing`], for [`Self::poison`].
    pub fn poisonable(map: Map, pages: Range<usize>) -> Self {
        Self::register(
            map,
            pages,
            UFFDIO_REGISTER_MODE_MISSING,
            UFFD_FEATURE_POISON,
        )
    }

    /// Lets accesses to `pages` fail as if the memory had failed.
    pub fn poison(&self, map: Map, pages: Range<usize>) {
        const POISON: Opcode = opcode::read_write::<uffdio_poison>(0xaa, _UFFDIO_POISON as u8);
        self.call::<POISON, _>(&mut uffdio_poison {
            range: range(map, pages),
            mode: 0,
            updated: 0,
        });
    }

    /// Fills `page` with what is in `from`, so that it is private and writable.
    pub fn copy(&self, map: Map, page: usize, from: Map) {
        self.call::<UFFDIO_COPY, _>(&mut uffdio_copy {
            dst: map.at(page) as u64,
            src: from.at(0) as u64,
            len: PAGE as u64,
            mode: 0,
            copy: 0,
        });
    }

    /// Protects `pages` from writes, or allows them.
    pub fn protect(&self, map: Map, pages: Range<usize>, protect: bool) {
        // UFFDIO_WRITEPROTECT_MODE_WP is bit 0.
        let mode = protect.into();
        self.call::<UFFDIO_WRITEPROTECT, _>(&mut uffdio_writeprotect {
            range: range(map, pages),
            mode,
        });
    }

    fn call<const CALL: Opcode, T>(&self, argument: &mut T) {
        // SAFETY: Each call above has the argument that goes with it.
        unsafe { ioctl(&self.0, Updater::<CALL, T>::new(argument)) }.expect("userfaultfd ioctl");
    }
}

fn range(map: Map, pages: Range<usize>) -> uffdio_range {
    uffdio_range {
        start: map.at(pages.start) as u64,
        len: (pages.len() * PAGE) as u64,
    }
}

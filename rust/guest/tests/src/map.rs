// SPDX-License-Identifier: GPL-2.0
//! Memory whose mapping the tests change.

use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::{ffi::c_void, ops::Range, ptr};

/// The size of a page.
pub const PAGE: usize = 4096;

/// Private anonymous memory of whole pages. It is accessed by [`Map::load`] and
/// [`Map::store`] only, so any change of the mapping is sound.
///
/// It is never unmapped by itself: a test decides when the mapping changes, and
/// what is unmapped twice may be somebody else's. The end of the process takes
/// the rest.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    addr: usize,
}

impl Map {
    /// Maps `pages` pages, and writes to each: they are the process's own, and a
    /// registration changes nothing.
    pub fn new(pages: usize) -> Self {
        let map = Self::untouched(pages);
        for page in 0..pages {
            map.store(page, 0x11);
        }
        map
    }

    /// Maps `pages` pages that nothing has accessed.
    pub fn untouched(pages: usize) -> Self {
        // SAFETY: A new mapping, at an address of the kernel's choice.
        let addr = unsafe { map(ptr::null_mut(), pages, MapFlags::empty()) };
        Self {
            addr: addr.expose_provenance(),
        }
    }

    /// The address of page `page`.
    pub fn at(self, page: usize) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.addr + page * PAGE)
    }

    /// The first byte of page `page`.
    pub fn load(self, page: usize) -> u8 {
        // SAFETY: What a test loads from is mapped, and not referenced.
        unsafe { self.at(page).read_volatile() }
    }

    /// Stores to the first byte of page `page`.
    pub fn store(self, page: usize, byte: u8) {
        // SAFETY: As in `load`.
        unsafe { self.at(page).write_volatile(byte) }
    }

    /// munmap()s pages.
    pub fn unmap(self, pages: Range<usize>) {
        // SAFETY: No reference points into a map.
        unsafe { rustix::mm::munmap(self.void(pages.start), pages.len() * PAGE) }.expect("munmap");
    }

    /// Maps new memory at pages, over what is there.
    pub fn map_over(self, pages: Range<usize>) {
        // SAFETY: As in `unmap`.
        unsafe { map(self.void(pages.start), pages.len(), MapFlags::FIXED) };
    }

    /// MADV_DONTNEEDs pages.
    pub fn dont_need(self, pages: Range<usize>) {
        let (addr, len) = (self.void(pages.start), pages.len() * PAGE);
        // SAFETY: As in `unmap`.
        unsafe { rustix::mm::madvise(addr, len, Advice::LinuxDontNeed) }.expect("madvise");
    }

    /// mprotect()s pages.
    pub fn protect(self, pages: Range<usize>, protection: MprotectFlags) {
        let (addr, len) = (self.void(pages.start), pages.len() * PAGE);
        // SAFETY: As in `unmap`.
        unsafe { rustix::mm::mprotect(addr, len, protection) }.expect("mprotect");
    }

    fn void(self, page: usize) -> *mut c_void {
        self.at(page).cast()
    }
}

/// # Safety
///
/// As mmap().
unsafe fn map(addr: *mut c_void, pages: usize, flags: MapFlags) -> *mut c_void {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | flags;
    // SAFETY: Up to the caller.
    unsafe { rustix::mm::mmap_anonymous(addr, pages * PAGE, protection, flags) }.expect("mmap")
}

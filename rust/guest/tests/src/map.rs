// SPDX-License-Identifier: GPL-2.0
//! Memory whose mapping the tests change.

use crate::run;
use libc::c_int;
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{Advice, MapFlags, MprotectFlags, ProtFlags},
};
use std::{
    env,
    ffi::c_void,
    fs::{File, create_dir_all},
    io,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
};

/// The size of a page.
pub const PAGE: usize = 4096;

/// Memory of whole pages. It is accessed by [`Map::load`] and [`Map::store`] only, so any
/// change of the mapping is sound.
///
/// Dropping it unmaps nothing: the test decides when the mapping changes.
///
/// It is far below the addresses that the kernel chooses. So nothing else is mapped where a test
/// has unmapped watched memory, such as the stack of a thread or of a process that is being
/// spawned, whose end would be reported.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    addr: usize,
}

impl Map {
    /// Maps `pages` private pages, and writes to each, so that a registration replaces none.
    pub fn new(pages: usize) -> Self {
        let map = Self::untouched(pages);
        for page in 0..pages {
            map.store(page, 0x11);
        }
        map
    }

    /// Maps `pages` private pages that nothing has accessed.
    pub fn untouched(pages: usize) -> Self {
        Self::anonymous(pages, MapFlags::PRIVATE)
    }

    /// A page that cannot be accessed. An unmapped one could become another mapping.
    pub fn nowhere() -> Self {
        let map = Self::untouched(1);
        map.protect(0..1, MprotectFlags::empty());
        map
    }

    /// Maps `pages` anonymous pages.
    pub fn anonymous(pages: usize, flags: MapFlags) -> Self {
        // SAFETY: A new mapping, which replaces none.
        let addr = unsafe { map(place(pages), pages, flags | MapFlags::FIXED_NOREPLACE) };
        Self::existing(addr)
    }

    /// Maps the first `pages` pages of a file.
    pub fn of_file(file: impl AsFd, pages: usize, flags: MapFlags) -> Self {
        let (addr, protection) = (place(pages), ProtFlags::READ | ProtFlags::WRITE);
        let flags = flags | MapFlags::FIXED_NOREPLACE;
        // SAFETY: A new mapping, which replaces none.
        let addr = unsafe { rustix::mm::mmap(addr, pages * PAGE, protection, flags, file, 0) };
        Self::existing(addr.expect("mmap of a file"))
    }

    /// An existing mapping at `addr`.
    pub fn existing(addr: *mut c_void) -> Self {
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
        self.map_over_with(pages, MapFlags::PRIVATE);
    }

    /// Maps new anonymous memory of another kind at pages.
    pub fn map_over_with(self, pages: Range<usize>, flags: MapFlags) {
        // SAFETY: As in `unmap`.
        unsafe { map(self.void(pages.start), pages.len(), flags | MapFlags::FIXED) };
    }

    /// MADV_DONTNEEDs pages.
    pub fn dont_need(self, pages: Range<usize>) {
        let (addr, len) = (self.void(pages.start), pages.len() * PAGE);
        // SAFETY: As in `unmap`.
        unsafe { rustix::mm::madvise(addr, len, Advice::LinuxDontNeed) }.expect("madvise");
    }

    /// Gives `advice`, `MADV_*`, about pages.
    pub fn advise(self, pages: Range<usize>, advice: c_int) -> io::Result<()> {
        let (addr, len) = (self.void(pages.start), pages.len() * PAGE);
        // SAFETY: As in `unmap`.
        match unsafe { libc::madvise(addr, len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// mprotect()s pages.
    pub fn protect(self, pages: Range<usize>, protection: MprotectFlags) {
        let (addr, len) = (self.void(pages.start), pages.len() * PAGE);
        // SAFETY: As in `unmap`.
        unsafe { rustix::mm::mprotect(addr, len, protection) }.expect("mprotect");
    }

    /// [`Map::at`], of another type.
    pub fn void(self, page: usize) -> *mut c_void {
        self.at(page).cast()
    }
}

/// Where the next map of `pages` pages begins: behind the last one, not adjacent to it,
/// and aligned if it may have huge pages.
fn place(pages: usize) -> *mut c_void {
    const HUGE: usize = 512;
    static NEXT: AtomicUsize = AtomicUsize::new((64 << 30) / PAGE);
    let align = if pages < HUGE { 1 } else { HUGE };
    let next = NEXT.fetch_add(pages + align, Ordering::Relaxed);
    ptr::with_exposed_provenance_mut(next.next_multiple_of(align) * PAGE)
}

/// # Safety
///
/// As mmap().
unsafe fn map(addr: *mut c_void, pages: usize, flags: MapFlags) -> *mut c_void {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: Up to the caller.
    unsafe { rustix::mm::mmap_anonymous(addr, pages * PAGE, protection, flags) }.expect("mmap")
}

/// A new file in memory, of `pages` pages.
pub fn memfd(pages: usize, flags: MemfdFlags) -> OwnedFd {
    let file = memfd_create("test", MemfdFlags::CLOEXEC | flags).expect("memfd_create");
    ftruncate(&file, (pages * PAGE) as u64).expect("ftruncate");
    file
}

/// A new file of `pages` pages on a file system with write-back. This formats /dev/ram1, so the
/// test must run alone (ci/nextest.toml). A shared mapping of it can only be registered for
/// reading.
pub fn file_on_disk(pages: usize) -> OwnedFd {
    let disk = "/dev/ram1";
    let mount = env::temp_dir().join("disk").display().to_string();
    create_dir_all(&mount).expect("make a folder");
    run(&format!("mkfs.ext2 -q -F {disk}"));
    run(&format!("mount -t ext2 {disk} {mount}"));
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let file = options.open(format!("{mount}/file"));
    // The file keeps it.
    run(&format!("umount -l {mount}"));
    let file = OwnedFd::from(file.expect("make a file"));
    ftruncate(&file, (pages * PAGE) as u64).expect("ftruncate");
    file
}

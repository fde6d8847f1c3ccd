// SPDX-License-Identifier: GPL-2.0
//! A buffer whose mapping is changed under a registration.

use anyhow::{Context, Result};
use rustix::{
    mm::{MapFlags, ProtFlags, mmap_anonymous, munmap},
    param::page_size,
};
use std::{ops::Range, ptr};

/// A page of anonymous memory that is reached through raw pointers only, as the
/// adapter writes to it too.
pub struct Mapping {
    addr: *mut u8,
    mapped: bool,
}

impl Mapping {
    /// Maps a page, wherever the kernel likes.
    pub fn new() -> Result<Self> {
        let mut mapping = Self {
            addr: ptr::null_mut(),
            mapped: false,
        };
        mapping.map()?;
        Ok(mapping)
    }

    /// Maps a new page, at the address of the one unmapped before.
    pub fn map(&mut self) -> Result<()> {
        assert!(!self.mapped);
        let mut flags = MapFlags::PRIVATE;
        flags.set(MapFlags::FIXED_NOREPLACE, !self.addr.is_null());
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: No flag allows an existing mapping to be replaced.
        let addr = unsafe { mmap_anonymous(self.addr.cast(), page_size(), prot, flags) };
        self.addr = addr.context("mmap of the buffer")?.cast();
        self.mapped = true;
        Ok(())
    }

    /// Unmaps the page.
    pub fn unmap(&mut self) -> Result<()> {
        assert!(self.mapped);
        // SAFETY: The page is this mapping's, and nothing borrows from it.
        unsafe { munmap(self.addr.cast(), page_size()) }.context("munmap of the buffer")?;
        self.mapped = false;
        Ok(())
    }

    /// Its first address.
    pub fn addr(&self) -> *const u8 {
        self.addr
    }

    /// Its size.
    pub fn len(&self) -> usize {
        page_size()
    }

    /// Its addresses; the end is exclusive.
    pub fn range(&self) -> Range<u64> {
        let start = self.addr as u64;
        start..start + self.len() as u64
    }

    /// Writes `bytes` to its beginning.
    pub fn put(&mut self, bytes: &[u8]) {
        assert!(self.mapped && bytes.len() <= self.len());
        for (n, &byte) in bytes.iter().enumerate() {
            // SAFETY: The page is mapped, writable and at least that long.
            unsafe { self.addr.add(n).write_volatile(byte) };
        }
    }

    /// Reads its first `len` bytes, as the program sees them now.
    pub fn get(&self, len: usize) -> Vec<u8> {
        assert!(self.mapped && len <= self.len());
        (0..len)
            // SAFETY: The page is mapped and at least that long.
            .map(|n| unsafe { self.addr.add(n).read_volatile() })
            .collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.mapped {
            // Unmapping a whole mapping does not fail.
            let _ = self.unmap();
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Memory of several kinds.

use self::Kind::*;
use rustix::{
    fs::MemfdFlags,
    mm::{MapFlags, MremapFlags, ProtFlags, mmap, mmap_anonymous, mremap_fixed},
};
use std::{io, ops::Range, os::fd::OwnedFd, sync::RwLock};
use uverbs_mmu_notify_tests::*;

/// The most units of an arena.
pub const UNITS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Private,
    Shared,
    /// A shared mapping of the common file in memory.
    File,
    /// A private one.
    Copied,
    /// A shared mapping of the common file on a disk. It can only be registered for reading.
    Disk,
    /// A private one.
    DiskCopied,
    /// Transparent huge pages.
    Thp,
    /// Huge pages of hugetlb.
    Huge,
    /// The same in a shared mapping.
    SharedHuge,
}

impl Kind {
    /// Pages in a unit, which is mapped as a whole.
    fn unit(self) -> usize {
        match self {
            Thp => 32,
            Huge | SharedHuge => 512,
            _ => 1,
        }
    }

    pub fn units(self) -> usize {
        if self.is_huge() { 2 } else { UNITS }
    }

    pub fn is_huge(self) -> bool {
        matches!(self, Huge | SharedHuge)
    }

    /// The index of its file in [`Files`], if it has one.
    pub fn file(self) -> Option<usize> {
        match self {
            File | Copied => Some(MEMORY),
            Disk | DiskCopied => Some(DISK),
            _ => None,
        }
    }
}

/// The index in [`Files`] of the file in memory.
pub const MEMORY: usize = 0;
/// The index in [`Files`] of the file on a disk.
pub const DISK: usize = 1;

/// The common files of all processes.
pub struct Files([OwnedFd; 2]);

impl Files {
    pub fn new() -> Self {
        Self([memfd(UNITS, MemfdFlags::empty()), file_on_disk(UNITS)])
    }

    pub fn try_clone(&self) -> io::Result<Self> {
        let [memory, disk] = &self.0;
        Ok(Self([memory.try_clone()?, disk.try_clone()?]))
    }

    pub fn get(&self, which: usize) -> &OwnedFd {
        &self.0[which]
    }
}

pub struct Arena {
    pub index: usize,
    pub kind: Kind,
    pub map: Map,
    /// Where units are moved to.
    scratch: Map,
    /// Held exclusively while the memory is not mapped, or not writable.
    pub lock: RwLock<()>,
}

impl Arena {
    pub fn new(index: usize, kind: Kind, files: &Files) -> Self {
        let pages = kind.units() * kind.unit();
        let arena = Self {
            index,
            kind,
            map: Map::untouched(pages),
            scratch: Map::untouched(pages),
            lock: RwLock::new(()),
        };
        arena.map_over(0..kind.units(), files);
        arena
    }

    /// The bytes of a unit.
    pub fn unit(&self) -> usize {
        self.kind.unit() * PAGE
    }

    pub fn at(&self, unit: usize) -> *mut u8 {
        self.map.at(unit * self.kind.unit())
    }

    pub fn pages(&self, units: &Range<usize>) -> Range<usize> {
        units.start * self.kind.unit()..units.end * self.kind.unit()
    }

    /// Maps new memory of the kind.
    pub fn map_over(&self, units: Range<usize>, files: &Files) {
        self.map_at(self.map, units, files);
    }

    /// Each unit of hugetlb is a mapping by itself: in Linux 7.3.4 mremap() of a part of a private
    /// mapping loses the reservations of the rest. So none of them is ever split here.
    fn map_at(&self, map: Map, units: Range<usize>, files: &Files) {
        let step = if self.kind.is_huge() { 1 } else { units.len() };
        for unit in units.step_by(step) {
            self.map_part(map, unit..unit + step, files);
        }
    }

    fn map_part(&self, map: Map, units: Range<usize>, files: &Files) {
        let pages = self.pages(&units);
        let (at, len) = (map.void(pages.start), pages.len() * PAGE);
        let flags = MapFlags::FIXED
            | match self.kind {
                Private | Copied | DiskCopied | Thp => MapFlags::PRIVATE,
                Shared | File | Disk => MapFlags::SHARED,
                Huge => MapFlags::PRIVATE | MapFlags::HUGETLB,
                SharedHuge => MapFlags::SHARED | MapFlags::HUGETLB,
            };
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: No reference points into a map.
        let mapped = unsafe {
            match self.kind.file().map(|which| files.get(which)) {
                Some(file) => mmap(at, len, access, flags, file, (units.start * PAGE) as u64),
                None => mmap_anonymous(at, len, access, flags),
            }
        };
        assert_eq!(mapped, Ok(at), "mmap, {:?}", self.kind);
        if self.kind == Thp {
            map.advise(pages, libc::MADV_HUGEPAGE).expect("madvise");
        }
    }

    /// Moves a unit away. With `keep` its mapping stays.
    pub fn move_away(&self, unit: usize, keep: bool, files: &Files) {
        let keep = keep && !self.kind.is_huge();
        let flags = if keep {
            MremapFlags::DONTUNMAP
        } else {
            MremapFlags::empty()
        };
        self.move_unit(self.map, self.scratch, unit, flags);
        if !keep {
            self.map_over(unit..unit + 1, files);
        }
        self.scratch.unmap(self.pages(&(unit..unit + 1)));
    }

    /// Moves other memory of the kind over a unit.
    pub fn move_over(&self, unit: usize, files: &Files) {
        self.map_at(self.scratch, unit..unit + 1, files);
        self.move_unit(self.scratch, self.map, unit, MremapFlags::empty());
    }

    fn move_unit(&self, from: Map, to: Map, unit: usize, flags: MremapFlags) {
        let page = unit * self.kind.unit();
        let (from, to, len) = (from.void(page), to.void(page), self.unit());
        // SAFETY: As in `map_part`.
        let moved = unsafe { mremap_fixed(from, len, len, MremapFlags::MAYMOVE | flags, to) };
        assert_eq!(moved, Ok(to), "mremap, {:?}", self.kind);
    }
}

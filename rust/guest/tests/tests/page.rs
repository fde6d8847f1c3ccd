// SPDX-License-Identifier: GPL-2.0
//! The counter page.

use rustix::{
    io::Errno,
    mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap, mprotect, mremap, munmap},
};
use std::{ffi::c_void, io, ptr};
use uverbs_mmu_notify::MrArgs;
use uverbs_mmu_notify_tests::*;

/// mmap()s the queue; what it gives is unmapped at once.
fn try_map(
    fixture: &Fixture,
    len: usize,
    protection: ProtFlags,
    flags: MapFlags,
    offset: u64,
) -> io::Result<()> {
    // SAFETY: A new mapping, at an address of the kernel's choice.
    let addr = unsafe {
        mmap(
            ptr::null_mut(),
            len,
            protection,
            flags,
            &fixture.queue,
            offset,
        )
    }?;
    // SAFETY: Nobody else knows of it.
    unsafe { munmap(addr, len) }.expect("munmap");
    Ok(())
}

/// Interface: one page at offset 0, shared, read-only, and nothing else.
#[test]
fn mmap_refusals() {
    let fixture = Fixture::new();
    let (page, read, shared) = (PAGE as u64, ProtFlags::READ, MapFlags::SHARED);
    let write = read | ProtFlags::WRITE;
    let exec = read | ProtFlags::EXEC;
    for (len, protection, flags, offset, errno) in [
        (2 * PAGE, read, shared, 0, Errno::INVAL),
        (PAGE + 1, read, shared, 0, Errno::INVAL),
        (PAGE, read, shared, page, Errno::INVAL),
        (PAGE, read, shared, 1 << 40, Errno::INVAL),
        (PAGE, read, MapFlags::PRIVATE, 0, Errno::INVAL),
        (PAGE, write, MapFlags::PRIVATE, 0, Errno::INVAL),
        (PAGE, write, shared, 0, Errno::ACCESS),
        (PAGE, ProtFlags::WRITE, shared, 0, Errno::ACCESS),
        (PAGE, exec, shared, 0, Errno::PERM),
    ] {
        let what = format!("mmap of {len} bytes at {offset:#x}, {protection:?}, {flags:?}");
        expect_errno(
            try_map(&fixture, len, protection, flags, offset),
            errno,
            &what,
        );
    }
    try_map(&fixture, PAGE, read, shared, 0).expect("mmap of the page");
    try_map(&fixture, 8, read, shared, 0).expect("mmap of a part, which is the page");
}

/// Interface: the mapping cannot be made writable or executable, nor longer.
#[test]
fn mapping_cannot_be_changed() {
    let fixture = Fixture::new();
    let addr: *mut c_void = fixture.page.as_ptr().cast();
    for protection in [MprotectFlags::WRITE, MprotectFlags::EXEC] {
        let protection = MprotectFlags::READ | protection;
        // SAFETY: The page stays readable, whatever comes out.
        let changed = unsafe { mprotect(addr, PAGE, protection) };
        let what = format!("mprotect to {protection:?}");
        expect_errno(changed.map_err(Into::into), Errno::ACCESS, &what);
    }
    // SAFETY: The page stays where it is, whatever comes out.
    let longer = unsafe { mremap(addr, PAGE, 2 * PAGE, MremapFlags::empty()) };
    expect_errno(
        longer.map_err(Into::into),
        Errno::FAULT,
        "mremap to two pages",
    );
    assert_eq!(fixture.page.load(), 0, "the generation of a new queue");
}

/// Interface: MADV_DONTNEED does not lose the page.
#[test]
fn survives_madvise_dontneed() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let _mr = fixture.watch(map, 0..2, 7);
    let addr: *mut c_void = fixture.page.as_ptr().cast();
    for expected in 0..3 {
        assert_eq!(fixture.page.load(), expected, "generation before");
        // SAFETY: The page is a file's and comes back.
        unsafe { rustix::mm::madvise(addr, PAGE, rustix::mm::Advice::LinuxDontNeed) }
            .expect("madvise");
        assert_eq!(fixture.page.load(), expected, "generation after");
        if expected < 2 {
            map.unmap(expected as usize..expected as usize + 1);
        }
    }
}

/// Interface: a forked child does not inherit the mapping.
#[test]
fn gone_in_a_forked_child() {
    let fixture = Fixture::new();
    let child = in_child(|| fixture.page.load() as i32);
    assert_eq!(child, Exit::Signal(libc::SIGSEGV), "a load in the child");
    assert_eq!(fixture.page.load(), 0, "the parent's page");
}

/// Interface: all mappings show the same counter.
#[test]
fn two_mappings() {
    let fixture = Fixture::new();
    let other = fixture.queue.generation_page().expect("map it again");
    let map = Map::new(1);
    let _mr = fixture.watch(map, 0..1, 7);
    map.unmap(0..1);
    assert_eq!((fixture.page.load(), other.load()), (1, 1), "generations");
}

/// Interface: a queue without a mapping works.
#[test]
fn not_mapped() {
    let Fixture {
        queue, page, pd, ..
    } = Fixture::new();
    drop(page);
    let map = Map::new(1);
    let args = MrArgs::new(map.at(0), PAGE).watched(&queue, 7);
    let _mr = reg(&pd, &args);
    map.unmap(0..1);
    expect_records(&queue, &[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
}

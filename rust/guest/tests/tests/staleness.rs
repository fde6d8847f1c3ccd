// SPDX-License-Identifier: GPL-2.0
//! Checks by RDMA through the old MR that a reported registration is stale and an
//! unreported one is not. Each test is a row of the table in the manual.
//!
//! The ends of an address space (exit, exec, process_mrelease) are not here: no mapping is
//! left for a comparison.

use io_uring::{IoUring, opcode::Madvise};
use libc::{c_int, c_ulong, c_void};
use linux_raw_sys::{
    general::{PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, pm_scan_arg},
    mempolicy::{MPOL_MF_MOVE, MPOL_MF_STRICT},
};
use rustix::{
    fs::{FallocateFlags, MemfdFlags, fallocate, fsync},
    io::{Errno, pwrite},
    ioctl::{Opcode, Updater, ioctl, opcode},
    mm::{MapFlags, MprotectFlags, MremapFlags, mremap, mremap_fixed, munlock},
    process::{PidfdFlags, getpid, pidfd_open},
};
use std::{
    env,
    fs::{self, File},
    hint, io,
    ops::Range,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::Command,
    ptr, thread,
};
use uverbs_mmu_notify::{Mr, sys::verbs::*};
use uverbs_mmu_notify_tests::*;

/// Pages in a huge page.
const HUGE: usize = 512;

/// Memory. Its first page is registered.
struct Memory {
    map: Map,
    pages: usize,
    file: Option<OwnedFd>,
}

impl Memory {
    fn all(&self) -> Range<usize> {
        0..self.pages
    }

    fn len(&self) -> usize {
        self.pages * PAGE
    }

    fn file(&self) -> &OwnedFd {
        self.file.as_ref().expect("it is a file's")
    }

    #[track_caller]
    fn advise(&self, advice: c_int) {
        let advised = self.map.advise(self.all(), advice);
        advised.unwrap_or_else(|e| panic!("madvise {advice}: {e}"));
    }

    /// mremap()s all of it to `to`.
    fn move_to(&self, to: Map, flags: MremapFlags) {
        let (from, to) = (self.map.void(0), to.void(0));
        // SAFETY: No reference points into a map.
        let moved = unsafe { mremap_fixed(from, self.len(), self.len(), flags, to) };
        assert_eq!(moved, Ok(to), "mremap");
    }
}

fn of_file(pages: usize, file: MemfdFlags, map: MapFlags) -> Memory {
    let file = memfd(pages, file);
    let map = Map::of_file(&file, pages, map);
    Memory {
        map,
        pages,
        file: Some(file),
    }
}

fn anonymous(pages: usize, flags: MapFlags) -> Memory {
    Memory {
        map: Map::anonymous(pages, flags),
        pages,
        file: None,
    }
}

fn private() -> Memory {
    anonymous(2, MapFlags::PRIVATE)
}

/// The last page of a mapping of two.
fn tail() -> Memory {
    Memory {
        map: Map::existing(Map::new(2).void(1)),
        pages: 1,
        file: None,
    }
}

/// A shared mapping of a file.
fn shared() -> Memory {
    of_file(2, MemfdFlags::empty(), MapFlags::SHARED)
}

/// A private mapping of a file: the registered page is a copy.
fn copied() -> Memory {
    of_file(2, MemfdFlags::empty(), MapFlags::PRIVATE)
}

/// A shared mapping of a file on a disk.
fn on_disk() -> Memory {
    let file = file_on_disk(2);
    Memory {
        map: Map::of_file(&file, 2, MapFlags::SHARED),
        pages: 2,
        file: Some(file),
    }
}

fn reserve_huge_pages() {
    fs::write("/proc/sys/vm/nr_hugepages", "8").expect("reserve huge pages");
}

const PRIVATE_HUGE: MapFlags = MapFlags::PRIVATE.union(MapFlags::HUGETLB);

fn huge() -> Memory {
    reserve_huge_pages();
    anonymous(HUGE, PRIVATE_HUGE)
}

fn shared_huge() -> Memory {
    reserve_huge_pages();
    of_file(HUGE, MemfdFlags::HUGETLB, MapFlags::SHARED)
}

/// Room for a transparent huge page.
fn aligned() -> Memory {
    let map = Map::untouched(2 * HUGE);
    let map = Map::existing(map.void((map.at(0) as usize).wrapping_neg() / PAGE % HUGE));
    Memory {
        map,
        pages: HUGE,
        file: None,
    }
}

/// One transparent huge page.
fn thp() -> Memory {
    let memory = aligned();
    memory.advise(libc::MADV_HUGEPAGE);
    let map = memory.map;
    map.store(0, 0x11);
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", map.at(0) as usize);
    let smaps = &smaps[smaps.find(&start).expect("a mapping of its own")..];
    let huge = smaps
        .lines()
        .find(|line| line.starts_with("AnonHugePages:"));
    assert!(huge.unwrap().contains(" 2048 kB"), "huge page: {huge:?}");
    memory
}

/// A System V segment, removed with its last mapping.
fn segment() -> c_int {
    // SAFETY: It makes a segment, and maps nothing.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, PAGE, 0o600) };
    assert!(id >= 0, "shmget: {}", io::Error::last_os_error());
    id
}

fn attach(segment: c_int, addr: *mut c_void, flags: c_int) -> Map {
    // SAFETY: At `addr` is nothing but a map.
    let addr = unsafe { libc::shmat(segment, addr, flags) };
    assert_ne!(addr as isize, -1, "shmat: {}", io::Error::last_os_error());
    // SAFETY: It marks the segment, which stays while it is mapped.
    unsafe { libc::shmctl(segment, libc::IPC_RMID, ptr::null_mut()) };
    Map::existing(addr)
}

fn system_v() -> Memory {
    Memory {
        map: attach(segment(), ptr::null_mut(), 0),
        pages: 1,
        file: None,
    }
}

fn set_break(end: *mut c_void) {
    // SAFETY: `shrink_and_regrow` has the last page before the break.
    let ret = unsafe { libc::brk(end) };
    assert_eq!(ret, 0, "brk: {}", io::Error::last_os_error());
}

fn get_break() -> usize {
    // SAFETY: It only returns the break.
    unsafe { libc::sbrk(0) }.expose_provenance()
}

/// A page at the end of the heap.
fn heap() -> Memory {
    let start = get_break().next_multiple_of(PAGE);
    let map = Map::existing(ptr::with_exposed_provenance_mut(start));
    set_break(map.void(1));
    Memory {
        map,
        pages: 1,
        file: None,
    }
}

fn shrink_and_regrow(memory: &Memory) {
    let (start, end) = (memory.map.void(0), memory.map.void(1));
    assert_eq!(get_break(), end as usize, "the break is where it was");
    set_break(start);
    set_break(end);
}

/// Whether an RDMA write to `mr` reaches the first page of `map`.
#[track_caller]
fn reaches(peer: &Peer, map: Map, mr: &Mr) -> bool {
    let before = map.load(0);
    let byte = before.wrapping_add(1);
    let status = peer.write(map.at(0), mr.rkey(), byte);
    assert_eq!(status, IBV_WC_SUCCESS, "the work completion");
    let after = map.load(0);
    assert!([before, byte].contains(&after), "the byte: {after:#x}");
    after == byte
}

fn setup(memory: &Memory) -> (Fixture, Peer, Mr) {
    let fixture = Fixture::new();
    let peer = Peer::new(&fixture.pd);
    memory.map.store(0, 0x11);
    let mr = fixture.watch(memory.map, 0..1, 7);
    let before = fixture.page.load();
    assert!(reaches(&peer, memory.map, &mr), "a new registration");
    fixture.expect_quiet(before, "RDMA");
    (fixture, peer, mr)
}

/// G1: G2: after `change`, RDMA through the old registration succeeds, but does not reach
/// the mapped page. One event with `reasons` reports it.
#[track_caller]
fn becomes_stale(memory: Memory, reasons: u32, change: impl FnOnce(&Memory)) {
    let map = memory.map;
    let (fixture, peer, mr) = setup(&memory);
    let before = fixture.page.load();

    change(&memory);
    let generation = fixture.page.load();
    assert!(generation > before, "the generation after the change");
    let record = Record::new(map, 0..1, 7, generation, reasons);
    fixture.expect(&[record]);
    map.store(0, 0x22);
    assert!(!reaches(&peer, map, &mr), "it is not stale");

    let renewed = fixture.watch(map, 0..1, 8);
    assert!(reaches(&peer, map, &renewed), "a new registration");
}

/// G7: `change` is not reported, and RDMA still reaches the mapped page.
#[track_caller]
fn is_quiet(memory: Memory, change: impl FnOnce(&Memory)) {
    let (fixture, peer, mr) = setup(&memory);
    let before = fixture.page.load();
    change(&memory);
    fixture.expect_quiet(before, "the change");
    assert!(reaches(&peer, memory.map, &mr), "it is stale");
    memory.map.store(0, 0x33);
    assert!(reaches(&peer, memory.map, &mr), "it is stale after a store");
    fixture.expect_quiet(before, "RDMA");
}

/// RDMA still reaches the mapped page after `change`, which may be reported: the notifier
/// cannot tell.
#[track_caller]
fn is_not_stale(memory: Memory, change: impl FnOnce(&Memory)) {
    let (fixture, peer, mr) = setup(&memory);
    change(&memory);
    eprintln!("reported: {:?}", read_all(&fixture.queue));
    assert!(reaches(&peer, memory.map, &mr), "it is stale");
    memory.map.store(0, 0x33);
    assert!(reaches(&peer, memory.map, &mr), "it is stale after a store");
}

/// Watches memory that can only be registered for reading.
fn setup_for_reading(memory: &Memory) -> (Fixture, Peer, Mr) {
    let fixture = Fixture::new();
    let peer = Peer::new(&fixture.pd);
    memory.map.store(0, 0x11);
    let mut args = fixture.args(memory.map, 0..1, 7);
    args.access = IBV_ACCESS_REMOTE_READ;
    let mr = reg(&fixture.pd, &args);
    fixture.expect_quiet(0, "the registration");
    (fixture, peer, mr)
}

/// G7: write-back cleans the page and leaves it mapped.
#[test]
fn fsync_writeback() {
    let memory = on_disk();
    let (fixture, peer, mr) = setup_for_reading(&memory);
    for byte in [0x22, 0x33] {
        memory.map.store(0, byte);
        fsync(memory.file()).expect("fsync");
        assert_eq!(peer.read(memory.map.at(0), mr.rkey()), byte, "RDMA");
    }
    fixture.expect_quiet(0, "write-back");
}

/// G1: memory failure replaces the file's page.
#[test]
fn madv_hwpoison() {
    let memory = on_disk();
    let (fixture, peer, mr) = setup_for_reading(&memory);
    fsync(memory.file()).expect("fsync");
    // The page is pinned, so that this does not succeed altogether.
    eprintln!("{:?}", memory.map.advise(0..1, libc::MADV_HWPOISON));
    fixture.expect(&[Record::new(memory.map, 0..1, 7, 1, MAYBE_STALE)]);
    assert_eq!(pwrite(memory.file(), &[0x22], 0), Ok(1), "pwrite");
    assert_eq!(memory.map.load(0), 0x22, "what is mapped");
    assert_eq!(peer.read(memory.map.at(0), mr.rkey()), 0x11, "RDMA");
}

/// `struct hmm_dmirror_cmd` of lib/test_hmm_uapi.h.
#[repr(C)]
struct Mirror {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

const MIGRATE_TO_DEVICE: Opcode = opcode::read_write::<Mirror>(b'H', 2);
const EXCLUSIVE: Opcode = opcode::read_write::<Mirror>(b'H', 5);

/// Calls the test device of HMM, of the kernel, for the first page.
fn mirror<const CALL: Opcode>(memory: &Memory) -> Result<(), Errno> {
    let device = "/dev/hmm_dmirror0";
    if !Path::new(device).exists() {
        let modules = env::var("MODULES").expect("MODULES, which the guest sets");
        run(&format!("modprobe -d {modules} test_hmm"));
    }
    let device = File::options().read(true).write(true).open(device);
    let copy = Map::new(1);
    let mut argument = Mirror {
        addr: memory.map.at(0) as u64,
        ptr: copy.at(0) as u64,
        npages: 1,
        cpages: 0,
        faults: 0,
    };
    // SAFETY: It is the argument of both calls, and both addresses are of maps.
    unsafe {
        ioctl(
            device.expect("open the device"),
            Updater::<CALL, _>::new(&mut argument),
        )
    }
}

/// G7: exclusive access of a device is not reported. The next access of the CPU takes the
/// page back, which may be reported.
#[test]
fn hmm_exclusive() {
    let memory = private();
    let (fixture, peer, mr) = setup(&memory);
    let before = fixture.page.load();
    mirror::<EXCLUSIVE>(&memory).expect("exclusive access");
    fixture.expect_quiet(before, "the device's access");
    assert!(reaches(&peer, memory.map, &mr), "it is stale");
    eprintln!("reported: {:?}", read_all(&fixture.queue));
}

/// One test for each row.
macro_rules! rows {
    ($check:ident: $($(#[$doc:meta])+ $name:ident($($argument:expr),+);)+) => {
        $(
            $(#[$doc])+
            #[test]
            fn $name() {
                $check($($argument),+);
            }
        )+
    };
}

fn unmap_and_map(memory: &Memory, flags: MapFlags) {
    memory.map.unmap(memory.all());
    memory.map.map_over_with(memory.all(), flags);
}

fn move_away(memory: &Memory, flags: MapFlags) {
    let to = anonymous(memory.pages, flags);
    memory.move_to(to.map, MremapFlags::MAYMOVE);
    memory.map.map_over_with(memory.all(), flags);
}

fn truncate_and_extend(memory: &Memory) {
    for len in [0, memory.len()] {
        rustix::fs::ftruncate(memory.file(), len as u64).expect("ftruncate");
    }
}

fn punch(memory: &Memory) {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(memory.file(), mode, 0, memory.len() as u64).expect("fallocate");
}

rows! { becomes_stale:
    /// munmap, and mmap at the same address.
    munmap_mmap(private(), UNMAPPED, |m| unmap_and_map(m, MapFlags::PRIVATE));
    /// mmap over it.
    mmap_over(private(), UNMAPPED, |m| m.map.map_over(m.all()));
    /// mremap to elsewhere, and mmap at the old address.
    mremap_move(private(), UNMAPPED, |m| move_away(m, MapFlags::PRIVATE));
    /// mremap to a smaller size, and mmap of what was cut off.
    mremap_shrink(tail(), UNMAPPED, |m| {
        let start = m.map.void(0).wrapping_byte_sub(PAGE);
        // SAFETY: No reference points into a map.
        let cut = unsafe { mremap(start, 2 * PAGE, PAGE, MremapFlags::empty()) };
        assert_eq!(cut, Ok(start), "mremap");
        m.map.map_over(m.all());
    });
    /// mremap of another mapping over it.
    mremap_over(private(), UNMAPPED, |m| private().move_to(m.map, MremapFlags::MAYMOVE));
    /// mremap with MREMAP_DONTUNMAP: the pages move, the mapping stays.
    mremap_dontunmap(private(), UNMAPPED, |m| {
        m.move_to(private().map, MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP);
    });
    /// brk to a lower end, and back.
    brk(heap(), UNMAPPED, shrink_and_regrow);
    /// MADV_DONTNEED.
    madv_dontneed(private(), MAYBE_STALE, |m| m.advise(libc::MADV_DONTNEED));
    /// MADV_DONTNEED of a private file page: the file's own page is mapped again.
    madv_dontneed_private_file(copied(), MAYBE_STALE, |m| m.advise(libc::MADV_DONTNEED));
    /// MADV_DONTNEED_LOCKED.
    madv_dontneed_locked(private(), MAYBE_STALE, |m| {
        // SAFETY: It is mapped.
        unsafe { rustix::mm::mlock(m.map.void(0), m.len()) }.expect("mlock");
        m.advise(libc::MADV_DONTNEED_LOCKED);
    });
    /// MADV_DONTNEED by process_madvise.
    madv_dontneed_process_madvise(private(), MAYBE_STALE, |m| {
        let this = pidfd_open(getpid(), PidfdFlags::empty()).expect("pidfd_open");
        let memory = libc::iovec {
            iov_base: m.map.void(0),
            iov_len: m.len(),
        };
        // SAFETY: One range, which is a map.
        let len = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                this.as_raw_fd(),
                &memory,
                1,
                libc::MADV_DONTNEED,
                0,
            )
        };
        assert_eq!(len, m.len() as i64, "process_madvise: {}", io::Error::last_os_error());
    });
    /// MADV_DONTNEED by io_uring.
    madv_dontneed_io_uring(private(), MAYBE_STALE, |m| {
        let mut ring = IoUring::new(1).expect("make a ring");
        let advise = Madvise::new(m.map.void(0).cast(), m.len() as i64, libc::MADV_DONTNEED);
        // SAFETY: As in `move_to`.
        unsafe { ring.submission().push(&advise.build()) }.expect("there is room");
        ring.submit_and_wait(1).expect("submit");
        let result = ring.completion().next().map(|done| done.result());
        assert_eq!(result, Some(0), "madvise");
    });
    /// MADV_DONTNEED of a transparent huge page.
    madv_dontneed_thp(thp(), MAYBE_STALE, |m| m.advise(libc::MADV_DONTNEED));
    /// MADV_GUARD_INSTALL, and MADV_GUARD_REMOVE.
    madv_guard_install(private(), MAYBE_STALE, |m| {
        for advice in [102, 103] {
            m.advise(advice);
        }
    });
    /// MADV_REMOVE.
    madv_remove(shared(), MAYBE_STALE, |m| m.advise(libc::MADV_REMOVE));
    /// fallocate with FALLOC_FL_PUNCH_HOLE.
    punch_hole(shared(), MAYBE_STALE, punch);
    /// fallocate by another process.
    punch_hole_by_another_process(shared(), MAYBE_STALE, |m| {
        let child = in_child(|| {
            punch(m);
            0
        });
        assert_eq!(child, Exit::Code(0), "the child");
    });
    /// ftruncate to nothing, and back.
    ftruncate(shared(), MAYBE_STALE, truncate_and_extend);
    /// ftruncate below a private mapping, which loses its copy.
    ftruncate_private_file(copied(), MAYBE_STALE, truncate_and_extend);
    /// remap_file_pages: another page of the file is mapped there.
    remap_file_pages(shared(), UNMAPPED, |m| {
        // SAFETY: As in `move_to`.
        let ret = unsafe { libc::remap_file_pages(m.map.void(0), PAGE, 0, 1, 0) };
        assert_eq!(ret, 0, "remap_file_pages: {}", io::Error::last_os_error());
    });
    /// shmdt, and shmat of another segment.
    shmdt(system_v(), UNMAPPED, |m| {
        // SAFETY: As in `move_to`.
        assert_eq!(unsafe { libc::shmdt(m.map.void(0)) }, 0, "shmdt");
        attach(segment(), m.map.void(0), 0);
    });
    /// shmat of another segment with SHM_REMAP.
    shmat_remap(system_v(), UNMAPPED, |m| {
        attach(segment(), m.map.void(0), libc::SHM_REMAP);
    });
    /// Huge pages: munmap, and mmap at the same address.
    hugetlb_munmap_mmap(huge(), UNMAPPED, |m| unmap_and_map(m, PRIVATE_HUGE));
    /// Huge pages: mremap to elsewhere, and mmap at the old address.
    hugetlb_mremap_move(huge(), UNMAPPED | MAYBE_STALE, |m| move_away(m, PRIVATE_HUGE));
    /// Huge pages: MADV_DONTNEED.
    hugetlb_madv_dontneed(huge(), MAYBE_STALE, |m| m.advise(libc::MADV_DONTNEED));
    /// Huge pages: fallocate with FALLOC_FL_PUNCH_HOLE.
    hugetlb_punch_hole(shared_huge(), MAYBE_STALE, punch);
    /// Huge pages: ftruncate to nothing, and back.
    hugetlb_ftruncate(shared_huge(), MAYBE_STALE, truncate_and_extend);
}

/// fork, with stores on both sides, and the child's end.
fn fork_and_store(memory: &Memory) {
    let child = Child::idle();
    memory.map.store(0, 0x44);
    child.kill();
    let child = in_child(|| {
        memory.map.store(0, 0x55);
        0
    });
    assert_eq!(child, Exit::Code(0), "the child");
}

/// Waits until NUMA balancing has made pages fault.
fn balance(memory: &Memory) {
    let debug = "/sys/kernel/debug/sched/numa_balancing";
    for (file, value) in [("scan_delay_ms", "1"), ("scan_period_min_ms", "1")] {
        fs::write(format!("{debug}/{file}"), value).expect("set up NUMA balancing");
    }
    fs::write("/proc/sys/kernel/numa_balancing", "1").expect("turn on NUMA balancing");
    (1..memory.pages).for_each(|page| memory.map.store(page, 0x11));
    // The pages of a process of one thread are spared if they are near.
    let idle = thread::spawn(thread::park);
    // The page that is pinned is spared; the others share its mapping.
    let faults = || {
        // SAFETY: All members are numbers, and it may be written.
        unsafe {
            let mut usage = std::mem::zeroed::<libc::rusage>();
            libc::getrusage(libc::RUSAGE_THREAD, &mut usage);
            usage.ru_minflt
        }
    };
    let before = faults();
    while faults() - before < memory.pages as i64 / 2 {
        for page in 0..memory.pages {
            hint::black_box(memory.map.load(page));
        }
    }
    fs::write("/proc/sys/kernel/numa_balancing", "0").expect("turn off NUMA balancing");
    idle.thread().unpark();
    idle.join().unwrap();
}

rows! { is_quiet:
    /// mprotect to less, and back.
    mprotect(private(), |m| {
        for protection in [MprotectFlags::READ, MprotectFlags::empty()] {
            m.map.protect(0..1, protection);
        }
        m.map.protect(m.all(), MprotectFlags::READ | MprotectFlags::WRITE);
    });
    /// pkey_mprotect to another key, and back.
    pkey_mprotect(private(), |m| {
        // SAFETY: It makes a key, which is for nothing yet.
        let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) };
        assert!(key > 0, "pkey_alloc: {}", io::Error::last_os_error());
        for key in [key, 0] {
            let (addr, access) = (m.map.void(0), libc::PROT_READ | libc::PROT_WRITE);
            // SAFETY: As in `move_to`, and the key allows all.
            let ret = unsafe { libc::syscall(libc::SYS_pkey_mprotect, addr, m.len(), access, key) };
            assert_eq!(ret, 0, "pkey_mprotect: {}", io::Error::last_os_error());
        }
    });
    /// fork, and exec by the child.
    fork_exec(private(), |m| {
        let child = in_child(|| {
            m.map.store(0, 0x55);
            panic!("exec: {}", Command::new("true").exec());
        });
        assert_eq!(child, Exit::Code(0), "the child");
    });
    /// fork, with stores on both sides.
    fork(private(), fork_and_store);
    /// fork with a private file page.
    fork_private_file(copied(), fork_and_store);
    /// fork with a shared file page.
    fork_shared_file(shared(), fork_and_store);
    /// The soft-dirty bits are cleared.
    soft_dirty(private(), |m| {
        fs::write("/proc/self/clear_refs", "4").expect("clear the bits");
        m.map.store(0, 0x22);
    });
    /// Write-protection by userfaultfd, and its end.
    uffd_wp(private(), |m| {
        let fault = Userfault::writes(m.map, m.all());
        for protect in [true, false] {
            fault.protect(m.map, m.all(), protect);
        }
    });
    /// Write-protection by PAGEMAP_SCAN, which a store ends.
    pagemap_scan_wp(private(), |m| {
        const SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);
        let _fault = Userfault::written(m.map, m.all());
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC).into(),
            start: m.map.at(0) as u64,
            end: m.map.at(m.pages) as u64,
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_WRITTEN.into(),
            category_anyof_mask: 0,
            return_mask: 0,
        };
        let pagemap = File::open("/proc/self/pagemap").expect("open pagemap");
        // SAFETY: It is the argument that goes with the call.
        unsafe { ioctl(&pagemap, Updater::<SCAN, _>::new(&mut argument)) }.expect("scan");
        assert_eq!(argument.walk_end, argument.end, "the end of the scan");
        m.map.store(0, 0x22);
    });
    /// migrate_vma() to a device: a pinned page does not move.
    hmm_migrate(private(), |m| {
        assert_eq!(mirror::<MIGRATE_TO_DEVICE>(m), Err(Errno::NOENT), "nothing is there");
    });
    /// NUMA balancing makes pages fault.
    numa_hinting(anonymous(256, MapFlags::PRIVATE), balance);
    /// mremap to a larger size, in place.
    mremap_grow(private(), |m| {
        m.map.unmap(1..2);
        // SAFETY: No reference points into a map.
        let grown = unsafe { mremap(m.map.void(0), PAGE, 2 * PAGE, MremapFlags::empty()) };
        assert_eq!(grown, Ok(m.map.void(0)), "mremap");
    });
    /// mlock and munlock.
    mlock(private(), |m| {
        // SAFETY: It is mapped.
        unsafe { rustix::mm::mlock(m.map.void(0), m.len()).and_then(|()| munlock(m.map.void(0), m.len())) }
            .expect("mlock and munlock");
    });
    /// madvise() with hints that change no page.
    madvise_hints(private(), |m| {
        for advice in [
            libc::MADV_COLD,
            libc::MADV_WILLNEED,
            libc::MADV_SEQUENTIAL,
            libc::MADV_DONTFORK,
            libc::MADV_DOFORK,
            libc::MADV_WIPEONFORK,
            libc::MADV_KEEPONFORK,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_DONTDUMP,
            libc::MADV_DODUMP,
            libc::MADV_POPULATE_WRITE,
        ] {
            m.advise(advice);
        }
    });
    /// MADV_PAGEOUT.
    madv_pageout(private(), |m| m.advise(libc::MADV_PAGEOUT));
}

const NODES: c_int = 2;

/// Asks for the first page to be moved to the other node, and returns its node.
fn move_page(memory: &Memory, to: Option<c_int>) -> c_int {
    let (addr, mut node) = (memory.map.void(0), -1);
    let to: *const c_int = to.as_ref().map_or(ptr::null(), |to| to);
    // SAFETY: One page, and one place for its status.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            1,
            &addr,
            to,
            &mut node,
            MPOL_MF_MOVE,
        )
    };
    assert!(ret >= 0, "move_pages: {}", io::Error::last_os_error());
    node
}

/// The node that the first page is not on.
fn other_node(memory: &Memory) -> c_int {
    let node = move_page(memory, None);
    assert!((0..NODES).contains(&node), "the page's node: {node}");
    1 - node
}

/// Binds the memory to the other node, and returns whether that moved all of it.
fn bind(memory: &Memory) -> io::Result<()> {
    let nodes: c_ulong = 1 << other_node(memory);
    let (addr, len) = (memory.map.void(0), memory.len());
    let flags = MPOL_MF_MOVE | MPOL_MF_STRICT;
    // SAFETY: `nodes` is a mask of as many bits as are said.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            addr,
            len,
            libc::MPOL_BIND,
            &nodes,
            64,
            flags,
        )
    };
    match ret {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets KSM scan two pages with the same content.
fn merge(memory: &Memory) {
    let ksm = "/sys/kernel/mm/ksm";
    let twin = private();
    let content = memory.map.load(0);
    for map in [memory.map, twin.map] {
        map.store(0, content);
        map.advise(0..1, libc::MADV_MERGEABLE).expect("madvise");
    }
    let scans = || -> u64 {
        let scans = fs::read_to_string(format!("{ksm}/full_scans")).unwrap();
        scans.trim().parse().unwrap()
    };
    let before = scans();
    for (file, value) in [
        ("sleep_millisecs", "1"),
        ("pages_to_scan", "1000"),
        ("run", "1"),
    ] {
        fs::write(format!("{ksm}/{file}"), value).expect("run KSM");
    }
    // The first one takes down what the page holds, the second one may merge.
    while scans() < before + 4 {
        thread::yield_now();
    }
    fs::write(format!("{ksm}/run"), "0").expect("stop KSM");
}

rows! { is_not_stale:
    /// MADV_FREE: the page stays while it is pinned.
    madv_free(private(), |m| m.advise(libc::MADV_FREE));
    /// MADV_DONTNEED of a shared page: the same page comes back.
    madv_dontneed_shared(shared(), |m| m.advise(libc::MADV_DONTNEED));
    /// A hole below a private page, which is a copy.
    punch_hole_private_file(copied(), punch);
    /// fork with huge pages: the child gets the copy.
    hugetlb_fork(huge(), fork_and_store);
    /// fork with a transparent huge page.
    thp_fork(thp(), fork_and_store);
    /// KSM does not merge a pinned page.
    ksm(private(), merge);
    /// MADV_COLLAPSE does not replace a pinned page.
    madv_collapse(aligned(), |m| {
        m.all().for_each(|page| m.map.store(page, 0x11));
        eprintln!("{:?}", m.map.advise(m.all(), libc::MADV_COLLAPSE));
    });
    /// move_pages does not move a pinned page.
    move_pages(private(), |m| {
        let to = other_node(m);
        eprintln!("{}", move_page(m, Some(to)));
        assert_ne!(move_page(m, None), to, "the page's node");
    });
    /// mbind does not move a pinned page.
    mbind(private(), |m| {
        let to = other_node(m);
        expect_errno(bind(m), Errno::IO, "mbind");
        assert_ne!(move_page(m, None), to, "the page's node");
    });
    /// munmap of the other half of a transparent huge page.
    thp_munmap_other_half(thp(), |m| m.map.unmap(HUGE / 2..HUGE));
    /// mprotect of the other half of a transparent huge page.
    thp_mprotect_other_half(thp(), |m| m.map.protect(HUGE / 2..HUGE, MprotectFlags::READ));
}

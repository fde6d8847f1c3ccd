// SPDX-License-Identifier: GPL-2.0
//! G6: nobody waits for a reader.

use libc::{c_int, c_void};
use rustix::{
    fs::{MemfdFlags, ftruncate},
    io::{Errno, dup, read},
    mm::MapFlags,
};
use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
    thread::{self, JoinHandle},
};
use uverbs_mmu_notify::{Event, Mr, NotifyQueue, sys::uapi::RDMA_DRIVER_RXE};
use uverbs_mmu_notify_tests::*;

const RECORD: usize = size_of::<Event>();
/// The most events that the kernel copies out at once.
const BATCH: usize = 16;
/// Regions of one page: one more than have an event pending at first.
const REGIONS: usize = BATCH + 5;

/// A queue, and a watched region of each page of a map.
struct Setup {
    fixture: Fixture,
    map: Map,
    mrs: Vec<Mr>,
}

impl Setup {
    /// All but the last region have an event pending.
    fn new(fixture: Fixture) -> Self {
        let map = Map::new(REGIONS);
        let mrs = fixture.watch_each(map, 0..REGIONS);
        for page in 0..REGIONS - 1 {
            // Not unmapped: other memory, say a stack, could get there and go.
            map.map_over(page..page + 1);
        }
        Self { fixture, map, mrs }
    }

    /// What a reader must not delay: a change of the mapping, a registration, and
    /// deregistrations, of a region whose event has been delivered (`delivered`) and of one
    /// whose event is pending.
    fn expect_progress(&mut self, delivered: Option<usize>) {
        let last = REGIONS - 1;
        let before = self.fixture.page.load();
        within("a change", || self.map.map_over(last..REGIONS));
        assert_eq!(self.fixture.page.load(), before + 1, "generation");
        let other = within("REG_MR", || self.fixture.watch(Map::new(1), 0..1, 99));
        self.deregister(other, 0);
        if let Some(index) = delivered {
            let mr = self.mrs.remove(index);
            self.deregister(mr, 1);
        }
        let mr = self.mrs.remove(BATCH + 1);
        self.deregister(mr, 0);
    }

    #[track_caller]
    fn deregister(&self, mut mr: Mr, delivered: u32) {
        let reported = within("MR_DESTROY", || mr.destroy()).unwrap();
        assert_eq!(reported, delivered, "events reported");
    }

    fn remove(&self, device: &Device) {
        let before = self.fixture.page.load();
        within("the removal of the device", || device.remove());
        assert_eq!(self.fixture.page.load(), before + 1, "generation");
    }
}

/// G6: nobody ever reads.
#[test]
fn never_reads() {
    let device = Device::new("reader0", "rxe");
    let mut setup = Setup::new(Fixture::on(device.name()));
    setup.expect_progress(None);
    setup.remove(&device);
    for mr in mem::take(&mut setup.mrs) {
        setup.deregister(mr, 0);
    }
}

/// A thread whose read() waits for a page of its buffer.
struct Stuck {
    buffer: Map,
    fault: Userfault,
    thread: JoinHandle<io::Result<usize>>,
}

impl Stuck {
    /// The missing page begins after `ready` events.
    fn new(queue: &NotifyQueue, ready: usize) -> Self {
        let buffer = Map::untouched(2);
        buffer.store(0, 0);
        let fault = Userfault::missing(buffer, 1..2);
        let addr = buffer
            .at(1)
            .wrapping_sub(ready * RECORD)
            .expose_provenance();
        let queue = dup(queue).unwrap();
        let thread = thread::spawn(move || {
            let addr = std::ptr::with_exposed_provenance_mut(addr);
            read_raw(queue, addr, 2 * REGIONS * RECORD)
        });
        assert_eq!(fault.wait_for_fault(), buffer.at(1) as u64, "what faults");
        Self {
            buffer,
            fault,
            thread,
        }
    }

    fn resolve(self) -> io::Result<usize> {
        self.fault.fill(self.buffer, 1..2);
        within("read()", || self.thread.join()).expect("the thread panicked")
    }
}

/// A reader waits for its buffer. The other events are read when the page is there, and
/// counted once.
#[track_caller]
fn stuck(ready: usize) {
    let mut setup = Setup::new(Fixture::new());
    let stuck = Stuck::new(&setup.fixture.queue, ready);
    setup.expect_progress((ready != 0).then_some(3));
    // The one that was deregistered before its event was copied out is missing.
    let read = stuck.resolve().expect("read()");
    assert_eq!(read, (REGIONS - 1) * RECORD, "bytes read");
    for mr in mem::take(&mut setup.mrs) {
        setup.deregister(mr, 1);
    }
}

/// G4: G5: G6: it waits for the page of its first event.
#[test]
fn waits_for_its_buffer() {
    stuck(0);
}

/// G4: G5: G6: it has a batch, and waits for the page of the next one.
#[test]
fn waits_for_more_of_its_buffer() {
    stuck(BATCH);
}

/// A buffer whose second page fails for good makes read() return a short count although the
/// queue is not empty, and then fail. `ready` events fit on the first page.
#[track_caller]
fn second_page_fails(buffer: Map, ready: usize) {
    let setup = Setup::new(Fixture::new());
    let queue = &setup.fixture.queue;
    let read = |from: *mut u8| read_raw(queue, from, REGIONS * RECORD);
    let first = read(buffer.at(1).wrapping_sub(ready * RECORD));
    assert_eq!(first.expect("read"), ready * RECORD, "bytes read");
    expect_errno(read(buffer.at(1)), Errno::FAULT, "read() of the next event");
    let left = read_all(queue);
    let cookies: Vec<_> = left.iter().map(|event| event.cookie as usize).collect();
    assert!(cookies.into_iter().eq(ready..REGIONS - 1), "{left:?}");
    for (page, mr) in setup.mrs.into_iter().enumerate() {
        let mut mr = mr;
        let reported = mr.destroy().expect("deregister");
        assert_eq!(reported, u32::from(page < REGIONS - 1), "of page {page}");
    }
}

/// G4: the page is beyond the end of a file.
#[test]
fn second_page_is_beyond_the_file() {
    for ready in [3, BATCH + 1] {
        let file = memfd(1, MemfdFlags::empty());
        second_page_fails(Map::of_file(&file, 2, MapFlags::SHARED), ready);
    }
}

/// G4: the page is poisoned.
#[test]
fn second_page_is_poisoned() {
    for ready in [3, BATCH + 1] {
        let buffer = Map::untouched(2);
        let fault = Userfault::poisonable(buffer, 1..2);
        fault.poison(buffer, 1..2);
        second_page_fails(buffer, ready);
    }
}

/// G4: G5: other threads purge the buffer all the time. read() returns nevertheless, and
/// the count is exact.
#[test]
fn buffer_is_taken_away() {
    const ROUNDS: u32 = 20;
    let fixture = Fixture::new();
    let (map, buffer) = (Map::new(REGIONS), Map::new(1));
    let mrs = fixture.watch_each(map, 0..REGIONS);
    let done = AtomicBool::new(false);
    let read = thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    buffer.dont_need(0..1);
                }
            });
        }
        let mut read = 0;
        for _ in 0..ROUNDS {
            map.map_over(0..REGIONS);
            loop {
                let result = within("read()", || {
                    read_raw(&fixture.queue, buffer.at(0), REGIONS * RECORD)
                });
                match result {
                    Ok(bytes) => read += bytes / RECORD,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    result => expect_errno(result, Errno::FAULT, "read()"),
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        read
    });
    let counts = mrs.into_iter().map(|mut mr| mr.destroy().unwrap());
    assert_eq!(counts.sum::<u32>() as usize, read, "events reported");
    assert_eq!(read, REGIONS * ROUNDS as usize, "events read");
}

/// G6: the device is removed while a reader waits for its buffer.
#[test]
fn waits_for_its_buffer_when_the_device_goes() {
    let device = Device::new("reader3", "rxe");
    let setup = Setup::new(Fixture::on(device.name()));
    let stuck = Stuck::new(&setup.fixture.queue, 0);
    setup.remove(&device);
    expect_errno(stuck.resolve(), Errno::IO, "read()");
}

/// G6: the same, after a batch has been delivered.
#[test]
fn waits_for_more_of_its_buffer_when_the_device_goes() {
    let device = Device::new("reader4", "rxe");
    let mut setup = Setup::new(Fixture::on(device.name()));
    let stuck = Stuck::new(&setup.fixture.queue, BATCH);
    setup.remove(&device);
    let read = stuck.resolve().expect("read()");
    assert_eq!(read, BATCH * RECORD, "bytes read");
    for (index, mr) in mem::take(&mut setup.mrs).into_iter().enumerate() {
        setup.deregister(mr, (index < BATCH).into());
    }
}

static QUEUE: AtomicI32 = AtomicI32::new(-1);

/// Reads `QUEUE`; returns how many bytes, or the errno.
extern "C" fn read_queue(_: *mut c_void) -> c_int {
    // SAFETY: The test keeps it open.
    let queue = unsafe { BorrowedFd::borrow_raw(QUEUE.load(Ordering::Relaxed)) };
    match read(queue, &mut [0_u8; 2 * REGIONS * RECORD]) {
        Ok(read) => read as c_int,
        Err(errno) => errno.raw_os_error(),
    }
}

/// G6: a process that shares the address space is stopped in read().
#[test]
fn stopped_in_read() {
    let device = Device::new("reader5", "rxe");
    let mut setup = Setup::new(Fixture::on(device.name()));
    let queue = &setup.fixture.queue;
    let mut events = [Event::default(); REGIONS];
    assert_eq!(queue.read(&mut events).unwrap(), REGIONS - 1, "events");
    queue.set_nonblocking(false).unwrap();
    QUEUE.store(queue.as_fd().as_raw_fd(), Ordering::Relaxed);
    // SAFETY: `read_queue` makes one system call of rustix.
    let child = unsafe { Child::share(read_queue) };
    child.wait_asleep(&[libc::SYS_read]);
    child.stop();

    let last = REGIONS - 1;
    within("a change", || setup.map.map_over(last..REGIONS));
    let pending = within("REG_MR", || setup.fixture.watch(Map::new(1), 0..1, 99));
    setup.deregister(pending, 0);
    let mr = setup.mrs.remove(3);
    setup.deregister(mr, 1);
    let mr = setup.mrs.pop().unwrap();
    setup.deregister(mr, 0);
    setup.remove(&device);
    child.resume();
    assert_eq!(child.wait(), Exit::Code(libc::EIO), "the reader");
}

/// G6: the owner is stopped. Others change its memory, deregister, and remove the device.
#[test]
fn stopped_owner() {
    let device = Device::new("reader6", "rxe");
    let file = memfd(3, MemfdFlags::empty());
    let handle = Map::anonymous(1, MapFlags::SHARED).at(0).cast::<u32>();
    let child = Child::fork(|| {
        let fixture = Fixture::on(device.name());
        let map = Map::of_file(&file, 3, MapFlags::SHARED);
        let mr = fixture.watch(map, 0..2, 7);
        let other = fixture.watch(map, 2..3, 8);
        map.unmap(0..1);
        assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
        map.unmap(1..2);
        // SAFETY: It is in the map, and not referenced.
        unsafe { handle.write_volatile(mr.handle()) };
        stop();
        expect_closed(&fixture.queue);
        mem::forget([mr, other]);
        0
    });
    child.wait_stopped();
    let page = NotifyQueue::from(child.fd("anon_inode:[infinibandmmunotify]"))
        .generation_page()
        .expect("map the counter page");

    let before = page.load();
    within("ftruncate", || ftruncate(&file, 0)).expect("ftruncate");
    // The event of the first two pages is pending, that of the third one is new.
    assert_eq!(page.load(), before + 1, "generation after ftruncate");
    let _mr = within("REG_MR", || {
        Fixture::on(device.name()).watch(Map::new(1), 0..1, 7)
    });
    // SAFETY: As above.
    let handle = unsafe { handle.read_volatile() };
    let context = child.fd("/dev/infiniband/uverbs");
    let reported = within("MR_DESTROY", || {
        destroy_handle_of(context, RDMA_DRIVER_RXE, handle, 99)
    });
    assert_eq!(reported, 1, "events reported");
    let before = page.load();
    within("the removal of the device", || device.remove());
    assert_eq!(page.load(), before + 1, "generation after the removal");
    child.resume();
    assert_eq!(child.wait(), Exit::Code(0), "the owner");
}

// SPDX-License-Identifier: GPL-2.0
//! Shared code of the tests. Each test needs a process of its own, as cargo-nextest
//! runs it. Tests that count, fail or remove shared objects run alone, see
//! ci/nextest.toml.
//!
//! Each file of `tests/` has a theme. The comment of a test begins with the guarantees
//! that it checks, `G1:` to `G8:`, which Documentation/design.md lists, or with
//! `Interface:` for any other statement of the manual.

mod cgroup;
mod command;
mod device;
mod holder;
mod kernel;
mod load;
mod map;
mod process;
mod scm_rights;
mod userfault;

pub use cgroup::{Group, in_group};
pub use command::{Form, Plain, Uverbs, attr, bytes, call_command, send_command};
pub use device::{Device, device, expect_no_regions, expect_regions, run, stress};
pub use holder::{Holder, Kind, Work};
pub use kernel::{
    Contention, FailAllocation, FailingDereg, Hold, Injection, Methods, OwnDevice, Ready, Reports,
    Stack, Warnings, Watches, counter_pages, each_fault, each_fault_if_any,
};
pub use load::Load;
pub use map::{Map, PAGE, file_on_disk, memfd};
pub use process::{Blocked, Child, Exit, in_child, sleeps, stop, stop_traced, within};
pub use scm_rights::{receive, send, sockets, try_receive, try_send};
pub use userfault::Userfault;

use libc::c_int;
use rustix::{
    event::{PollFlags, Timespec},
    io::Errno,
};
use std::{
    fmt, io,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
};
use uverbs_mmu_notify::{
    Context, Event, GenerationPage, Location, Mr, MrArgs, NotifyQueue, Pd, PlainMr, QpPair,
    Request,
    sys::uapi::*,
    sys::verbs::{IBV_WC_SUCCESS, ibv_wc_status},
};

/// `IB_UVERBS_MMU_NOTIFY_UNMAPPED`.
pub const UNMAPPED: u32 = IB_UVERBS_MMU_NOTIFY_UNMAPPED;
/// `IB_UVERBS_MMU_NOTIFY_MAYBE_STALE`.
pub const MAYBE_STALE: u32 = IB_UVERBS_MMU_NOTIFY_MAYBE_STALE;

/// A PD of a new context on [`device`].
pub fn open() -> Arc<Pd> {
    open_device(&device())
}

fn open_device(name: &str) -> Arc<Pd> {
    let context = Context::open(name).expect("open the device");
    Pd::alloc(&context).expect("allocate a PD")
}

/// A context with a queue, non-blocking, and its mapped page.
pub struct Fixture {
    /// A new one.
    pub context: Arc<Context>,
    /// Of `context`.
    pub pd: Arc<Pd>,
    /// Of `context`.
    pub queue: NotifyQueue,
    /// Of `queue`.
    pub page: GenerationPage,
}

impl Default for Fixture {
    fn default() -> Self {
        Self::new()
    }
}

impl Fixture {
    /// Opens another context on [`device`].
    pub fn new() -> Self {
        Self::on(&device())
    }

    /// Opens another context on a device.
    pub fn on(device: &str) -> Self {
        let pd = open_device(device);
        let context = pd.context().clone();
        let queue = NotifyQueue::alloc(&context).expect("make a queue");
        queue
            .set_nonblocking(true)
            .expect("make the queue non-blocking");
        let page = queue.generation_page().expect("map the counter page");
        Self {
            context,
            pd,
            queue,
            page,
        }
    }

    /// To register `pages` of `map`, watched.
    pub fn args(&self, map: Map, pages: Range<usize>, cookie: u64) -> MrArgs {
        MrArgs::new(map.at(pages.start), pages.len() * PAGE).watched(&self.queue, cookie)
    }

    /// Registers `pages` of `map`, watched.
    #[track_caller]
    pub fn watch(&self, map: Map, pages: Range<usize>, cookie: u64) -> Mr {
        reg(&self.pd, &self.args(map, pages, cookie))
    }

    /// Watches each of `pages` separately, with its number as the cookie.
    #[track_caller]
    pub fn watch_each(&self, map: Map, pages: Range<usize>) -> Vec<Mr> {
        pages
            .map(|page| self.watch(map, page..page + 1, page as u64))
            .collect()
    }

    /// The queue must hold exactly these events. Drains it.
    #[track_caller]
    pub fn expect(&self, expected: &[Record]) {
        expect_records(&self.queue, expected);
    }

    /// The queue must be empty, and the generation still be `generation`.
    #[track_caller]
    pub fn expect_quiet(&self, generation: u64, what: &str) {
        let records = read_all(&self.queue);
        assert!(
            records.is_empty(),
            "{what}: expected no event, read {records:?}"
        );
        assert_eq!(self.page.load(), generation, "{what}: generation");
    }
}

/// Registers.
pub fn try_reg(pd: &Arc<Pd>, args: &MrArgs) -> io::Result<Mr> {
    // SAFETY: The tests register maps, which no reference points into.
    unsafe { Mr::reg(pd, args) }
}

/// Registers, which must succeed.
#[track_caller]
pub fn reg(pd: &Arc<Pd>, args: &MrArgs) -> Mr {
    try_reg(pd, args).unwrap_or_else(|e| panic!("registering {args:x?}: {e}"))
}

/// Registers with `ibv_reg_mr`, which must succeed.
#[track_caller]
pub fn reg_plain(pd: &Arc<Pd>, args: &MrArgs) -> PlainMr {
    // SAFETY: As in `try_reg`.
    unsafe { PlainMr::reg(pd, args) }.unwrap_or_else(|e| panic!("ibv_reg_mr of {args:x?}: {e}"))
}

/// Drains the queue, which must be non-blocking. Sorted by cookie.
#[track_caller]
pub fn read_all(queue: &NotifyQueue) -> Vec<Record> {
    let mut records: Vec<Record> = queue
        .events()
        .map(|event| event.expect("read the queue").into())
        .collect();
    records.sort_by_key(|record| record.cookie);
    records
}

/// As [`Fixture::expect`].
#[track_caller]
pub fn expect_records(queue: &NotifyQueue, expected: &[Record]) {
    assert_eq!(read_all(queue), expected, "the events in the queue");
}

/// An event, comparable and printed readably.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// As in the event.
    pub cookie: u64,
    /// `start..end` of the event.
    pub range: Range<u64>,
    /// As in the event.
    pub generation: u64,
    /// As in the event.
    pub reasons: u32,
}

impl Record {
    /// What a change of `pages` of `map` is expected to report.
    pub fn new(map: Map, pages: Range<usize>, cookie: u64, generation: u64, reasons: u32) -> Self {
        Self {
            cookie,
            range: map.at(pages.start) as u64..map.at(pages.end) as u64,
            generation,
            reasons,
        }
    }
}

impl From<Event> for Record {
    fn from(event: Event) -> Self {
        Self {
            cookie: event.cookie,
            range: event.start..event.end,
            generation: event.generation,
            reasons: event.reasons,
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cookie,
            range,
            generation,
            reasons,
        } = self;
        write!(
            f,
            "cookie {cookie}: {range:#x?}, generation {generation}, reasons {reasons:#b}"
        )
    }
}

/// The timeout of a poll() that does not wait.
pub const NOW: Option<Timespec> = Some(Timespec {
    tv_sec: 0,
    tv_nsec: 0,
});

/// The queue must be closed. A read() of an open one could block, so poll() comes first.
#[track_caller]
pub fn expect_closed(queue: &NotifyQueue) {
    let ready = queue.poll(NOW).expect("poll()");
    assert_eq!(ready, PollFlags::ERR, "poll() of a closed queue");
    let read = queue.read(&mut [Event::default()]);
    expect_errno(read, Errno::IO, "read() of a closed queue");
}

/// `result` must be this error.
#[track_caller]
pub fn expect_errno<T>(result: io::Result<T>, errno: Errno, what: &str) {
    let seen = match &result {
        Ok(_) => "success".to_owned(),
        Err(e) => e.to_string(),
    };
    let expected = io::Error::from(errno);
    let errno = Some(errno.raw_os_error());
    assert!(
        result.is_err_and(|e| e.raw_os_error() == errno),
        "{what}: expected {expected}, got {seen}"
    );
}

/// Deregisters by handle and returns the number of events reported, or
/// `unwritten` if the kernel wrote none.
#[track_caller]
pub fn destroy_handle(context: &Context, handle: u32, unwritten: u32) -> u32 {
    destroy_handle_of(context, context.driver_id(), handle, unwritten)
}

/// As [`destroy_handle`], for the uverbs file of a driver's device.
#[track_caller]
pub fn destroy_handle_of(file: impl AsFd, driver: u32, handle: u32, unwritten: u32) -> u32 {
    let mut reported = unwritten;
    Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY)
        .object(UVERBS_ATTR_DESTROY_MR_HANDLE, handle.into())
        .output(UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED, &mut reported)
        .call(file, driver)
        .expect("deregister");
    reported
}

/// The peer that writes to remote regions.
pub struct Peer {
    pair: QpPair,
    source: Map,
    mr: PlainMr,
}

impl Peer {
    /// Connects a pair of queue pairs.
    pub fn new(pd: &Arc<Pd>) -> Self {
        let source = Map::new(1);
        Self {
            pair: QpPair::connect(pd).expect("connect two queue pairs"),
            source,
            mr: reg_plain(pd, &MrArgs::new(source.at(0), PAGE)),
        }
    }

    /// RDMA-writes one byte to `addr` of the region of `rkey`.
    pub fn write(&self, addr: *const u8, rkey: u32, byte: u8) -> ibv_wc_status {
        self.try_write(addr, rkey, byte)
            .expect("post an RDMA write")
    }

    /// The same, but the device may be gone.
    pub fn try_write(&self, addr: *const u8, rkey: u32, byte: u8) -> io::Result<ibv_wc_status> {
        self.source.store(0, byte);
        let local = Location::new(self.source.at(0), self.mr.lkey());
        self.pair.write(local, Location::new(addr, rkey), 1)
    }

    /// RDMA-reads the byte at `addr` of the region of `rkey`, which must succeed.
    pub fn read(&self, addr: *const u8, rkey: u32) -> u8 {
        let (status, byte) = self.try_read(addr, rkey).expect("post an RDMA read");
        assert_eq!(status, IBV_WC_SUCCESS);
        byte
    }

    /// The same, but it may fail, or the device be gone.
    pub fn try_read(&self, addr: *const u8, rkey: u32) -> io::Result<(ibv_wc_status, u8)> {
        let local = Location::new(self.source.at(0), self.mr.lkey());
        let status = self.pair.read(local, Location::new(addr, rkey), 1)?;
        Ok((status, self.source.load(0)))
    }
}

/// What read() of `len` bytes to `addr` returns; there need not be memory.
pub fn read_raw(queue: impl AsFd, addr: *mut u8, len: usize) -> io::Result<usize> {
    // SAFETY: The kernel checks the address; the tests pass only maps.
    let ret = unsafe { libc::read(queue.as_fd().as_raw_fd(), addr.cast(), len) };
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// What preadv2() with `flags` returns for pieces of these lengths: the bytes read.
pub fn read_pieces(queue: impl AsFd, lengths: &[usize], flags: c_int) -> io::Result<Vec<u8>> {
    let mut pieces: Vec<_> = lengths.iter().map(|&len| vec![0_u8; len]).collect();
    let vectors: Vec<_> = pieces
        .iter_mut()
        .map(|piece| libc::iovec {
            iov_base: piece.as_mut_ptr().cast(),
            iov_len: piece.len(),
        })
        .collect();
    let (fd, count) = (queue.as_fd().as_raw_fd(), vectors.len() as c_int);
    // SAFETY: The pieces live until it returns. The file has no position.
    let ret = unsafe { libc::preadv2(fd, vectors.as_ptr(), count, -1, flags) };
    let len = usize::try_from(ret).map_err(|_| io::Error::last_os_error())?;
    let mut bytes = pieces.concat();
    bytes.truncate(len);
    Ok(bytes)
}

/// The event that `bytes` are.
pub fn event(bytes: &[u8]) -> Record {
    assert_eq!(bytes.len(), size_of::<Event>(), "bytes of an event");
    // SAFETY: An event is valid whatever its bytes are.
    let event = unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() };
    event.into()
}

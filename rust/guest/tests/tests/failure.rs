// SPDX-License-Identifier: GPL-2.0
//! Responses that cannot be copied out, drivers that fail to deregister, and faults:
//! allocations, and copies from and to userspace, that fail.

use io_uring::{
    IoUring,
    opcode::{PollAdd, Read},
    types::Fd,
};
use perf_event::{Builder, events::Breakpoint};
use rustix::{
    event::{
        PollFlags,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    io::{Errno, fcntl_dupfd_cloexec, write},
    ioctl::opcode,
    mm::{
        MapFlags, MprotectFlags, MremapFlags, ProtFlags, mlock, mmap, mmap_anonymous, mprotect,
        mremap_fixed,
    },
};
use std::{
    cell::Cell,
    fs, io,
    mem::{self, MaybeUninit},
    ops::Range,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
    ptr,
};
use uverbs_mmu_notify::{
    Context, Event, Mr, MrArgs, NotifyQueue, QpPair, Request, sys::uapi::*, sys::verbs::*,
};
use uverbs_mmu_notify_tests::*;

/// More often than the kernel retries.
const ALWAYS: u32 = 1000;

/// Where the kernel fails to write a response.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// To the attribute itself: a handle, or the mark that an output is valid.
    Attr(u32),
    /// To the output that the attribute points to.
    Output(u32),
}

/// The attributes of REG_MR of `args`, with all responses. `at` returns where the response
/// of an attribute goes, of which the default is the second argument.
fn reg_attrs(
    fixture: &Fixture,
    args: &MrArgs,
    at: impl Fn(u32, *mut u8) -> *mut u8,
) -> Vec<ib_uverbs_attr> {
    let outputs = Map::new(1);
    let output = |id, len, place: usize| {
        let default = outputs.at(0).wrapping_add(8 * place);
        attr(id, len, at(id, default) as u64)
    };
    let fd = args.notify_fd.expect("watched") as u64;
    let cookie = args.cookie.expect("watched");
    vec![
        attr(UVERBS_ATTR_REG_MR_HANDLE, 0, 0),
        attr(UVERBS_ATTR_REG_MR_PD_HANDLE, 0, fixture.pd.handle().into()),
        attr(UVERBS_ATTR_REG_MR_IOVA, 8, args.addr),
        attr(UVERBS_ATTR_REG_MR_ADDR, 8, args.addr),
        attr(UVERBS_ATTR_REG_MR_LENGTH, 8, args.length),
        attr(UVERBS_ATTR_REG_MR_ACCESS_FLAGS, 8, args.access.into()),
        attr(UVERBS_ATTR_REG_MR_NOTIFY_FD, 0, fd),
        attr(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, 8, cookie),
        attr(UVERBS_ATTR_UHW_IN, 8, 0),
        output(UVERBS_ATTR_UHW_OUT, 8, 2),
        output(UVERBS_ATTR_REG_MR_RESP_LKEY, 4, 0),
        output(UVERBS_ATTR_REG_MR_RESP_RKEY, 4, 1),
    ]
}

/// REG_MR of `args`, of which one response faults: it must fail with that. Returns the
/// handle that the region would have had.
#[track_caller]
fn reg_faults(fixture: &Fixture, args: &MrArgs, fault: Fault) -> u32 {
    let nowhere = Map::nowhere();
    let mut attrs = reg_attrs(fixture, args, |id, default| match fault {
        Fault::Output(faulty) if faulty == id => nowhere.at(0),
        _ => default,
    });
    if let Fault::Attr(faulty) = fault {
        attrs.sort_by_key(|attr| u32::from(attr.attr_id) == faulty);
    }
    let call = Call::new(&fixture.context, REG_MR, &attrs);
    if let Fault::Attr(_) = fault {
        call.protect_last();
    }
    let ret = call.make(&fixture.context);
    expect_errno(ret, Errno::FAULT, &format!("{fault:?}"));
    // SAFETY: It is valid, and all members of the union are plain.
    unsafe {
        (*call.attr(UVERBS_ATTR_REG_MR_HANDLE))
            .__bindgen_anon_1
            .data as u32
    }
}

const REG_MR: (u32, u32) = (UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR);

/// A call of the method of an object, in a map of its own. The last attribute begins a
/// page.
struct Call {
    map: Map,
    header: *mut ib_uverbs_ioctl_hdr,
    attrs: Range<*mut ib_uverbs_attr>,
}

impl Call {
    fn new(context: &Context, (object, method): (u32, u32), attrs: &[ib_uverbs_attr]) -> Self {
        let map = Map::new(2);
        let last: *mut ib_uverbs_attr = map.at(1).cast();
        let first = last.wrapping_sub(attrs.len() - 1);
        let header = first.cast::<ib_uverbs_ioctl_hdr>().wrapping_sub(1);
        // SAFETY: Both fit in the two pages, and are aligned.
        unsafe {
            ptr::copy_nonoverlapping(attrs.as_ptr(), first, attrs.len());
            header.write(ib_uverbs_ioctl_hdr {
                length: (size_of::<ib_uverbs_ioctl_hdr>() + size_of_val(attrs)) as u16,
                object_id: object as u16,
                method_id: method as u16,
                num_attrs: attrs.len() as u16,
                driver_id: context.driver_id(),
                ..Default::default()
            });
        }
        Self {
            map,
            header,
            attrs: first..last.wrapping_add(1),
        }
    }

    /// Makes the page of the last attribute read-only.
    fn protect_last(&self) {
        self.map.protect(1..2, MprotectFlags::READ);
    }

    fn make(&self, context: &Context) -> io::Result<()> {
        const CALL: u32 = opcode::read_write::<ib_uverbs_ioctl_hdr>(RDMA_IOCTL_MAGIC as u8, 1);
        // SAFETY: The attributes point to maps.
        match unsafe { libc::ioctl(context.as_fd().as_raw_fd(), CALL.into(), self.header) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// An attribute, as the kernel left it.
    fn attr(&self, id: u32) -> *mut ib_uverbs_attr {
        let mut attr = self.attrs.start;
        // SAFETY: It does not go beyond the last attribute.
        while unsafe { u32::from((*attr).attr_id) != id } {
            attr = attr.wrapping_add(1);
            assert_ne!(attr, self.attrs.end, "no attribute {id:#x}");
        }
        attr
    }
}

/// To register two pages that the pin replaces: the region is born stale.
fn born_stale(fixture: &Fixture) -> (Map, MrArgs) {
    let map = Map::untouched(2);
    assert_eq!((map.load(0), map.load(1)), (0, 0), "new memory");
    (map, fixture.args(map, 0..2, 7))
}

/// G3: going live is the last thing that a registration does. The mark of the driver's
/// response was written twice, the second time when events could already be read.
#[test]
fn response_is_written_before_going_live() {
    let fixture = Fixture::new();
    let (_, args) = born_stale(&fixture);
    let attrs = reg_attrs(&fixture, &args, |_, default| default);
    let call = Call::new(&fixture.context, REG_MR, &attrs);
    // SAFETY: It is valid.
    let mark = unsafe { &raw const (*call.attr(UVERBS_ATTR_UHW_OUT)).flags };
    let breakpoint = Breakpoint::write(mark as u64, 2);
    let writes = Builder::new(breakpoint).include_kernel().build();
    let mut writes = writes.expect("make a breakpoint");
    writes.enable().expect("enable the breakpoint");
    call.make(&fixture.context).expect("REG_MR");
    writes.disable().expect("disable the breakpoint");
    assert_eq!(read_all(&fixture.queue).len(), 1, "events of the region");
    assert_eq!(writes.read().expect("count"), 1, "writes of the mark");
}

/// G3: G8: a registration whose response faults reports nothing and leaves nothing, also
/// if the region was born stale.
#[test]
fn response_faults() {
    let fixture = Fixture::new();
    let mut faults = vec![
        Fault::Attr(UVERBS_ATTR_REG_MR_RESP_LKEY),
        Fault::Output(UVERBS_ATTR_REG_MR_RESP_LKEY),
        Fault::Attr(UVERBS_ATTR_REG_MR_RESP_RKEY),
        Fault::Output(UVERBS_ATTR_REG_MR_RESP_RKEY),
        Fault::Attr(UVERBS_ATTR_UHW_OUT),
        Fault::Attr(UVERBS_ATTR_REG_MR_HANDLE),
    ];
    // soft-RoCE has no response of its own.
    if fixture.context.driver_id() == RDMA_DRIVER_SIW {
        faults.push(Fault::Output(UVERBS_ATTR_UHW_OUT));
    }
    let watches = Watches::new();
    let mut begun = 0;
    for fault in faults {
        let clean = Map::new(2);
        let stale = born_stale(&fixture);
        for (map, args) in [(clean, fixture.args(clean, 0..2, 7)), stale] {
            reg_faults(&fixture, &args, fault);
            // The handle is written first.
            begun += usize::from(!matches!(fault, Fault::Attr(UVERBS_ATTR_REG_MR_HANDLE)));
            watches.expect_stopped(begun);
            fixture.expect_quiet(0, &format!("{fault:?}"));
            expect_no_regions();
            map.unmap(0..2);
            fixture.expect_quiet(0, &format!("munmap after {fault:?}"));
        }
    }
}

/// Some calls name a lack of memory in their own way.
fn no_memory(error: Errno) -> io::Error {
    match error {
        Errno::AGAIN | Errno::NOBUFS => Errno::NOMEM.into(),
        error => error.into(),
    }
}

fn open_files() -> usize {
    let files = fs::read_dir("/proc/self/fd").expect("list the files");
    files.count()
}

/// G8: if the FD number cannot be copied out, which comes before the queue is made, no FD is
/// created.
#[test]
fn response_of_allocation_faults() {
    let fixture = Fixture::new();
    let before = open_files();
    let method = (UVERBS_OBJECT_MMU_NOTIFY, UVERBS_METHOD_MMU_NOTIFY_ALLOC);
    let attrs = [attr(UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE, 0, 0)];
    let call = Call::new(&fixture.context, method, &attrs);
    call.protect_last();
    let made = call.make(&fixture.context);
    expect_errno(made, Errno::FAULT, "MMU_NOTIFY_ALLOC");
    assert_eq!(open_files(), before, "open files");
}

/// MR_DESTROY whose response faults: there is no memory at `output`.
#[track_caller]
fn destroy_faults(fixture: &Fixture, mr: Mr, output: Map) {
    let id = UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED;
    let request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY)
        .object(UVERBS_ATTR_DESTROY_MR_HANDLE, mr.handle().into());
    // SAFETY: It points to a map.
    let mut request = unsafe { request.raw(attr(id, 4, output.at(0) as u64)) };
    expect_errno(
        fixture.context.call(&mut request),
        Errno::FAULT,
        "MR_DESTROY",
    );
    mem::forget(mr);
}

/// G5: G8: a region whose count cannot be copied out is deregistered nevertheless, and its
/// pending event is dropped.
#[test]
fn response_of_deregistration_faults() {
    let fixture = Fixture::new();
    let (map, output) = (Map::new(2), Map::new(1));
    output.unmap(0..1);
    let watches = Watches::new();
    let mr = fixture.watch(map, 0..2, 7);
    map.unmap(0..1);
    let before = fixture.page.load();
    destroy_faults(&fixture, mr, output);
    watches.expect_stopped(1);
    expect_no_regions();
    map.unmap(1..2);
    fixture.expect_quiet(before, "the deregistration");
}

/// A memory window. soft-RoCE does not deregister a region with a bound window.
struct Window(*mut ibv_mw);

impl Window {
    fn new(fixture: &Fixture) -> Self {
        // SAFETY: The PD and its context are valid.
        let window = unsafe {
            let alloc = (*fixture.context.as_ptr()).ops.alloc_mw.expect("alloc_mw");
            alloc(fixture.pd.as_ptr(), IBV_MW_TYPE_1)
        };
        assert!(!window.is_null(), "{}", io::Error::last_os_error());
        Self(window)
    }

    /// Binds it to a region of `map`.
    fn bind(&self, fixture: &Fixture, map: Map, mr: &Mr) {
        // Gone in the end: its mappings would keep the context open.
        let pair = QpPair::connect(&fixture.pd).expect("connect two queue pairs");
        let mut region = ibv_mr {
            context: fixture.context.as_ptr(),
            pd: fixture.pd.as_ptr(),
            addr: map.void(0),
            length: PAGE,
            handle: mr.handle(),
            lkey: mr.lkey(),
            rkey: mr.rkey(),
        };
        let mut bind = ibv_mw_bind {
            bind_info: ibv_mw_bind_info {
                mr: &mut region,
                addr: map.at(0) as u64,
                length: PAGE as u64,
                mw_access_flags: IBV_ACCESS_REMOTE_WRITE,
            },
            ..Default::default()
        };
        // SAFETY: All objects are valid.
        let ret = unsafe {
            let bind_mw = (*fixture.context.as_ptr()).ops.bind_mw.expect("bind_mw");
            bind_mw(pair.as_ptr(), self.0, &mut bind)
        };
        assert_eq!(ret, 0, "bind a memory window");
        let status = pair.wait().expect("wait for the completion");
        assert_eq!(status, IBV_WC_SUCCESS, "the work completion");
    }

    fn free(self) {
        // SAFETY: The window is valid, and not used again.
        let ret = unsafe {
            let dealloc = (*(*self.0).context).ops.dealloc_mw.expect("dealloc_mw");
            dealloc(self.0)
        };
        assert_eq!(ret, 0, "free a memory window");
    }
}

/// Watches the first `pages` pages of `map`. A window can be bound to the region.
fn bindable(fixture: &Fixture, map: Map, pages: usize) -> Mr {
    let mut args = fixture.args(map, 0..pages, 7);
    args.access |= IBV_ACCESS_MW_BIND;
    reg(&fixture.pd, &args)
}

/// Unmaps a page of `map`, which must be reported as the only event.
#[track_caller]
fn expect_event(fixture: &Fixture, map: Map, page: usize) {
    let generation = fixture.page.load() + 1;
    map.unmap(page..page + 1);
    fixture.expect(&[Record::new(map, page..page + 1, 7, generation, UNMAPPED)]);
}

/// A region that the driver fails to deregister stays watched, and the count of the final
/// deregistration is that of all delivered events. `allow` stops the failure.
#[track_caller]
fn destroy_fails(fixture: &Fixture, map: Map, mut mr: Mr, errno: Errno, allow: impl FnOnce()) {
    expect_event(fixture, map, 0);
    expect_errno(mr.destroy(), errno, "MR_DESTROY");
    expect_event(fixture, map, 1);
    map.unmap(2..3);
    expect_errno(mr.destroy(), errno, "MR_DESTROY with an event pending");
    assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
    allow();
    map.unmap(3..4);
    let before = fixture.page.load();
    assert_eq!(mr.destroy().expect("deregister"), 3, "events reported");
    map.unmap(4..5);
    fixture.expect_quiet(before, "what came after the deregistration");
}

/// G5: G8: a bound window makes MR_DESTROY fail.
#[test]
fn destroy_fails_for_a_window() {
    let fixture = Fixture::new();
    let map = Map::new(5);
    let mr = bindable(&fixture, map, 5);
    let window = Window::new(&fixture);
    window.bind(&fixture, map, &mr);
    destroy_fails(&fixture, map, mr, Errno::INVAL, || window.free());
    expect_no_regions();
}

/// G5: G8: an injected error makes MR_DESTROY fail.
#[test]
fn destroy_fails_in_the_driver() {
    let fixture = Fixture::new();
    let map = Map::new(5);
    let mr = fixture.watch(map, 0..5, 7);
    let fail = FailingDereg::new(&device(), ALWAYS);
    destroy_fails(&fixture, map, mr, Errno::IO, || fail.again(0));
    assert_eq!(fail.failed(), 2, "deregistrations that failed");
    expect_no_regions();
}

/// The response to a registration faults, and the driver fails to deregister the new
/// region. The core keeps the region, and warns. The region never goes live, so it never
/// reports anything.
fn abort_fails(fixture: &Fixture, fail: &FailingDereg, end: impl FnOnce(u32)) {
    let watches = Watches::new();
    let (map, args) = born_stale(fixture);
    let warnings = Warnings::here();
    let failed = fail.failed();
    let handle = reg_faults(fixture, &args, Fault::Output(UVERBS_ATTR_REG_MR_RESP_RKEY));
    assert_eq!(fail.failed(), failed + 1, "deregistrations that failed");
    assert_eq!(warnings.count(), 1, "warnings");
    drop(warnings);
    map.unmap(0..1);
    end(handle);
    watches.expect_stopped(1);
    map.unmap(1..2);
}

/// G3: G8: it is deregistered later, by its handle.
#[test]
fn abort_fails_once() {
    let fixture = Fixture::new();
    let fail = FailingDereg::new(&device(), 1);
    abort_fails(&fixture, &fail, |handle| {
        fixture.expect_quiet(0, "a region that never went live");
        let reported = destroy_handle(&fixture.context, handle, 0x5a5a);
        assert_eq!(reported, 0, "events reported");
    });
    fixture.expect_quiet(0, "all of it");
}

/// G3: G8: it is deregistered with the context.
#[test]
fn abort_fails_once_and_context_closed() {
    let fixture = Fixture::new();
    let fail = FailingDereg::new(&device(), 1);
    abort_fails(&fixture, &fail, |_| {
        fixture.expect_quiet(0, "a region that never went live");
        fixture.context.disconnect().expect("close the context");
    });
    assert_closed(&fixture, 0);
}

/// The queue of the fixture must be closed, and the generation have advanced once.
#[track_caller]
fn assert_closed(fixture: &Fixture, before: u64) {
    assert_eq!(fixture.page.load(), before + 1, "generation");
    expect_closed(&fixture.queue);
}

/// Closes a context with two watched regions, of which one has an event pending, while the
/// driver fails `times`. Nothing is reported after that.
#[track_caller]
fn close_fails(device: &str, times: u32, warnings: u32) -> FailingDereg {
    let watches = Watches::new();
    let fixture = Fixture::on(device);
    let map = Map::new(3);
    mem::forget([fixture.watch(map, 0..3, 7), fixture.watch(map, 1..3, 8)]);
    let fail = FailingDereg::new(device, times);
    let warned = Warnings::here();
    map.unmap(0..1);
    let before = fixture.page.load();

    fixture.context.disconnect().expect("close the context");
    assert_eq!(warned.count(), warnings, "warnings");
    assert!(fail.failed() >= times.min(2), "deregistrations that failed");
    watches.expect_stopped(2);
    assert_closed(&fixture, before);
    map.unmap(1..2);
    assert_closed(&fixture, before);
    fail
}

/// G8: the core retries, and succeeds.
#[test]
fn close_fails_at_first() {
    close_fails(&device(), 2, 0);
    expect_no_regions();
}

/// G8: the core leaks the regions, and warns.
#[test]
fn close_fails_for_good() {
    let device = Device::new("failing0", "rxe");
    let _fail = close_fails(device.name(), ALWAYS, 1);
    device.remove();
}

/// G8: the driver fails for a window, which is older than the region and so destroyed after
/// it.
#[test]
fn close_fails_for_a_window() {
    let watches = Watches::new();
    let fixture = Fixture::new();
    let map = Map::new(2);
    let window = Window::new(&fixture);
    let mr = bindable(&fixture, map, 2);
    window.bind(&fixture, map, &mr);
    mem::forget(mr);
    map.unmap(0..1);
    let before = fixture.page.load();
    fixture.context.disconnect().expect("close the context");
    watches.expect_stopped(1);
    map.unmap(1..2);
    assert_closed(&fixture, before);
    expect_no_regions();
}

/// G8: the driver fails when the process exits.
#[test]
fn exit_fails_for_good() {
    let device = Device::new("failing1", "rxe");
    let fail = FailingDereg::new(device.name(), ALWAYS);
    let warnings = Warnings::new();
    let watches = Watches::new();
    let child = in_child(|| {
        warnings.begin().expect("expect warnings");
        let fixture = Fixture::on(device.name());
        let map = Map::new(2);
        mem::forget(fixture.watch(map, 0..2, 7));
        map.unmap(0..1);
        mem::forget(fixture);
        0
    });
    assert_eq!(child, Exit::Code(0), "the child");
    assert_eq!(warnings.count(), 1, "warnings");
    assert!(fail.failed() > 0, "deregistrations that failed");
    watches.expect_stopped(1);
    device.remove();
}

/// Removes a device while its driver fails `times`. Nothing is reported after that, and
/// MR_DESTROY returns the exact count.
#[track_caller]
fn removal_fails(
    name: &'static str,
    watch: impl FnOnce(&Fixture, Map) -> Mr,
    times: u32,
    warnings: u32,
) {
    let device = Device::new(name, "rxe");
    let fixture = Fixture::on(name);
    let map = Map::new(3);
    let watches = Watches::new();
    let mr = watch(&fixture, map);
    let fail = FailingDereg::new(name, times);
    let warned = std::sync::Arc::new(Warnings::new());
    expect_event(&fixture, map, 0);
    map.unmap(1..2);
    let before = fixture.page.load();

    let mut removal = Command::new("rdma");
    removal.args(["link", "delete", device.name()]);
    let begin = warned.clone();
    // SAFETY: It makes one system call.
    unsafe { removal.pre_exec(move || begin.begin()) };
    let status = removal.status().expect("run rdma");
    assert!(status.success(), "rdma link delete: {status}");
    assert_eq!(warned.count(), warnings, "warnings");
    assert!(fail.failed() >= times.min(1), "deregistrations that failed");
    watches.expect_stopped(1);

    assert_closed(&fixture, before);
    map.unmap(2..3);
    assert_closed(&fixture, before);
    let reported = destroy_handle(&fixture.context, mr.handle(), 0x5a5a);
    assert_eq!(reported, 1, "events reported");
    mem::forget(mr);
}

/// G5: G8: the core retries, and succeeds.
#[test]
fn removal_fails_at_first() {
    removal_fails("failing2", |f, map| f.watch(map, 0..3, 7), 1, 0);
}

/// G5: G8: the core leaks the region, and warns.
#[test]
fn removal_fails_for_good() {
    removal_fails("failing3", |f, map| f.watch(map, 0..3, 7), ALWAYS, 1);
}

/// G5: G8: the driver fails for a window, which is older than the region and so destroyed
/// after it.
#[test]
fn removal_fails_for_a_window() {
    let watch = |fixture: &Fixture, map| {
        let window = Window::new(fixture);
        let mut mr = bindable(fixture, map, 3);
        window.bind(fixture, map, &mr);
        expect_errno(mr.destroy(), Errno::INVAL, "MR_DESTROY");
        mr
    };
    removal_fails("failing4", watch, 0, 0);
}

fn create_by(form: Form, context: &Context) -> io::Result<NotifyQueue> {
    let input = ib_uverbs_ex_create_mmu_notify::default();
    let response: ib_uverbs_ex_create_mmu_notify_resp = call_command(
        form,
        context,
        IB_USER_VERBS_EX_CMD_CREATE_MMU_NOTIFY,
        &input,
    )?;
    // SAFETY: The command has just made this FD for us.
    Ok(unsafe { OwnedFd::from_raw_fd(response.notify_fd) }.into())
}

/// Creations of FDs while another one has an event.
struct Creation {
    fixture: Fixture,
    map: Map,
    _mr: Mr,
    queues: usize,
    failed_in_vmalloc: Cell<u32>,
}

impl Creation {
    fn new() -> Self {
        let fixture = Fixture::new();
        let map = Map::new(1);
        let mr = fixture.watch(map, 0..1, 7);
        map.unmap(0..1);
        Self {
            fixture,
            map,
            _mr: mr,
            queues: counter_pages(),
            failed_in_vmalloc: Cell::new(0),
        }
    }

    /// Creates an FD, again if that fails, and closes it.
    fn create(&self, fault: &mut Injection, create: impl Fn(&Context) -> io::Result<NotifyQueue>) {
        let context = &*self.fixture.context;
        let files = open_files();
        let made = fault.inject(|| create(context));
        if made.is_err() {
            assert_eq!(open_files(), files, "open files, after it failed");
            let count = &self.failed_in_vmalloc;
            count.set(count.get() + u32::from(fault.is_of_vmalloc()));
        }
        made.or_else(|_| create(context)).expect("create it then");
        assert_eq!(open_files(), files, "open files");
    }

    /// Some allocations of counter pages have failed since the last call.
    fn expect_failed_pages(&self, what: &str) {
        let failed = self.failed_in_vmalloc.take();
        assert!(failed > 0, "{what}: counter pages that failed");
    }

    /// Nothing is left, and the event of the other FD is not lost.
    fn end(self) {
        // The list of them is too long to be read each time.
        assert_eq!(counter_pages(), self.queues, "queues");
        self.fixture
            .expect(&[Record::new(self.map, 0..1, 7, 1, UNMAPPED)]);
    }
}

/// G4: G8: creation of an FD leaves nothing, whichever fault makes it fail, and succeeds then.
/// The event of another FD is not lost.
#[test]
fn creation_with_faults() {
    let creation = Creation::new();
    // The first one of a process sets up the notifiers of its address space.
    let failed = each_fault("MMU_NOTIFY_ALLOC, the first one", |fault| {
        fault.in_child(|fault| creation.create(fault, NotifyQueue::alloc));
    });
    let second = each_fault("MMU_NOTIFY_ALLOC", |fault| {
        creation.create(fault, NotifyQueue::alloc)
    });
    assert!(failed > 3 && second > 3, "{failed}, {second}");
    creation.expect_failed_pages("MMU_NOTIFY_ALLOC");
    // More files than a child has room for: its table has to grow.
    let dup = |_: &Context| Ok(fcntl_dupfd_cloexec(&creation.fixture.queue, 64)?.into());
    let failed = each_fault("dup()", |fault| {
        fault.in_child(|fault| creation.create(fault, dup));
    });
    assert!(failed > 0, "calls of dup() that failed");
    creation.end();
}

/// G4: G8: the same of the write commands.
#[test]
fn creation_by_write_with_faults() {
    let creation = Creation::new();
    let forms = [
        ("CREATE_MMU_NOTIFY by write()", Form::Write),
        ("CREATE_MMU_NOTIFY by INVOKE_WRITE", Form::Invoke),
    ];
    for (what, form) in forms {
        let failed = each_fault(what, |fault| {
            creation.create(fault, |context| create_by(form, context));
        });
        assert!(failed > 3, "{what}: {failed}");
        creation.expect_failed_pages(what);
    }
    creation.end();
}

/// Returns the handle.
fn reg_by_ioctl(fixture: &Fixture, args: &MrArgs) -> io::Result<u32> {
    let mr = try_reg(&fixture.pd, args)?;
    let handle = mr.handle();
    mem::forget(mr);
    Ok(handle)
}

fn reg_by(form: Form, fixture: &Fixture, args: &MrArgs) -> io::Result<u32> {
    let input = ib_uverbs_ex_reg_mr_notify {
        pd_handle: fixture.pd.handle(),
        start: args.addr,
        length: args.length,
        hca_va: args.addr,
        cookie: args.cookie.expect("watched"),
        access_flags: args.access,
        notify_fd: args.notify_fd.expect("watched") as i32,
        ..Default::default()
    };
    let context = &fixture.context;
    let response: ib_uverbs_ex_reg_mr_notify_resp =
        call_command(form, context, IB_USER_VERBS_EX_CMD_REG_MR_NOTIFY, &input)?;
    Ok(response.mr_handle)
}

fn destroy_by_ioctl(fixture: &Fixture, handle: u32) -> io::Result<u32> {
    let mut reported = 0x5a5a_u32;
    Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY)
        .object(UVERBS_ATTR_DESTROY_MR_HANDLE, handle.into())
        .output(UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED, &mut reported)
        .call(&*fixture.context, fixture.context.driver_id())?;
    Ok(reported)
}

fn destroy_by(form: Form, fixture: &Fixture, mr_handle: u32) -> io::Result<u32> {
    let input = ib_uverbs_ex_dereg_mr_notify {
        mr_handle,
        ..Default::default()
    };
    let context = &fixture.context;
    let response: ib_uverbs_ex_dereg_mr_notify_resp =
        call_command(form, context, IB_USER_VERBS_EX_CMD_DEREG_MR_NOTIFY, &input)?;
    Ok(response.events_reported)
}

/// MR_DESTROY without the attribute of the count.
fn destroy_uncounted(fixture: &Fixture, handle: u32) -> io::Result<()> {
    Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY)
        .object(UVERBS_ATTR_DESTROY_MR_HANDLE, handle.into())
        .call(&*fixture.context, fixture.context.driver_id())
}

/// DEREG_MR, which returns no count.
fn destroy_plainly(fixture: &Fixture, handle: u32) -> io::Result<()> {
    const WORDS: u16 = 3;
    let mut command = Vec::with_capacity(4 * usize::from(WORDS));
    command.extend(IB_USER_VERBS_CMD_DEREG_MR.to_ne_bytes());
    command.extend([WORDS, 0].map(u16::to_ne_bytes).concat());
    command.extend(handle.to_ne_bytes());
    write(&fixture.context, &command)?;
    Ok(())
}

/// The cookies of the events that are read.
#[track_caller]
fn cookies(fixture: &Fixture) -> Vec<u64> {
    let events = read_all(&fixture.queue).into_iter();
    events.map(|event| event.cookie).collect()
}

type Reg = fn(&Fixture, &MrArgs) -> io::Result<u32>;

fn register_with_faults(forms: &[(&str, Reg)]) {
    let fixture = Fixture::new();
    let watches = Watches::new();
    let other = Map::new(1);
    let other_mr = fixture.watch(other, 0..1, 1);
    for &(what, register) in forms {
        let failed = each_fault(what, |fault| {
            other.map_over(0..1);
            other.store(0, 0x11);
            // The pin replaces it: the region is born stale.
            let map = Map::untouched(1);
            assert_eq!(map.load(0), 0, "new memory");
            let args = fixture.args(map, 0..1, 7);
            let (handle, mut events) = match fault.inject(|| register(&fixture, &args)) {
                Ok(handle) => {
                    assert_eq!(cookies(&fixture), [1, 7], "regions with an event");
                    (handle, 1)
                }
                Err(_) => {
                    assert_eq!(
                        cookies(&fixture),
                        [1],
                        "regions with an event, after it failed"
                    );
                    let handle = register(&fixture, &args).expect("register then");
                    // None if the pin has replaced the page before.
                    (handle, cookies(&fixture).len() as u32)
                }
            };
            map.map_over(0..1);
            assert_eq!(
                cookies(&fixture),
                [7],
                "regions with an event, after a change"
            );
            events += 1;
            let reported = destroy_by_ioctl(&fixture, handle).expect("deregister");
            assert_eq!(reported, events, "events reported");
        });
        assert!(failed > 3, "{failed}");
    }
    drop(other_mr);
    let (begun, ended) = watches.seen();
    assert_eq!(begun, ended, "watches that began, and that ended");
    expect_no_regions();
}

/// G3: G4: G8: a registration leaves and reports nothing, whichever fault makes it fail, and
/// succeeds then. The event of another region is not lost.
#[test]
fn registration_with_faults() {
    register_with_faults(&[("REG_MR", reg_by_ioctl)]);
}

/// G3: G4: G8: the same of the write commands.
#[test]
fn registration_by_write_with_faults() {
    register_with_faults(&[
        ("REG_MR_NOTIFY by write()", |f, args| {
            reg_by(Form::Write, f, args)
        }),
        ("REG_MR_NOTIFY by INVOKE_WRITE", |f, args| {
            reg_by(Form::Invoke, f, args)
        }),
    ]);
}

/// Returns the count, if it has one.
type Destroy = fn(&Fixture, u32) -> io::Result<Option<u32>>;

/// Of each form: its name, the call, and how many faults make it fail after it has begun.
fn deregister_with_faults(forms: &[(&str, Destroy, u32)]) {
    let fixture = Fixture::new();
    let map = Map::new(2);
    for &(what, destroy, counts) in forms {
        let mut gone = 0;
        let failed = each_fault(what, |fault| {
            let args = fixture.args(map, 0..2, 7);
            let handle = reg_by_ioctl(&fixture, &args).expect("register");
            map.map_over(0..1);
            assert_eq!(cookies(&fixture), [7], "the first event");
            map.map_over(1..2);
            let reported = fault.inject(|| destroy(&fixture, handle));
            let pending = cookies(&fixture).len();
            match reported {
                Ok(reported) => assert_eq!((reported.unwrap_or(1), pending), (1, 0), "events"),
                Err(_) if pending == 1 => {
                    let reported = destroy(&fixture, handle).expect("deregister then");
                    assert_eq!(reported.unwrap_or(2), 2, "events reported");
                }
                reported => {
                    expect_errno(reported, Errno::FAULT, "a deregistration that has begun");
                    expect_errno(destroy(&fixture, handle), Errno::NOENT, "another one");
                    gone += 1;
                }
            }
        });
        assert!(failed > gone && gone == counts, "{failed}, {gone}");
    }
    expect_no_regions();
}

/// G4: G5: G8: a deregistration that a fault makes fail has either done nothing, and
/// succeeds then, or only failed to copy out the count, if it has one.
#[test]
fn deregistration_with_faults() {
    deregister_with_faults(&[
        (
            "MR_DESTROY",
            |f, handle| destroy_by_ioctl(f, handle).map(Some),
            1,
        ),
        (
            "MR_DESTROY without a count",
            |f, handle| destroy_uncounted(f, handle).map(|()| None),
            0,
        ),
        (
            "DEREG_MR",
            |f, handle| destroy_plainly(f, handle).map(|()| None),
            0,
        ),
    ]);
}

/// G4: G5: G8: the same of the write commands.
#[test]
fn deregistration_by_write_with_faults() {
    deregister_with_faults(&[
        (
            "DEREG_MR_NOTIFY by write()",
            |f, handle| destroy_by(Form::Write, f, handle).map(Some),
            1,
        ),
        (
            "DEREG_MR_NOTIFY by INVOKE_WRITE",
            |f, handle| destroy_by(Form::Invoke, f, handle).map(Some),
            1,
        ),
    ]);
}

/// G4: G5: whatever fails while events are pending, each is read and counted once.
#[test]
fn reading_with_faults() {
    const REGIONS: usize = 3;
    let fixture = Fixture::new();
    let queue = &fixture.queue;
    let map = Map::new(REGIONS);
    let mrs = fixture.watch_each(map, 0..REGIONS);
    let rounds = Cell::new(0);
    let expect_all = |what, read: Vec<Record>| {
        let events = read.into_iter().chain(read_all(queue));
        let cookies = events.map(|event| event.cookie as usize);
        assert!(cookies.eq(0..REGIONS), "{what}: not each event once");
        rounds.set(rounds.get() + 1);
    };
    type Run<'a> = &'a dyn Fn() -> io::Result<Vec<Record>>;
    let inject = |what, fault: &mut Injection, run: Run| {
        map.map_over(0..REGIONS);
        let read = fault.inject(run).or_else(|_| run()).expect("what failed");
        expect_all(what, read);
    };
    let pending = |what, run: Run| each_fault(what, |fault| inject(what, fault, run));
    let read = || {
        let mut events = [Event::default(); REGIONS];
        let count = queue.read(&mut events)?;
        Ok(events[..count].iter().map(|&event| event.into()).collect())
    };
    // A copy is repeated.
    assert_eq!(pending("read()", &read), 0, "calls of read() that failed");
    let what = "read(), which waits";
    let failed = each_fault(what, |fault| {
        queue.set_nonblocking(false).expect("F_SETFL");
        let fd = queue.as_fd().try_clone_to_owned().expect("dup()");
        let (waiting, mut injected) = (NotifyQueue::from(fd), fault.clone());
        let reader = Blocked::spawn(&[libc::SYS_read], move || {
            let mut events = [Event::default(); REGIONS];
            let count = injected.inject(|| waiting.read(&mut events));
            let count = count.expect("read() of what came");
            let events = events[..count].iter().map(|&event| event.into());
            (injected, events.collect())
        });
        map.map_over(0..REGIONS);
        let (injected, read) = within(what, || reader.join());
        *fault = injected;
        queue.set_nonblocking(true).expect("F_SETFL");
        expect_all(what, read);
    });
    assert_eq!(failed, 0, "calls of read() that failed");
    // More pieces than fit on the kernel's stack.
    let pieces = [size_of::<Event>() / 2; 2 * REGIONS + 4];
    let readv = || {
        let bytes = read_pieces(queue, &pieces, 0)?;
        Ok(bytes.chunks(size_of::<Event>()).map(event).collect())
    };
    assert!(
        pending("readv()", &readv) > 0,
        "calls of readv() that failed"
    );
    let nowait = || {
        let bytes = read_pieces(queue, &pieces, libc::RWF_NOWAIT)?;
        Ok(bytes.chunks(size_of::<Event>()).map(event).collect())
    };
    let failed = pending("preadv2(RWF_NOWAIT)", &nowait);
    assert!(failed > 0, "calls of preadv2() that failed");
    let poll = || {
        assert_eq!(queue.poll(NOW)?, PollFlags::IN, "poll()");
        Ok(Vec::new())
    };
    assert!(pending("poll()", &poll) > 0, "calls of poll() that failed");
    let epoll = || {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, queue, EventData::new_u64(0), EventFlags::IN)?;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 2];
        let (events, _) = epoll::wait(&epoll, &mut events, NOW.as_ref())?;
        assert_eq!(events.len(), 1, "files that are ready");
        Ok(Vec::new())
    };
    assert!(pending("epoll", &epoll) > 0, "calls of epoll that failed");
    let set_flags = || {
        queue.set_nonblocking(false)?;
        queue.set_nonblocking(true)?;
        Ok(Vec::new())
    };
    let what = "fcntl(F_SETFL)";
    each_fault_if_any(what, |fault| inject(what, fault, &set_flags));
    let query = || {
        let (mut keys, mut length, mut iova) = ([0_u32; 2], 0_u64, 0_u64);
        let [lkey, rkey] = &mut keys;
        Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_QUERY_MR)
            .object(UVERBS_ATTR_QUERY_MR_HANDLE, mrs[0].handle().into())
            .output(UVERBS_ATTR_QUERY_MR_RESP_LKEY, lkey)
            .output(UVERBS_ATTR_QUERY_MR_RESP_RKEY, rkey)
            .output(UVERBS_ATTR_QUERY_MR_RESP_LENGTH, &mut length)
            .output(UVERBS_ATTR_QUERY_MR_RESP_IOVA, &mut iova)
            .call(&*fixture.context, fixture.context.driver_id())?;
        assert_eq!(keys, [mrs[0].lkey(), mrs[0].rkey()], "keys");
        let range = (map.at(0) as u64, PAGE as u64);
        assert_eq!((iova, length), range, "IOVA and length");
        Ok(Vec::new())
    };
    let failed = pending("QUERY_MR", &query);
    assert!(failed > 0, "calls of QUERY_MR that failed");
    for mut mr in mrs {
        let reported = mr.destroy().expect("deregister");
        assert_eq!(reported, rounds.get(), "events reported");
    }
}

/// G4: G5: also by io_uring, whether the event is there or comes later.
#[test]
fn uring_with_faults() {
    const RECORD: i32 = size_of::<Event>() as i32;
    const READY: i32 = libc::POLLIN as i32;
    let pages = counter_pages();
    let fixture = Fixture::new();
    let (map, buffer) = (Map::new(1), Map::new(1));
    let mut mr = fixture.watch(map, 0..1, 7);
    let fd = Fd(fixture.queue.as_fd().as_raw_fd());
    let read = Read::new(fd, buffer.at(0), RECORD as u32).build();
    let poll = PollAdd::new(fd, READY as u32).build();
    let requests = [
        ("read by io_uring", &read, RECORD, false),
        ("read by io_uring, which waits", &read, RECORD, true),
        ("poll by io_uring", &poll, READY, false),
        ("poll by io_uring, which waits", &poll, READY, true),
    ];
    let (files, mut rounds) = (open_files(), 0);
    for (what, request, result, waits) in requests {
        let failed = each_fault(what, |fault| {
            rounds += 1;
            // A new one, which has nothing in its caches.
            let mut ring = IoUring::new(8).expect("make a ring");
            // Without memory for its poll, the ring leaves the wait to a worker's read().
            fixture.queue.set_nonblocking(false).expect("F_SETFL");
            if !waits {
                map.map_over(0..1);
            }
            let mut submit = || {
                // SAFETY: The buffer is a map, and stays mapped.
                unsafe { ring.submission().push(request) }.expect("room in the ring");
                assert_eq!(ring.submit()?, 1, "requests submitted");
                let entry = ring.completion().next();
                match entry.map(|entry| entry.result()) {
                    Some(errno @ ..0) => Err(io::Error::from_raw_os_error(-errno)),
                    done => Ok(done),
                }
            };
            let done = fault.inject(&mut submit).or_else(|_| submit());
            let mut done = done.expect("what failed");
            assert_eq!(done.is_none(), waits, "{what}: it waits");
            if waits {
                map.map_over(0..1);
                within(what, || ring.submit_and_wait(1)).expect("wait");
                done = ring.completion().next().map(|entry| entry.result());
            }
            assert_eq!(done, Some(result), "{what}: result");
            fixture.queue.set_nonblocking(true).expect("F_SETFL");
            let mut events = read_all(&fixture.queue);
            if result == RECORD {
                // SAFETY: The kernel has written an event there.
                let event = unsafe { buffer.at(0).cast::<Event>().read_unaligned() };
                events.push(event.into());
            }
            assert_eq!(
                events,
                [Record::new(map, 0..1, 7, rounds.into(), UNMAPPED)],
                "{what}: events"
            );
        });
        // A poll can do without all memory that it asks for.
        assert_eq!(failed > 0, result == RECORD, "{what}: {failed}");
        assert_eq!(open_files(), files, "{what}: open files");
    }
    assert_eq!(mr.destroy().expect("deregister"), rounds, "events reported");
    drop((mr, fixture));
    assert_eq!(counter_pages(), pages, "queues");
}

/// What the faults of a call do.
#[derive(Debug)]
enum Faults {
    /// There are none, unless the kernel's debugging has some.
    None,
    Survived,
    /// Some make it fail.
    Fail,
}

/// Interface: G4: G8: whatever fails while the page is mapped or faulted in, the generation is
/// right. The event is not lost.
#[test]
fn mapping_with_faults() {
    type FaultIn = fn(Map) -> io::Result<u8>;
    /// The pages that a page table can map.
    const TABLE: usize = 512;
    let fixture = Fixture::new();
    let map = Map::new(1);
    let _mr = fixture.watch(map, 0..1, 7);
    map.unmap(0..1);
    let queue = &fixture.queue;
    let queues = counter_pages();
    let mapped = || Ok(queue.generation_page()?.load());
    let failed = each_fault("mmap() and a load", |fault| {
        let generation = fault.inject(mapped).or_else(|_| mapped());
        assert_eq!(generation.expect("mmap() then"), 1, "generation");
    });
    assert!(failed > 0, "calls of mmap() that failed");
    // Whether the page is there before.
    let forms: [(&str, bool, FaultIn, Faults); 5] = [
        // The kernel tries again.
        (
            "the first load",
            false,
            |page| Ok(page.load(0)),
            Faults::Survived,
        ),
        (
            "MADV_POPULATE_READ",
            false,
            |page| {
                page.advise(0..1, libc::MADV_POPULATE_READ)?;
                Ok(page.load(0))
            },
            Faults::Fail,
        ),
        (
            "mlock()",
            false,
            |page| {
                // SAFETY: No reference points into a map.
                unsafe { mlock(page.void(0), PAGE) }.map_err(no_memory)?;
                Ok(page.load(0))
            },
            Faults::Fail,
        ),
        (
            "mprotect()",
            true,
            |page| {
                for protection in [MprotectFlags::empty(), MprotectFlags::READ] {
                    // SAFETY: No reference points into a map.
                    unsafe { mprotect(page.void(0), PAGE, protection) }?;
                }
                Ok(page.load(0))
            },
            Faults::None,
        ),
        (
            "mremap()",
            true,
            |page| {
                let (from, to) = (page.void(0), page.void(TABLE));
                // SAFETY: No reference points into a map.
                unsafe { mremap_fixed(from, PAGE, PAGE, MremapFlags::MAYMOVE, to) }?;
                Ok(page.load(TABLE))
            },
            Faults::Fail,
        ),
    ];
    for (what, loaded, fault_in, faults) in forms {
        let (injected, failed) = each_fault_if_any(what, |fault| {
            // All that two page tables can map, so they do not exist yet.
            let place = Map::untouched(2 * TABLE);
            let (addr, flags) = (place.void(0), MapFlags::SHARED | MapFlags::FIXED);
            // SAFETY: No reference points into a map.
            let page = unsafe { mmap(addr, PAGE, ProtFlags::READ, flags, queue, 0) };
            let page = Map::existing(page.expect("mmap"));
            assert!(!loaded || page.load(0) == 1, "{what}: generation before");
            let generation = fault.inject(|| fault_in(page)).or_else(|_| fault_in(page));
            assert_eq!(generation.expect(what), 1, "{what}: generation");
            place.unmap(0..2 * TABLE);
        });
        let as_expected = match faults {
            Faults::None => failed == 0,
            Faults::Survived => injected > 0 && failed == 0,
            Faults::Fail => failed > 0,
        };
        assert!(as_expected, "{what}: {injected}, {failed}, {faults:?}");
    }
    assert_eq!(counter_pages(), queues, "queues");
    fixture.expect(&[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
}

/// G4: G5: G8: whatever fails while the FD is sent by a socket, no event is lost and nothing is
/// left.
#[test]
fn sharing_with_faults() {
    let queues = counter_pages();
    let fixture = Fixture::new();
    let queue = &fixture.queue;
    let map = Map::new(1);
    let mut mr = fixture.watch(map, 0..1, 7);
    let rounds = Cell::new(0_u32);
    let shared = |what, share: &dyn Fn(&mut Injection)| {
        let failed = each_fault(what, |fault| {
            map.map_over(0..1);
            rounds.set(rounds.get() + 1);
            share(fault);
            assert_eq!(cookies(&fixture), [7], "{what}: regions with an event");
            let generation = fixture.page.load();
            assert_eq!(generation, rounds.get().into(), "{what}: generation");
        });
        assert!(failed > 0, "{what}: none failed");
    };
    let expect_pending = |queue: &NotifyQueue| {
        let page = queue.generation_page().expect("map the counter page");
        assert_eq!(
            page.load(),
            rounds.get().into(),
            "generation, by another FD"
        );
        let ready = queue.poll(NOW).expect("poll()");
        assert_eq!(ready, PollFlags::IN, "poll() of another FD");
    };
    shared("sendmsg() of the FD", &|fault| {
        let (ours, theirs) = sockets();
        let send = || try_send(&ours, queue).map_err(no_memory);
        fault.inject(send).or_else(|_| send()).expect("send then");
        expect_pending(&receive(&theirs));
    });
    shared("recvmsg() of the FD", &|fault| {
        fault.in_child(|fault| {
            let (ours, theirs) = sockets();
            // As many files as a child has room for: its table has to grow.
            let mut files = Vec::new();
            while files.last().map_or(0, OwnedFd::as_raw_fd) < 62 {
                files.push(ours.try_clone().expect("dup()"));
            }
            let before = open_files();
            send(&ours, queue);
            let received = fault.inject(|| try_receive(&theirs)).unwrap_or_else(|_| {
                // The message may be gone.
                send(&ours, queue);
                receive(&theirs)
            });
            expect_pending(&received);
            drop(received);
            assert_eq!(open_files(), before, "open files");
        });
    });
    let reported = mr.destroy().expect("deregister");
    assert_eq!(reported, rounds.get(), "events reported");
    drop((mr, fixture));
    assert_eq!(counter_pages(), queues, "queues");
}

/// G5: G8: whatever fails while a file or its context is closed, nothing is left.
#[test]
fn closing_with_faults() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let queues = counter_pages();
    each_fault_if_any("close()", |fault| {
        let queue = NotifyQueue::alloc(&fixture.context).expect("make a queue");
        let args = MrArgs::new(map.at(0), PAGE).watched(&queue, 7);
        let mut mr = reg(&fixture.pd, &args);
        map.map_over(0..1);
        let closed = fault.inject(|| {
            drop(queue);
            Ok(())
        });
        closed.expect("it cannot fail");
        assert_eq!(mr.destroy().expect("deregister"), 0, "events reported");
    });
    assert_eq!(counter_pages(), queues, "queues");
    let watches = Watches::new();
    let mut contexts = 0;
    each_fault("close() of a context", |fault| {
        let fixture = Fixture::new();
        mem::forget(fixture.watch(map, 0..1, 7));
        map.map_over(0..1);
        let close = || fixture.context.disconnect();
        fault
            .inject(close)
            .or_else(|_| close())
            .expect("close it then");
        contexts += 1;
        watches.expect_stopped(contexts);
        assert_closed(&fixture, 1);
    });
    expect_no_regions();
}

/// Interface: the support bit is right, whatever fails.
#[test]
fn query_with_faults() {
    let pd = open();
    let context = pd.context();
    let (device, driver) = (context.as_fd().as_raw_fd(), context.driver_id());
    let expected = context.core_support().expect("GET_CONTEXT");
    assert!(context.mmu_notify_supported().unwrap(), "{expected:#b}");
    let get = |file: &fs::File| {
        let (mut vectors, mut bits) = (0_u32, 0_u64);
        Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_GET_CONTEXT)
            .output(UVERBS_ATTR_GET_CONTEXT_NUM_COMP_VECTORS, &mut vectors)
            .output(UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT, &mut bits)
            .call(file, driver)?;
        Ok(bits)
    };
    let failed = each_fault("GET_CONTEXT", |fault| {
        let mut options = fs::File::options();
        let file = options
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{device}"));
        let file = file.expect("open the device");
        let bits = fault.inject(|| get(&file)).or_else(|_| get(&file));
        assert_eq!(bits.expect("GET_CONTEXT then"), expected, "bits");
    });
    assert!(failed > 0, "calls of GET_CONTEXT that failed");
    let _methods = Methods::new(&uverbs_mmu_notify_tests::device());
    let query = || {
        let mut bits = 0_u64;
        Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_QUERY_CONTEXT)
            .output(UVERBS_ATTR_QUERY_CONTEXT_CORE_SUPPORT, &mut bits)
            .call(context, driver)?;
        Ok(bits)
    };
    let failed = each_fault("QUERY_CONTEXT", |fault| {
        let bits = fault.inject(query).or_else(|_| query());
        assert_eq!(bits.expect("QUERY_CONTEXT then"), expected, "bits");
    });
    assert!(failed > 0, "calls of QUERY_CONTEXT that failed");
}

/// G1: whatever fails while a mapping is changed, the change is reported. MADV_DONTNEED, and
/// ftruncate() to the end of a page, ask for nothing that could fail.
#[test]
fn change_with_faults() {
    type Change = fn(Map, Map) -> io::Result<()>;
    // Name, change, and whether the page is mapped afterwards. The middle page is changed, so the
    // kernel must split the mapping.
    let forms: [(&str, Change, bool); 3] = [
        (
            "munmap()",
            // SAFETY: No reference points into a map.
            |map, _| Ok(unsafe { rustix::mm::munmap(map.void(1), PAGE) }?),
            false,
        ),
        (
            "mmap() over it",
            |map, _| {
                let access = ProtFlags::READ | ProtFlags::WRITE;
                let flags = MapFlags::PRIVATE | MapFlags::FIXED;
                // SAFETY: No reference points into a map.
                unsafe { mmap_anonymous(map.void(1), PAGE, access, flags) }?;
                Ok(())
            },
            true,
        ),
        (
            "mremap() of it",
            |map, to| {
                // SAFETY: No reference points into a map.
                unsafe { mremap_fixed(map.void(1), PAGE, PAGE, MremapFlags::MAYMOVE, to.void(0)) }?;
                Ok(())
            },
            false,
        ),
    ];
    let fixture = Fixture::new();
    let map = Map::new(3);
    let _mr = fixture.watch(map, 0..3, 7);
    let mut generation = 0;
    for (what, change, mapped) in forms {
        let failed = each_fault(what, |fault| {
            let place = Map::untouched(1);
            let changed = fault.inject(|| change(map, place));
            changed.or_else(|_| change(map, place)).expect(what);
            place.unmap(0..1);
            generation += 1;
            fixture.expect(&[Record::new(map, 1..2, 7, generation, UNMAPPED)]);
            if !mapped {
                map.map_over(1..2);
            }
            map.store(1, 0x11);
        });
        assert!(failed > 0, "{what}: none failed");
    }
}

/// G4: an invalidation allocates nothing.
#[test]
fn invalidation_without_memory() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let _mr = fixture.watch(map, 0..2, 7);
    let fail = FailAllocation::of_any_kind();
    // The first one is queued, the second one is merged.
    for page in 0..2 {
        let ((), failed) = fail.at(1, || map.dont_need(page..page + 1));
        assert!(!failed, "page {page}: an allocation");
    }
    fixture.expect(&[Record::new(map, 0..2, 7, 1, MAYBE_STALE)]);
    let ((), pages) = fail.count(|| map.store(0, 0x22));
    assert!(pages > 0, "a new page is not counted");
}

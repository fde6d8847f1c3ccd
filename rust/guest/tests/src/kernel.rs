// SPDX-License-Identifier: GPL-2.0
//! The inside of the kernel: stacks, traces, and the devices of the tests' module,
//! ci/module/mmu_notify_test.c.

use crate::{
    device::run,
    map::{Map, PAGE},
    process::{Exit, in_child},
};
use rustix::{
    io::{read, write},
    thread::gettid,
};
use std::{
    env,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};
use uverbs_mmu_notify::{Request, sys::uapi::*};

/// Opens a device of the module.
fn open(name: &str) -> File {
    let modules = env::var("MODULES").expect("MODULES, which the guest sets");
    run(&format!("modprobe -d {modules} mmu_notify_test"));
    let device = File::options().read(true).write(true).open(name);
    device.unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn command(file: impl AsFd, words: &[&[u8]]) {
    let bytes = words.concat();
    let len = write(file, &bytes).expect("write to the tests' module");
    assert_eq!(len, bytes.len(), "bytes written to the tests' module");
}

fn count(file: impl AsFd) -> u32 {
    let mut bytes = [0; 4];
    let len = read(file, &mut bytes).expect("read from the tests' module");
    assert_eq!(len, bytes.len(), "bytes read from the tests' module");
    u32::from_ne_bytes(bytes)
}

/// Holds invalidations in flight: a task that changes the mapping of this process sleeps
/// after the interval notifiers have been called, and before the page table changes.
///
/// It may hold `mmap_lock` meanwhile: map nothing and allocate no memory before
/// [`Self::release`].
pub struct Hold(File);

impl Hold {
    /// Holds nothing yet.
    #[expect(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(open("/dev/mmu_notify_hold"))
    }

    /// From now on, holds invalidations of `pages`.
    pub fn arm(&self, map: Map, pages: Range<usize>) {
        self.set(map.at(pages.start) as u64, map.at(pages.end) as u64);
    }

    /// Waits until an invalidation is held.
    pub fn wait(&self) {
        read(&self.0, &mut [0; 1]).expect("wait for an invalidation");
    }

    /// Releases held invalidations, and holds no more.
    pub fn release(&self) {
        self.set(0, 0);
    }

    fn set(&self, start: u64, end: u64) {
        // No allocation.
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&start.to_ne_bytes());
        bytes[8..].copy_from_slice(&end.to_ne_bytes());
        write(&self.0, &bytes).expect("tell what to hold");
    }
}

/// Makes a driver fail to deregister regions. Those that the kernel leaks are freed with
/// the device, if this lives until then.
pub struct FailingDereg {
    file: File,
    device: String,
}

impl FailingDereg {
    /// The next `times` deregistrations of the device will fail with `EIO`.
    pub fn new(device: &str, times: u32) -> Self {
        let this = Self {
            file: open("/dev/mmu_notify_fail"),
            device: device.to_owned(),
        };
        this.again(times);
        this
    }

    /// The next `times` will.
    pub fn again(&self, times: u32) {
        let name = padded(&self.device);
        let error = -libc::EIO;
        command(
            &self.file,
            &[&name, &error.to_ne_bytes(), &times.to_ne_bytes()],
        );
    }

    /// How many have failed.
    pub fn failed(&self) -> u32 {
        count(&self.file)
    }
}

/// The name of a device, in the room that the kernel has for one.
fn padded(device: &str) -> [u8; 64] {
    let mut name = [0; 64];
    name[..device.len()].copy_from_slice(device.as_bytes());
    name
}

/// Lends a device `query_ucontext`, which adds nothing, and `reg_user_mr_dmabuf`, which
/// fails with `ENODATA`. No software driver has these methods.
pub struct Methods(File);

impl Methods {
    /// Lends them to the device for as long as this lives.
    pub fn new(device: &str) -> Self {
        let this = Self(open("/dev/mmu_notify_methods"));
        command(&this.0, &[&padded(device)]);
        this
    }
}

/// An RDMA device of the module's own, with device memory and dma-bufs, which no software
/// driver has. libibverbs does not know its driver.
pub struct OwnDevice {
    uverbs: File,
    _device: File,
}

impl OwnDevice {
    /// Adds the device, for as long as this lives, and makes a context on it.
    #[expect(clippy::new_without_default)]
    pub fn new() -> Self {
        let device = open("/dev/mmu_notify_device");
        let is_it = |node: &PathBuf| {
            fs::read_to_string(node.join("ibdev")).is_ok_and(|name| name == "mmu_notify_test\n")
        };
        let node = fs::read_dir("/sys/class/infiniband_verbs")
            .expect("list the devices of uverbs")
            .map(|node| node.expect("list the devices of uverbs").path())
            .find(is_it)
            .expect("uverbs has added the device");
        let node = node.file_name().expect("the name of the device of uverbs");
        let mut options = File::options();
        let uverbs = options
            .read(true)
            .write(true)
            .open(Path::new("/dev/infiniband").join(node));
        let this = Self {
            uverbs: uverbs.expect("open the device of uverbs"),
            _device: device,
        };
        this.call(&mut Request::new(
            UVERBS_OBJECT_DEVICE,
            UVERBS_METHOD_GET_CONTEXT,
        ))
        .expect("GET_CONTEXT");
        this
    }

    /// Makes a call in the context.
    pub fn call(&self, request: &mut Request) -> io::Result<()> {
        request.call(&self.uverbs, RDMA_DRIVER_UNKNOWN)
    }

    /// Allocates a PD, and returns its handle.
    pub fn alloc_pd(&self) -> u32 {
        let mut pd = 0;
        let mut request = Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INVOKE_WRITE)
            .input(UVERBS_ATTR_WRITE_CMD, IB_USER_VERBS_CMD_ALLOC_PD.into())
            .input(UVERBS_ATTR_CORE_IN, 0)
            .output(UVERBS_ATTR_CORE_OUT, &mut pd);
        self.call(&mut request).expect("ALLOC_PD");
        pd
    }

    /// How many regions the context has, up to two.
    pub fn regions(&self) -> u32 {
        let (mut count, mut handles) = (0_u32, 0_u64);
        let mut request = Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INFO_HANDLES)
            .input(UVERBS_ATTR_INFO_OBJECT_ID, UVERBS_OBJECT_MR.into())
            .output(UVERBS_ATTR_INFO_TOTAL_HANDLES, &mut count)
            .output(UVERBS_ATTR_INFO_HANDLES_LIST, &mut handles);
        self.call(&mut request).expect("INFO_HANDLES");
        count
    }

    /// Makes a queue.
    pub fn alloc_queue(&self) -> OwnedFd {
        let id = UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE;
        let mut request =
            Request::new(UVERBS_OBJECT_MMU_NOTIFY, UVERBS_METHOD_MMU_NOTIFY_ALLOC).object(id, 0);
        self.call(&mut request).expect("make a queue");
        let queue = request.data(id).expect("it was added above") as i32;
        // SAFETY: The call has just made this FD for us.
        unsafe { OwnedFd::from_raw_fd(queue) }
    }
}

/// The uverbs file.
impl AsFd for OwnDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uverbs.as_fd()
    }
}

/// Expected warnings of the kernel, which warns of a driver that fails. They are counted
/// instead of printed.
pub struct Warnings(File);

impl Warnings {
    /// Of no task yet.
    #[expect(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(open("/dev/mmu_notify_warn"))
    }

    /// Of this thread.
    pub fn here() -> Self {
        let this = Self::new();
        this.begin().expect("expect warnings");
        this
    }

    /// From now on, of this thread, also after exec. To be called once.
    pub fn begin(&self) -> io::Result<()> {
        write(&self.0, &[0])?;
        Ok(())
    }

    /// How many there were.
    pub fn count(&self) -> u32 {
        count(&self.0)
    }
}

/// Fails allocations that this thread makes, once armed.
pub struct FailAllocation(File);

impl FailAllocation {
    /// Of the slab, but not in vmalloc, which would report its failure. Fails none yet.
    #[expect(clippy::new_without_default)]
    pub fn new() -> Self {
        set_up_faults(&["failslab"], ANYWHERE, vmalloc());
        Self::open()
    }

    /// Of the slab and of pages, so also those by vmalloc. Fails none yet.
    pub fn of_any_kind() -> Self {
        set_up_faults(&["failslab", "fail_page_alloc"], ANYWHERE, NOWHERE);
        Self::open()
    }

    fn open() -> Self {
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth");
        Self(file.expect("open fail-nth"))
    }

    /// Fails allocation number `nth`, from 1, of the kernel in `run`. Returns the result
    /// of `run`, and whether there were that many allocations.
    pub fn at<T>(&self, nth: u32, run: impl FnOnce() -> T) -> (T, bool) {
        let (result, left) = self.armed(nth, run);
        (result, left == 0)
    }

    /// How many allocations the kernel makes in `run`.
    pub fn count<T>(&self, run: impl FnOnce() -> T) -> (T, u32) {
        const MANY: u32 = 1_000_000;
        let (result, left) = self.armed(MANY, run);
        (result, MANY - left)
    }

    /// Returns what is left of `nth`, too.
    fn armed<T>(&self, nth: u32, run: impl FnOnce() -> T) -> (T, u32) {
        let mut left = [0; 16];
        self.0
            .write_all_at(nth.to_string().as_bytes(), 0)
            .expect("arm");
        let result = run();
        let left = match self.0.read_at(&mut left, 0) {
            Ok(len) => {
                let left = std::str::from_utf8(&left[..len]).expect("text");
                left.trim().parse().expect("a number")
            }
            // The copy of the number was the next to fail.
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EFAULT), "read what is left");
                1
            }
        };
        // So may the copy of this one be, which disarms as well.
        let disarm = || self.0.write_all_at(b"0", 0);
        disarm().or_else(|_| disarm()).expect("disarm");
        (result, left)
    }
}

/// What can fail on purpose, by folders of debugfs.
const FAULTS: [&str; 3] = ["failslab", "fail_page_alloc", "fail_usercopy"];

/// Any stack has an address here.
const ANYWHERE: Range<u64> = 0..u64::MAX;
/// No stack has one here.
const NOWHERE: Range<u64> = 0..0;

/// Counts faults of these kinds and no others, and only those whose stack has an address in
/// `only` and none in `except`.
fn set_up_faults(kinds: &[&str], only: Range<u64>, except: Range<u64>) {
    let set = |kind: &str, file: &str, value: &str| {
        fs::write(format!("/sys/kernel/debug/{kind}/{file}"), value)
            .unwrap_or_else(|e| panic!("set up {kind}/{file}: {e}"));
    };
    for kind in FAULTS {
        let counts = kinds.contains(&kind);
        if !counts && !Path::new("/sys/kernel/debug").join(kind).exists() {
            continue;
        }
        // Without a message.
        set(kind, "verbose", "0");
        let only = if counts { &only } else { &NOWHERE };
        for (file, address) in [
            ("require-start", only.start),
            ("require-end", only.end),
            ("reject-start", except.start),
            ("reject-end", except.end),
        ] {
            set(kind, file, &format!("{address:#x}"));
        }
    }
    // Also allocations that may sleep, and those of a single page.
    set("failslab", "ignore-gfp-wait", "N");
    set("fail_page_alloc", "ignore-gfp-wait", "N");
    set("fail_page_alloc", "ignore-gfp-highmem", "N");
    set("fail_page_alloc", "min-order", "0");
}

/// The addresses of a function of the kernel.
fn function(name: &str) -> Range<u64> {
    let symbols = fs::read_to_string("/proc/kallsyms").expect("list the symbols");
    let is_it = |line: &&str| line.split(' ').nth(2) == Some(name);
    let mut symbols = symbols.lines().skip_while(|line| !is_it(line));
    let address = |line: &str| u64::from_str_radix(&line[..16], 16).expect("an address");
    let start = address(symbols.next().unwrap_or_else(|| panic!("no {name}")));
    // They are sorted, and some have the same address.
    let end = symbols.map(address).find(|&end| end > start);
    start..end.expect("a symbol behind it")
}

/// One allocation, or copy from or to userspace, that fails, see [`each_fault`].
#[derive(Clone)]
pub struct Injection {
    nth: u32,
    vmalloc: bool,
    reached: bool,
    failed: bool,
}

impl Injection {
    /// Whether the allocation is one that vmalloc makes.
    pub fn is_of_vmalloc(&self) -> bool {
        self.vmalloc
    }

    /// Runs `run` with this fault. A call that fails for that reason says `ENOMEM` or
    /// `EFAULT`, and nothing else fails.
    #[track_caller]
    pub fn inject<T>(&mut self, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let (result, reached) = FailAllocation::open().at(self.nth, run);
        if let Err(e) = &result {
            let named = matches!(e.raw_os_error(), Some(libc::ENOMEM | libc::EFAULT));
            assert!(reached && named, "fault {}: {e}", self.nth);
        }
        (self.reached, self.failed) = (reached, result.is_err());
        result
    }

    /// Runs `run`, which calls [`Self::inject`], in a forked child.
    #[track_caller]
    pub fn in_child(&mut self, run: impl FnOnce(&mut Self)) {
        let child = in_child(|| {
            run(self);
            i32::from(self.reached) | i32::from(self.failed) << 1
        });
        let Exit::Code(code @ 0..4) = child else {
            panic!("fault {} in a child: {child:?}", self.nth);
        };
        (self.reached, self.failed) = (code & 1 != 0, code & 2 != 0);
    }
}

/// How often a call is made with the same fault, unless that makes it fail.
const TRIES: u32 = 3;

/// Where the function is that all of vmalloc goes through.
fn vmalloc() -> Range<u64> {
    static VMALLOC: OnceLock<Range<u64>> = OnceLock::new();
    VMALLOC
        .get_or_init(|| function("__vmalloc_node_range_noprof"))
        .clone()
}

/// Runs `once` with the first fault of a kind that its call of [`Injection::inject`] can have,
/// with the second one, and so on, until there is none left. Fails if there is none at all.
/// Returns how many made the call fail.
#[track_caller]
pub fn each_fault(what: &str, once: impl FnMut(&mut Injection)) -> u32 {
    let (injected, failed) = each_fault_if_any(what, once);
    assert!(injected > 0, "{what}: no faults");
    failed
}

/// The same, but there may be none. Returns how many there were, and how many made it fail.
#[track_caller]
pub fn each_fault_if_any(what: &str, mut once: impl FnMut(&mut Injection)) -> (u32, u32) {
    let (injected, failed) = each_nth(what, false, &mut once);
    // vmalloc reports its failure.
    let reports = Reports::of("vmalloc error");
    let (injected_there, failed_there) = each_nth(&format!("{what}, in vmalloc"), true, &mut once);
    reports.end();
    (injected + injected_there, failed + failed_there)
}

/// The same, for the faults in vmalloc or for all others.
#[track_caller]
fn each_nth(what: &str, vmalloc: bool, once: &mut impl FnMut(&mut Injection)) -> (u32, u32) {
    let (mut injected, mut failed) = (0, 0);
    for kind in FAULTS {
        match vmalloc {
            true => set_up_faults(&[kind], self::vmalloc(), NOWHERE),
            false => set_up_faults(&[kind], ANYWHERE, self::vmalloc()),
        }
        for nth in 1.. {
            let (mut reached, mut fails) = (false, false);
            // What the allocators allocate for themselves differs from call to call, so one call
            // may not have the fault of another. A few calls seldom all miss it.
            for _ in 0..TRIES {
                let mut fault = Injection {
                    nth,
                    vmalloc,
                    reached: false,
                    failed: false,
                };
                once(&mut fault);
                reached |= fault.reached;
                fails |= fault.failed;
                if fails {
                    break;
                }
            }
            if !reached {
                break;
            }
            injected += 1;
            failed += u32::from(fails);
        }
    }
    if injected > 0 || !vmalloc {
        eprintln!("{what}: {injected} faults, of which {failed} made it fail");
    }
    (injected, failed)
}

/// Keeps expected reports of the kernel from the console, where they would be splats. Marks in
/// the log tell `ci/log-splats`.
pub struct Reports {
    log: File,
    what: &'static str,
}

impl Reports {
    const LOG: &str = "/dev/kmsg";
    const SHOW_ALL: &str = "/sys/module/printk/parameters/ignore_loglevel";
    const LEVEL: &str = "/proc/sys/kernel/printk";

    /// From now on, reports with a stack and this text.
    pub fn of(what: &'static str) -> Self {
        let mut options = File::options();
        let mut log = options
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(Self::LOG)
            .expect("open the log");
        log.seek(SeekFrom::End(0)).expect("go to its end");
        fs::write(Self::LOG, "mmu-notify-tests: expects reports").expect("mark the log");
        // Errors are still shown.
        fs::write(Self::LEVEL, "4").expect("show errors only");
        fs::write(Self::SHOW_ALL, "N").expect("show no longer all");
        Self { log, what }
    }

    /// There must have been no other report. Returns how many there were.
    #[track_caller]
    pub fn end(mut self) -> usize {
        let (mut record, mut text) = ([0; 2 * PAGE], String::new());
        loop {
            match self.log.read(&mut record) {
                Ok(len) => text.push_str(&String::from_utf8_lossy(&record[..len])),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => panic!("read the log: {e}"),
            }
        }
        let count = text.matches(self.what).count();
        let stacks = text.matches("Call Trace:").count();
        assert_eq!(stacks, count, "reports, and expected ones: {text}");
        count
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        let _ = fs::write(Self::SHOW_ALL, "Y");
        let _ = fs::write(Self::LOG, "mmu-notify-tests: expects no reports");
    }
}

/// A trace of its own, of some tracepoints.
struct Tracing(PathBuf);

impl Tracing {
    /// Of nothing yet. `name` is unique in this process.
    fn new(name: &str) -> Self {
        let instance = format!("/sys/kernel/tracing/instances/{name}-{}", process::id());
        let this = Self(instance.into());
        fs::create_dir(&this.0).expect("make an instance of the tracing system");
        this
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap_or_else(|e| panic!("{file}: {e}"));
    }

    fn read(&self) -> String {
        fs::read_to_string(self.0.join("trace")).expect("read the trace")
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The watches that start and stop, of all processes, counted by their tracepoints.
/// Nothing else shows a watch that is left behind: its callback reports nothing, and
/// kmemleak finds neither it nor the address space that it keeps, whose page table is
/// in a `struct page`.
pub struct Watches(Tracing);

impl Watches {
    /// Counts from now on.
    #[expect(clippy::new_without_default)]
    pub fn new() -> Self {
        let trace = Tracing::new("watches");
        for event in ["start", "stop"] {
            let event = tracepoint(event);
            trace.set(&format!("events/ib_uverbs_mmu_notify/{event}/enable"), "1");
        }
        Self(trace)
    }

    /// How many have started, and how many have stopped.
    pub fn seen(&self) -> (usize, usize) {
        let trace = self.0.read();
        let count = |event| trace.matches(&format!(" {}: ", tracepoint(event))).count();
        (count("start"), count("stop"))
    }

    /// `started` watches must have started, and each must have stopped.
    #[track_caller]
    pub fn expect_stopped(&self, started: usize) {
        let both = (started, started);
        assert_eq!(self.seen(), both, "watches that started, and that stopped");
    }
}

fn tracepoint(event: &str) -> String {
    format!("uverbs_mmu_notify_{event}")
}

/// How often a thread has to queue for a spinlock. The first waiter spins on the lock
/// itself; only those that come when there is a waiter already are queued and counted.
/// A kernel that runs under a hypervisor does not queue on x86: take
/// `GUEST_QEMU='-cpu max,hypervisor=off'`.
pub struct Contention(Tracing);

impl Contention {
    /// Of the calling thread, from now on.
    pub fn here() -> Self {
        let trace = Tracing::new("contention");
        let thread = gettid().as_raw_nonzero();
        let event = "events/lock/contention_begin";
        // 1: a spinlock.
        let filter = format!("common_pid == {thread} && flags == 1");
        trace.set(&format!("{event}/filter"), &filter);
        trace.set(&format!("{event}/enable"), "1");
        Self(trace)
    }

    /// How often since the last call.
    pub fn take(&self) -> usize {
        let cpus = fs::read_dir(self.0.0.join("per_cpu")).expect("list the CPUs");
        let count = cpus
            .map(|cpu| cpu.expect("list the CPUs").path().join("stats"))
            .map(|stats| fs::read_to_string(stats).expect("read how much was traced"))
            .map(|stats| number_of(&stats, "entries: ") + number_of(&stats, "overrun: "))
            .sum();
        self.0.set("trace", "");
        count
    }
}

/// The number behind `label`.
fn number_of(text: &str, label: &str) -> usize {
    text.lines()
        .find_map(|line| line.strip_prefix(label)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no {label:?} in {text:?}"))
}

/// The number of queues that exist, by the allocations for their counter pages. kmemleak
/// does not list a leaked queue.
pub fn counter_pages() -> usize {
    /// Who allocates them: without frame pointers, calls at the end of a function are jumps.
    const CALLERS: [&str; 3] = [
        " rust_helper_vrealloc_node_align+",
        "9allocator",
        "uverbs_mmu",
    ];
    let areas = fs::read_to_string("/proc/vmallocinfo").expect("list what vmalloc allocated");
    let ours = |line: &&str| CALLERS.iter().any(|caller| line.contains(caller));
    areas.lines().filter(ours).count()
}

/// The stack of a task in the kernel.
pub struct Stack(File);

impl Stack {
    /// Of `task`, its name in /proc.
    pub fn of(task: &str) -> Self {
        Self(File::open(format!("/proc/{task}/stack")).expect("open the stack of a task"))
    }

    /// Whether the task is in `function`. Allocates nothing.
    pub fn shows(&self, function: &str) -> bool {
        let mut text = [0; PAGE];
        // The task may be gone.
        let len = self.0.read_at(&mut text, 0).unwrap_or(0);
        let mut lines = text[..len].split(|&byte| byte == b'\n');
        lines.any(|line| {
            let frame = line.strip_prefix(b"[<0>] ").unwrap_or_default();
            frame
                .strip_prefix(function.as_bytes())
                .is_some_and(|rest| rest.starts_with(b"+"))
        })
    }
}

/// A thread that is made now and begins later.
pub struct Ready<T> {
    thread: JoinHandle<T>,
    stack: Stack,
    go: Arc<AtomicBool>,
}

impl<T: Send + 'static> Ready<T> {
    /// Will run `run`.
    pub fn new(run: impl FnOnce() -> T + Send + 'static) -> Self {
        let (send, receive) = mpsc::channel();
        let go = Arc::new(AtomicBool::new(false));
        let begin = go.clone();
        let thread = thread::spawn(move || {
            send.send(Stack::of("thread-self")).expect("send the stack");
            while !begin.load(Ordering::Acquire) {
                thread::park();
            }
            run()
        });
        let stack = receive.recv().expect("receive the stack");
        Self { thread, stack, go }
    }

    /// Lets it begin. Allocates nothing.
    pub fn go(&self) {
        self.go.store(true, Ordering::Release);
        self.thread.thread().unpark();
    }

    /// Waits until the thread is in a function of the kernel, or returns false if
    /// it ended. Allocates nothing.
    pub fn reaches(&self, function: &str) -> bool {
        loop {
            if self.stack.shows(function) {
                return true;
            }
            if self.thread.is_finished() {
                return false;
            }
            thread::yield_now();
        }
    }

    /// Its stack.
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// Waits for the result.
    pub fn join(self) -> T {
        self.thread.join().expect("the thread panicked")
    }
}

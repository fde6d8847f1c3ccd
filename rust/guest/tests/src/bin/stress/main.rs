// SPDX-License-Identifier: GPL-2.0
//! Processes whose threads register, deregister, change mappings and common files, fork,
//! read and use RDMA at random. Each process knows what its events must say.
//!
//! `stress operations N` makes so many operations, and `stress minutes N` goes on so long.
//! `stress removal COMMAND...` runs the command after some of them, which must remove the
//! device; each process then must find that out. The seed is printed, and
//! UVERBS_STRESS_SEED sets it: each thread then makes the same operations, though those of
//! different threads may come in another order.

mod file;
mod memory;
mod model;
mod process;
mod thread;

use file::{FileChanges, Place};
use memory::Files;
use rand::{
    RngExt, SeedableRng,
    rngs::{SmallRng, SysRng},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    mm::MapFlags,
};
use std::{
    array, env, fs,
    os::fd::OwnedFd,
    process::Command,
    sync::atomic::{
        AtomicBool, AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
    thread::sleep,
    time::{Duration, Instant},
};
use uverbs_mmu_notify::{Event, GenerationPage, NotifyQueue};
use uverbs_mmu_notify_tests::*;

/// How many there are at once.
const PROCESSES: usize = 2;

/// What the processes share.
#[repr(C)]
struct Shared {
    file: FileChanges,
    places: [Place; PROCESSES],
    /// Whether processes go on until the device is removed, and whether that has begun.
    until_removal: AtomicBool,
    removed: AtomicBool,
    /// How many threads have begun with their operations.
    started: AtomicUsize,
    /// What the generation of the common queue must be after the end of its process.
    ends: [AtomicU64; PROCESSES],
    operations: AtomicU64,
    registered: AtomicU64,
    events: AtomicU64,
    compared: AtomicU64,
    stale: AtomicU64,
}

/// A process, seen from outside.
struct Running {
    seed: u64,
    child: Child,
    /// It hangs up when the process ends.
    socket: OwnedFd,
    /// The common queue, which the process has sent.
    queue: NotifyQueue,
    page: GenerationPage,
    generation: u64,
}

impl Running {
    fn start(place: usize, seed: u64, shared: &'static Shared, files: &Files, huge: bool) -> Self {
        let (socket, theirs) = sockets();
        shared.ends[place].store(0, SeqCst);
        let child = Child::fork(|| {
            let files = files.try_clone().expect("duplicate the files");
            process::live(place, seed, shared, files, huge, &theirs)
        });
        drop(theirs);
        let queue = receive(&socket);
        let page = queue.generation_page().expect("map the counter page");
        Self {
            seed,
            child,
            socket,
            queue,
            page,
            generation: 0,
        }
    }

    /// Does what one can with the queue of another process.
    fn observe(&mut self) {
        let before = self.generation;
        self.generation = self.page.load();
        assert!(
            before <= self.generation,
            "the generation was {before}: {}",
            self.generation
        );
        let ready = self.queue.poll(NOW).expect("poll");
        assert!(
            !ready.contains(PollFlags::IN | PollFlags::ERR),
            "poll(): {ready:?}"
        );
        let read = self.queue.read(&mut [Event::default()]);
        expect_errno(read, Errno::PERM, "read() by another process");
    }

    fn is_over(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::empty())];
        poll(&mut fds, NOW.as_ref()).expect("poll") == 1
    }

    fn expect_end(self, end: &AtomicU64) {
        // SIGALRM: it has not reached its next quiet point.
        let (seed, exit) = (self.seed, self.child.wait());
        let expected = [Exit::Code(0), Exit::Signal(libc::SIGKILL)];
        assert!(
            expected.contains(&exit),
            "the process of seed {seed}: {exit:?}"
        );
        let end = end.load(SeqCst);
        assert_eq!(
            self.page.load(),
            end,
            "the generation after the end of process {seed}"
        );
        assert_eq!(
            self.queue.poll(NOW).unwrap(),
            PollFlags::ERR,
            "poll() after the end"
        );
    }
}

/// Runs processes while `more` of the number of those before says so. Returns how many.
fn run(seed: u64, shared: &'static Shared, huge: bool, more: impl Fn(u64) -> bool) -> u64 {
    let files = Files::new();
    let mut places = [const { None::<Running> }; PROCESSES];
    let mut count = 0;
    loop {
        for (place, process) in places.iter_mut().enumerate() {
            match process {
                Some(running) => {
                    running.observe();
                    if running.is_over() {
                        process
                            .take()
                            .expect("it was there")
                            .expect_end(&shared.ends[place]);
                    }
                }
                None if more(count) => {
                    let seed = seed.wrapping_add(count);
                    *process = Some(Running::start(place, seed, shared, &files, huge));
                    count += 1;
                    if count % 50 == 0 {
                        println!("{} operations", shared.operations.load(Relaxed));
                    }
                }
                None => (),
            }
        }
        // If all have ended in this pass, the next one may start more.
        if places.iter().all(Option::is_none) && !more(count) {
            return count;
        }
        sleep(Duration::from_millis(5));
    }
}

/// Runs processes until `remove` has removed their device.
fn run_until_removal(seed: u64, shared: &'static Shared, huge: bool, remove: impl FnOnce()) {
    let files = Files::new();
    shared.until_removal.store(true, Relaxed);
    let start = |place| {
        let seed = seed.wrapping_add(place as u64);
        Running::start(place, seed, shared, &files, huge)
    };
    let mut processes: [_; PROCESSES] = array::from_fn(start);
    let before = SmallRng::seed_from_u64(seed).random_range(100..2000);
    while shared.operations.load(Relaxed) < before
        || shared.started.load(SeqCst) < PROCESSES * process::THREADS
    {
        for process in &mut processes {
            process.observe();
            assert!(!process.is_over(), "the process of seed {}", process.seed);
        }
        sleep(Duration::from_millis(5));
    }
    shared.removed.store(true, SeqCst);
    within("the removal", remove);
    for (process, end) in processes.into_iter().zip(&shared.ends) {
        process.expect_end(end);
    }
    let operations = shared.operations.load(Relaxed);
    println!("{operations} operations until the removal");
}

/// Sets the number of huge pages. Returns whether there are so many.
fn reserve(pages: usize) -> bool {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";
    let pages = format!("{pages}\n");
    fs::write(PATH, &pages).is_ok() && fs::read_to_string(PATH).is_ok_and(|have| have == pages)
}

/// How many transparent huge pages were faulted in since boot.
fn transparent_huge_pages() -> u64 {
    let counts = fs::read_to_string("/proc/vmstat").expect("read /proc/vmstat");
    let mut counts = counts.lines().filter_map(|line| line.split_once(' '));
    let (_, count) = counts
        .find(|(name, _)| *name == "thp_fault_alloc")
        .expect("the kernel has no transparent huge pages");
    count.parse().expect("a number")
}

/// Prints what the processes have done.
fn report(shared: &Shared, processes: u64, huge: bool, seconds: f64) {
    let [operations, registered, events, compared, stale] = [
        &shared.operations,
        &shared.registered,
        &shared.events,
        &shared.compared,
        &shared.stale,
    ]
    .map(|count| count.load(Relaxed));
    let rate = operations as f64 / seconds;
    println!("{operations} operations of {processes} processes, {rate:.0} per second");
    println!("{registered} regions, {events} events; with huge pages: {huge}");
    println!("{compared} regions looked at by RDMA, {stale} of them stale");
    assert_eq!(operations, processes * process::OPERATIONS, "operations");
    assert!(huge, "there are no huge pages");
    assert!(events > 0, "no events");
    // On soft-iWARP no RDMA is used.
    let is_siw = device().starts_with("siw");
    assert!(
        is_siw && compared == 0 || (1..compared).contains(&stale),
        "RDMA shows nothing"
    );
}

fn main() {
    let seed = match env::var("UVERBS_STRESS_SEED") {
        Ok(seed) => seed.parse().expect("UVERBS_STRESS_SEED is a number"),
        Err(_) => SmallRng::try_from_rng(&mut SysRng)
            .unwrap()
            .random::<u32>()
            .into(),
    };
    println!("UVERBS_STRESS_SEED={seed}");
    let huge = reserve(PROCESSES * process::HUGE_PAGES);
    let memory = Map::anonymous(size_of::<Shared>().div_ceil(PAGE), MapFlags::SHARED);
    // SAFETY: It is never unmapped, and all members are atomics.
    let shared: &'static Shared = unsafe { &*memory.at(0).cast() };

    let arguments: Vec<_> = env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let start = Instant::now();
    let transparent = transparent_huge_pages();
    let count = |more: &dyn Fn(u64) -> bool| {
        let processes = run(seed, shared, huge, more);
        report(shared, processes, huge, start.elapsed().as_secs_f64());
        let transparent = transparent_huge_pages() - transparent;
        assert!(transparent > 0, "no transparent huge pages");
        assert!(!more(processes), "it has ended early");
    };
    let number = |number: &str| number.parse::<u64>().expect("a number");
    match arguments[..] {
        ["operations", limit] => count(&|so_far| so_far * process::OPERATIONS < number(limit)),
        ["minutes", limit] => count(&|_| start.elapsed().as_secs() < 60 * number(limit)),
        ["removal", program, ref arguments @ ..] => {
            let remove = || {
                let status = Command::new(program).args(arguments).status();
                assert!(status.expect("run the command").success(), "{program}");
            };
            run_until_removal(seed, shared, huge, remove);
        }
        _ => panic!("usage: stress operations|minutes NUMBER, or stress removal COMMAND..."),
    }
    reserve(0);
}

// SPDX-License-Identifier: GPL-2.0
//! Hostile input: calls that are right but for a few fields, and system calls on the FD that
//! make no sense. The kernel must refuse what is wrong with an errno that fits, must accept
//! nothing of another context or address space, and must write nothing but its answer.
//!
//! `hostile [CALLS]` makes so many calls, a million if it is not said, and up to 5,000 more until
//! each operation was tested. They come in episodes, each of them in a process of its own:
//!
//! * as root,
//! * as an ordinary user, in a user name space if the kernel has them,
//! * in a forked child, with the objects of its parent,
//! * while another thread opens and closes the FDs.
//!
//! The seed of each episode is the one before plus one. A failure prints its own, for
//! `UVERBS_HOSTILE_SEED`. The device is soft-RoCE: others want more attributes.
//!
//! On a kernel with KCOV it counts what it reaches. With `UVERBS_HOSTILE_GUIDE=FILE` that
//! guides it, see `guide.rs`. Then the seed is not enough to repeat an episode: `FILE` gets the
//! numbers of one that failed, and `UVERBS_HOSTILE_REPEAT=FILE` takes them.

mod files;
mod guide;
mod memory;
mod methods;
mod report;
mod world;

use guide::{Choices, Guide};
use libc::{c_int, c_long};
use memory::sys;
use rand::{
    RngExt, SeedableRng,
    rngs::{SmallRng, SysRng},
};
use report::Report;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, WaitOptions, pidfd_open, waitpid},
};
use std::{
    env, fs,
    os::fd::{AsFd, AsRawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};
use uverbs_mmu_notify::{Context, NotifyQueue};
use uverbs_mmu_notify_tests::*;
use world::{World, count_fds};

const EPISODE: u64 = 2500;
/// Seconds without a call, on a machine that may be very slow.
const PATIENCE: u32 = 150;

#[derive(Clone, Copy, Debug)]
enum Role {
    Root,
    User,
    Child,
    Racing,
}

impl Role {
    fn of(seed: u64) -> Self {
        [Role::Root, Role::User, Role::Child, Role::Racing][seed as usize % 4]
    }
}

fn main() {
    let calls = env::args()
        .nth(1)
        .map_or(1_000_000, |calls| calls.parse().expect("a number"));
    let seed: u64 = match env::var("UVERBS_HOSTILE_SEED") {
        Ok(seed) => seed.parse().expect("UVERBS_HOSTILE_SEED is a number"),
        Err(_) => SmallRng::try_from_rng(&mut SysRng)
            .unwrap()
            .random::<u32>()
            .into(),
    };
    println!("UVERBS_HOSTILE_SEED={seed}");
    let save = env::var_os("UVERBS_HOSTILE_GUIDE");
    let repeat = env::var_os("UVERBS_HOSTILE_REPEAT");
    let repeated = repeat.as_ref().map(|path| {
        assert!(
            env::var_os("UVERBS_HOSTILE_SEED").is_some(),
            "UVERBS_HOSTILE_REPEAT needs UVERBS_HOSTILE_SEED"
        );
        let numbers = fs::read(path).expect("read UVERBS_HOSTILE_REPEAT");
        let numbers = numbers.as_chunks().0.iter().copied();
        numbers.map(u64::from_ne_bytes).collect::<Vec<_>>()
    });
    let guided = save.is_some() && repeated.is_none();
    let (report, guide) = (Report::new(), Guide::new());
    let taint = taint();
    for (count, seed) in (1..).zip(seed..) {
        let enough = report.calls() >= calls && report.untested().is_none();
        if enough || report.calls() >= calls + 2 * EPISODE {
            break;
        }
        report.call.store(0, Relaxed);
        guide.clear();
        let given = repeated.clone().unwrap_or_default();
        let choices = || Choices::new(seed, guide, guided, given);
        let calls = (calls / 4).min(EPISODE);
        let mut ended = supervise(|| episode(Role::of(seed), choices(), report, calls), report);
        if ended.is_ok() && self::taint() != taint {
            ended = Err("the kernel complains".to_owned());
        }
        if let Err(how) = ended {
            let call = report.call.load(Relaxed);
            println!("call {call} of the episode as {:?}: {how}", Role::of(seed));
            let file = repeat.as_ref().or(save.as_ref());
            let numbers = file.map(|file| format!(" UVERBS_HOSTILE_REPEAT={}", file.display()));
            let numbers = numbers.unwrap_or_default();
            println!(
                "to repeat it: UVERBS_HOSTILE_SEED={seed}{numbers} hostile {}",
                4 * calls
            );
            if let (true, Some(save)) = (guided, save) {
                fs::write(save, guide.numbers()).expect("write UVERBS_HOSTILE_GUIDE");
            }
            std::process::exit(1);
        }
        if repeated.is_some() {
            println!("the episode does not fail");
            return;
        }
        if count % 50 == 0 {
            println!("{} calls", report.calls());
            guide.print();
        }
    }
    report.print();
    let name_spaces = report.name_spaces.load(Relaxed);
    println!("{name_spaces} episodes in a user name space");
    let can = fs::exists("/proc/self/ns/user").expect("look for user name spaces");
    assert!(name_spaces > 0 || !can, "no episode in a user name space");
    guide.print();
    expect_no_regions();
    report.check();
}

/// What the kernel has complained about: kinds, without those of lockdep and such.
fn taint() -> String {
    fs::read_to_string("/proc/sys/kernel/tainted").expect("read the taint of the kernel")
}

/// Runs an episode in a process of its own. An error says how that fails, or that it hangs.
fn supervise(episode: impl FnOnce(), report: &'static Report) -> Result<(), String> {
    // SAFETY: There is no other thread.
    let pid = match unsafe { libc::fork() } {
        0 => {
            // A panic ends it with 101.
            episode();
            std::process::exit(0);
        }
        pid => (pid > 0)
            .then_some(pid)
            .and_then(Pid::from_raw)
            .expect("fork"),
    };
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd_open");
    let mut seen = 0;
    let mut idle = 0;
    let ended = loop {
        let second = Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        let done = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&second)).expect("poll");
        if done > 0 {
            break waitpid(Some(pid), WaitOptions::empty()).expect("waitpid");
        }
        let call = report.call.load(Relaxed);
        idle = if call == seen { idle + 1 } else { 0 };
        seen = call;
        if idle == PATIENCE {
            break None;
        }
    };
    match ended {
        Some((_, status)) if status.exit_status() == Some(0) => Ok(()),
        Some((_, status)) => Err(format!("{status:?}")),
        None => Err("hangs".to_owned()),
    }
}

fn episode(role: Role, choices: Choices, report: &'static Report, calls: u64) {
    if let Role::User = role {
        become_user(report);
    }
    let fds = count_fds();
    let mut world = World::new(choices, report);
    match role {
        Role::Child => {
            let child = in_child(|| {
                world.enter_child();
                let fds = count_fds() - world.queues.len();
                (0..calls).for_each(|_| step(&mut world));
                world.fork();
                world.finish(fds);
                0
            });
            assert_eq!(child, Exit::Code(0));
        }
        Role::Racing => {
            let stop = Arc::new(AtomicBool::new(false));
            let racer = {
                let (context, stop) = (world.sides[0].context(), stop.clone());
                let random = SmallRng::seed_from_u64(world.random.random());
                thread::spawn(move || race(&context, random, &stop))
            };
            world.racing = RACING;
            (0..calls).for_each(|_| step(&mut world));
            stop.store(true, Relaxed);
            racer.join().expect("the other thread");
            world.finish(fds);
        }
        Role::Root | Role::User => {
            let fds = count_fds() - world.queues.len();
            (0..calls).for_each(|_| step(&mut world));
            world.fork();
            world.finish(fds);
            world.after_disconnect();
        }
    }
}

fn step(world: &mut World) {
    world.random.begin_step();
    match world.random.random_range(0..1000) {
        0..330 => world.method(),
        330..530 => world.write(),
        530..650 => world.read(),
        650..690 => world.uring(),
        690..730 => world.poll(),
        730..780 => world.mmap(),
        780..820 => world.page(),
        820..860 => world.fcntl(),
        860..890 => world.control(),
        890..930 => world.refused(),
        930..950 => world.close(),
        _ => world.change(),
    }
    world.random.end_step();
}

/// Without privileges, and in a user name space if the kernel has them. The device is opened
/// later.
fn become_user(report: &Report) {
    const USER: u64 = 1000;
    let set = |number: c_long, args: &[u64]| sys(number, args).expect("become an ordinary user");
    set(libc::SYS_setgroups, &[0, 0]);
    set(libc::SYS_setresgid, &[USER; 3]);
    set(libc::SYS_setresuid, &[USER; 3]);
    // For /proc/self.
    set(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 1]);
    let limit = rustix::process::Rlimit {
        current: Some(1 << 17),
        maximum: Some(1 << 17),
    };
    rustix::process::setrlimit(rustix::process::Resource::Memlock, limit).expect("set the limit");
    if sys(libc::SYS_unshare, &[libc::CLONE_NEWUSER as u64]).is_ok() {
        report.name_spaces.fetch_add(1, Relaxed);
    }
}

const RACING: std::ops::Range<i64> = 400..406;

/// Gives some numbers to other FDs all the time, and closes them. Often that ends a queue.
fn race(context: &Arc<Context>, mut random: SmallRng, stop: &AtomicBool) {
    let own = NotifyQueue::alloc(context).expect("make a queue");
    own.set_nonblocking(true).expect("set O_NONBLOCK");
    let dup = |fd: c_int, to: i64| {
        sys(
            libc::SYS_dup3,
            &[fd as u64, to as u64, libc::O_CLOEXEC as u64],
        )
        .expect("dup3");
    };
    while !stop.load(Relaxed) {
        let to = random.random_range(RACING);
        match random.random_range(0..6) {
            0 => dup(own.as_fd().as_raw_fd(), to),
            1 => dup(context.as_fd().as_raw_fd(), to),
            2 | 3 => drop(sys(libc::SYS_close, &[to as u64])),
            _ => {
                let queue = NotifyQueue::alloc(context).expect("make a queue");
                queue.set_nonblocking(true).expect("set O_NONBLOCK");
                dup(queue.as_fd().as_raw_fd(), to);
            }
        }
    }
    for number in RACING {
        let _ = sys(libc::SYS_close, &[number as u64]);
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Other processes, and blocked threads.

use crate::map::Map;
use libc::c_int;
use rustix::{
    process::{
        Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitOptions, WaitStatus, kill_process,
        pidfd_getfd, pidfd_open, waitpid,
    },
    thread::gettid,
};
use std::{
    ffi::{c_long, c_void},
    fs, io,
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::mpsc,
    thread::{self, JoinHandle},
};

/// Runs `run`, and ends the process if that does not return, so that a test that hangs
/// names what hangs.
#[track_caller]
pub fn within<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let caller = std::panic::Location::caller();
    eprintln!("if this is the last line, and SIGALRM came: {what}, at {caller}, does not end");
    // SAFETY: The signal has no handler, and ends the process.
    unsafe { libc::alarm(150) };
    let result = run();
    // SAFETY: It takes back the one above.
    unsafe { libc::alarm(0) };
    result
}

/// How a process ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit {
    /// By exit.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

/// A forked child.
pub struct Child(Pid);

impl Child {
    /// Forks. The child exits with the code that `run` returns, or 101 if it
    /// panics, and runs nothing else: no destructor, no test harness.
    pub fn fork(run: impl FnOnce() -> i32) -> Self {
        // SAFETY: The only other thread is the harness's, which waits. The
        // child has our memory, and leaves by _exit() only.
        match unsafe { libc::fork() } {
            0 => {
                let code = catch_unwind(AssertUnwindSafe(run)).unwrap_or(101);
                // SAFETY: It has no preconditions.
                unsafe { libc::_exit(code) }
            }
            pid => Self::new("fork", pid),
        }
    }

    /// Starts a process that shares this one's memory, but no files.
    ///
    /// # Safety
    ///
    /// `run` has the thread-local variables of this thread, which goes on
    /// meanwhile: it may use system calls of rustix, and nothing that panics.
    pub unsafe fn share(run: extern "C" fn(*mut c_void) -> c_int) -> Self {
        const PAGES: usize = 16;
        let stack = Map::new(PAGES).void(PAGES);
        let flags = libc::CLONE_VM | libc::SIGCHLD;
        // SAFETY: The stack is nobody else's. The rest is up to the caller.
        Self::new("clone", unsafe {
            libc::clone(run, stack, flags, ptr::null_mut())
        })
    }

    /// Takes what the system call `name` has returned.
    fn new(name: &str, pid: i32) -> Self {
        let error = io::Error::last_os_error();
        let pid = (pid > 0).then_some(pid).and_then(Pid::from_raw);
        Self(pid.unwrap_or_else(|| panic!("{name}: {error}")))
    }

    /// Forks a child that does nothing until it is killed.
    pub fn idle() -> Self {
        Self::fork(|| {
            loop {
                thread::park();
            }
        })
    }

    /// Waits for the end.
    pub fn wait(self) -> Exit {
        let status = self.wait_status(WaitOptions::empty());
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (_, Some(signal)) => Exit::Signal(signal),
            _ => panic!("the child neither exited nor was killed: {status:?}"),
        }
    }

    /// Kills, and waits for the end.
    pub fn kill(self) -> Exit {
        self.signal(Signal::KILL);
        self.wait()
    }

    /// Waits until the child sleeps in one of `calls`.
    #[track_caller]
    pub fn wait_asleep(&self, calls: &[c_long]) {
        let path = format!("/proc/{}/syscall", self.0.as_raw_nonzero());
        wait_asleep(&path, calls, || {
            let ended = waitpid(Some(self.0), WaitOptions::NOHANG).expect("waitpid");
            assert!(ended.is_none(), "the child ended early: {ended:?}");
        });
    }

    /// Stops the child.
    #[track_caller]
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        self.wait_stopped();
    }

    /// Waits until the child has stopped, by itself with [`stop`] or by
    /// [`Self::stop`].
    #[track_caller]
    pub fn wait_stopped(&self) {
        let status = self.wait_status(WaitOptions::UNTRACED);
        assert!(status.stopped(), "the child ended early: {status:?}");
    }

    /// Lets a stopped child go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Lets a child that has called [`stop_traced`] go on, with a signal pending from the
    /// moment when it begins system call `call`. The signal is dropped after that.
    #[track_caller]
    pub fn interrupt(&self, call: c_long) {
        self.interrupt_with(call, 0);
    }

    /// The same, but the signal, SIGUSR1, is delivered.
    #[track_caller]
    pub fn interrupt_and_deliver(&self, call: c_long) {
        self.interrupt_with(call, libc::SIGUSR1);
    }

    #[track_caller]
    fn interrupt_with(&self, call: c_long, delivered: c_int) {
        let pid = self.0.as_raw_nonzero().get();
        let trace = |request, size: usize, data: *mut c_void| {
            // SAFETY: Of these requests only one writes, to `data` of that size.
            let ret = unsafe { libc::ptrace(request, pid, size, data) };
            assert!(ret >= 0, "ptrace: {}", std::io::Error::last_os_error());
        };
        // Distinguishes system calls from signals.
        let options = ptr::without_provenance_mut(libc::PTRACE_O_TRACESYSGOOD as usize);
        trace(libc::PTRACE_SETOPTIONS, 0, options);
        loop {
            trace(libc::PTRACE_SYSCALL, 0, ptr::null_mut());
            self.wait_stopped();
            // SAFETY: All members are numbers.
            let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
            let size = size_of_val(&info);
            trace(libc::PTRACE_GET_SYSCALL_INFO, size, (&raw mut info).cast());
            // SAFETY: It is what `op` says.
            let number = || unsafe { info.u.entry.nr };
            if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY && number() == call as u64 {
                break;
            }
        }
        self.signal(Signal::USR1);
        trace(libc::PTRACE_CONT, 0, ptr::null_mut());
        self.wait_stopped();
        let delivered = ptr::without_provenance_mut(delivered as usize);
        trace(libc::PTRACE_CONT, 0, delivered);
    }

    /// Takes a duplicate of the child's FD whose link in /proc begins so.
    #[track_caller]
    pub fn fd(&self, link: &str) -> OwnedFd {
        let dir = format!("/proc/{}/fd", self.0.as_raw_nonzero());
        let found = fs::read_dir(&dir)
            .expect("list the FDs of the child")
            .map(|entry| entry.expect("list the FDs of the child"))
            .find(|entry| {
                fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with(link))
            })
            .unwrap_or_else(|| panic!("the child has no {link}"));
        let number = found.file_name().to_string_lossy().parse();
        let pidfd = pidfd_open(self.0, PidfdFlags::empty()).expect("pidfd_open");
        pidfd_getfd(pidfd, number.expect("a number"), PidfdGetfdFlags::empty())
            .expect("pidfd_getfd")
    }

    fn wait_status(&self, options: WaitOptions) -> WaitStatus {
        let ended = waitpid(Some(self.0), options).expect("waitpid");
        ended.expect("it blocks").1
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.0, signal).expect("kill");
    }
}

/// Waits until the file, "syscall" of a task, shows one of `calls`.
#[track_caller]
fn wait_asleep(path: &str, calls: &[c_long], expect_alive: impl Fn()) {
    loop {
        expect_alive();
        // "running", or the number and the arguments. It is gone if the task is.
        let state = fs::read_to_string(path).unwrap_or_default();
        let number = state.split(' ').next().and_then(|word| word.parse().ok());
        if number.is_some_and(|number| calls.contains(&number)) {
            return;
        }
        thread::yield_now();
    }
}

/// How often `task`, its name in /proc, has slept.
pub fn sleeps(task: &str) -> usize {
    let status = fs::read_to_string(format!("/proc/{task}/status")).expect("read the status");
    let label = "voluntary_ctxt_switches:";
    let count = status.lines().find_map(|line| line.strip_prefix(label));
    let count = count.and_then(|count| count.trim().parse().ok());
    count.expect("how often the task has slept")
}

/// Stops this process until it is resumed.
pub fn stop() {
    kill_process(rustix::process::getpid(), Signal::STOP).expect("kill");
}

/// Stops this process, a child, for [`Child::interrupt`].
pub fn stop_traced() {
    // SAFETY: The parent may look at this process, and does that in `interrupt` only.
    let ret = unsafe { libc::ptrace(libc::PTRACE_TRACEME) };
    assert_eq!(ret, 0, "ptrace: {}", std::io::Error::last_os_error());
    stop();
}

/// Runs `run` in a child and returns how it ended.
pub fn in_child(run: impl FnOnce() -> i32) -> Exit {
    Child::fork(run).wait()
}

/// A thread that sleeps in a system call.
pub struct Blocked<T> {
    thread: JoinHandle<T>,
    tid: Pid,
    calls: &'static [c_long],
}

impl<T: Send + 'static> Blocked<T> {
    /// Runs `run` in a thread, and returns when that sleeps in one of `calls`.
    #[track_caller]
    pub fn spawn(calls: &'static [c_long], run: impl FnOnce() -> T + Send + 'static) -> Self {
        let (send, receive) = mpsc::channel();
        let thread = thread::spawn(move || {
            send.send(gettid()).expect("send the thread's number");
            run()
        });
        let tid = receive.recv().expect("receive the thread's number");
        let blocked = Self { thread, tid, calls };
        blocked.wait_asleep();
        blocked
    }

    /// Waits until the thread sleeps in one of its calls.
    #[track_caller]
    pub fn wait_asleep(&self) {
        let path = format!("/proc/self/task/{}/syscall", self.tid.as_raw_nonzero());
        wait_asleep(&path, self.calls, || {
            assert!(
                !self.thread.is_finished(),
                "expected the thread to wait in system call {:?}, but it returned",
                self.calls
            );
        });
    }

    /// How often the thread has slept.
    pub fn sleeps(&self) -> usize {
        sleeps(&format!("self/task/{}", self.tid.as_raw_nonzero()))
    }

    /// Whether the thread has returned.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Sends the thread a signal.
    pub fn signal(&self, signal: Signal) {
        // SAFETY: It takes three numbers, and the thread is not joined yet.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_tgkill,
                libc::getpid(),
                self.tid.as_raw_nonzero().get(),
                signal.as_raw(),
            )
        };
        assert_eq!(ret, 0, "tgkill: {}", std::io::Error::last_os_error());
    }

    /// Waits for the result.
    pub fn join(self) -> T {
        self.thread.join().expect("the thread panicked")
    }
}

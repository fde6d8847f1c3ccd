// SPDX-License-Identifier: GPL-2.0
//! The changes of the common files, and the counters of all processes after each of them.

use crate::{PROCESSES, model::Units, process::COMMON};
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
};
use std::{
    io, iter,
    os::fd::{AsFd, AsRawFd},
    sync::{
        Mutex,
        atomic::{
            AtomicI32, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
};
use uverbs_mmu_notify::{GenerationPage, NotifyQueue};

/// Number of changes in the log. A process that falls further behind fails.
const KEPT: u64 = 4096;

#[repr(C)]
struct Change {
    /// The index of the file, and the units that are removed from it.
    which: AtomicUsize,
    units: AtomicU32,
    /// The counters of the queues of each process after it.
    counters: [[AtomicU64; COMMON + 1]; PROCESSES],
}

/// Changes of both files are serialized by flock() on the file in memory.
#[repr(C)]
pub struct FileChanges {
    begun: AtomicU64,
    ended: AtomicU64,
    changes: [Change; KEPT as usize],
}

impl FileChanges {
    fn change(&self, number: u64) -> &Change {
        assert!(
            number + KEPT > self.begun(),
            "the log no longer has change {number}"
        );
        &self.changes[(number % KEPT) as usize]
    }

    /// How many changes have begun.
    pub fn begun(&self) -> u64 {
        self.begun.load(SeqCst)
    }

    /// How many have been made.
    pub fn ended(&self) -> u64 {
        self.ended.load(SeqCst)
    }

    /// The index of the file of change `number`, and the units that are removed from it.
    pub fn units(&self, number: u64) -> (usize, Units) {
        let Change { which, units, .. } = self.change(number);
        (which.load(Relaxed), units.load(Relaxed))
    }

    /// The counters of a process after change `number`.
    pub fn counters(&self, number: u64, place: usize) -> [u64; COMMON + 1] {
        let counters = &self.change(number).counters[place];
        counters.each_ref().map(|counter| counter.load(Relaxed))
    }

    /// Makes a change.
    pub fn make(&self, which: usize, units: Units, counters: &Counters, change: impl FnOnce()) {
        let number = self.begun() + 1;
        let entry = &self.changes[(number % KEPT) as usize];
        entry.which.store(which, Relaxed);
        entry.units.store(units, Relaxed);
        self.begun.store(number, SeqCst);
        change();
        for (place, to) in entry.counters.iter().enumerate() {
            // A process that has ended needs no counters.
            let counters = counters
                .load(place)
                .into_iter()
                .chain(iter::repeat(u64::MAX));
            for (to, counter) in to.iter().zip(counters) {
                to.store(counter, Relaxed);
            }
        }
        self.ended.store(number, SeqCst);
    }
}

/// Where the queues of a process are.
#[repr(C)]
pub struct Place {
    pid: AtomicI32,
    fds: [AtomicI32; COMMON + 1],
}

impl Place {
    /// Those of this process, before it registers anything.
    pub fn publish<'a>(&self, queues: impl Iterator<Item = &'a NotifyQueue>) {
        for (fd, queue) in self.fds.iter().zip(queues) {
            fd.store(queue.as_fd().as_raw_fd(), Relaxed);
        }
        self.pid.store(getpid().as_raw_nonzero().get(), SeqCst);
    }

    fn map(&self, pid: i32) -> io::Result<Vec<GenerationPage>> {
        let process = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
        let process = pidfd_open(process, PidfdFlags::empty())?;
        let map = |fd: &AtomicI32| {
            let fd = pidfd_getfd(&process, fd.load(Relaxed), PidfdGetfdFlags::empty())?;
            NotifyQueue::from(fd).generation_page()
        };
        self.fds.iter().map(map).collect()
    }
}

/// The counters of the queues of all processes.
pub struct Counters {
    places: &'static [Place; PROCESSES],
    /// The pages of the processes with these PIDs.
    mapped: Mutex<[(i32, Vec<GenerationPage>); PROCESSES]>,
}

impl Counters {
    pub fn new(places: &'static [Place; PROCESSES]) -> Self {
        let mapped = Mutex::new([const { (0, Vec::new()) }; PROCESSES]);
        Self { places, mapped }
    }

    /// Those of a process; none if it is gone.
    fn load(&self, place: usize) -> Vec<u64> {
        let pid = self.places[place].pid.load(SeqCst);
        let (mapped, pages) = &mut self.mapped.lock().unwrap()[place];
        if *mapped != pid {
            let gone = [Errno::SRCH, Errno::BADF].map(Some);
            *pages = match self.places[place].map(pid) {
                Err(e) if gone.contains(&Errno::from_io_error(&e)) => Vec::new(),
                pages => pages.expect("map the counters of another process"),
            };
            *mapped = pid;
        }
        pages.iter().map(GenerationPage::load).collect()
    }
}

// SPDX-License-Identifier: GPL-2.0
//! A process with many regions of one page, whose threads use its queue.

use crate::{Fixture, Map, MrArgs, PAGE, process::Child, read_all, read_raw, reg, reg_plain};
use rustix::{
    io::{read, write},
    mm::MapFlags,
};
use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};
use uverbs_mmu_notify::{Mr, PlainMr, sys::verbs::IBV_ACCESS_ON_DEMAND};

/// What threads repeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Work {
    /// They sleep.
    Nothing,
    /// A system call that has nothing to do with the queue.
    Other,
    /// read() of the queue to where there is no memory.
    Read,
    /// poll() of the queue.
    Poll,
    /// MADV_DONTNEED of a watched page of the thread's own.
    Purge,
    /// The same, and read() of the events.
    Drain,
}

impl Work {
    fn of(number: u8) -> Self {
        use Work::*;
        [Nothing, Other, Read, Poll, Purge, Drain][usize::from(number)]
    }

    fn once(self, fixture: &Fixture, own: Map, nowhere: Map) {
        match self {
            Work::Nothing => (),
            Work::Other => drop(rustix::process::getppid()),
            Work::Read => drop(read_raw(&fixture.queue, nowhere.at(0), PAGE)),
            Work::Poll => drop(fixture.queue.poll(crate::NOW)),
            Work::Purge => own.dont_need(0..1),
            Work::Drain => {
                own.dont_need(0..1);
                drop(fixture.queue.read(&mut [Default::default(); 16]));
            }
        }
    }
}

/// The kind of regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Watched.
    Watched,
    /// On-demand paging, which has notifiers of its own.
    OnDemand,
}

/// The process, seen from another one. It ends when this is dropped.
pub struct Holder {
    orders: UnixStream,
    child: Option<Child>,
}

impl Holder {
    /// Starts a process with `regions` regions, all of the first page of `file`, and
    /// with `threads` threads.
    pub fn new(kind: Kind, regions: usize, file: &OwnedFd, threads: usize) -> Self {
        let (orders, its) = UnixStream::pair().expect("make a pair of sockets");
        let child = Child::fork(|| Held::new(kind, regions, file, threads).obey(&its));
        let this = Self {
            orders,
            child: Some(child),
        };
        this.wait();
        this
    }

    /// Lets `threads` threads, and no others, do `work`. Returns how often it has been
    /// done altogether.
    pub fn order(&self, work: Work, threads: usize) -> usize {
        write(&self.orders, &[work as u8, threads as u8]).expect("give an order");
        self.wait()
    }

    fn wait(&self) -> usize {
        let mut done = [0; 8];
        let len = read(&self.orders, &mut done).expect("read the answer");
        assert_eq!(len, done.len(), "the process with the regions has ended");
        usize::from_ne_bytes(done)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.child.take().expect("it lives").kill();
    }
}

/// What the threads share.
#[derive(Default)]
struct Shared {
    work: AtomicU8,
    at_work: AtomicUsize,
    done: AtomicUsize,
}

/// The process, seen from inside.
struct Held {
    fixture: Arc<Fixture>,
    map: Map,
    _mrs: (Vec<Mr>, Vec<PlainMr>),
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Held {
    fn new(kind: Kind, regions: usize, file: &OwnedFd, threads: usize) -> Self {
        let fixture = Arc::new(Fixture::new());
        let map = Map::of_file(file, 1, MapFlags::SHARED);
        map.load(0);
        let args = MrArgs::new(map.at(0), PAGE);
        let mut mrs = (Vec::new(), Vec::new());
        for cookie in 0..regions as u64 {
            match kind {
                Kind::Watched => {
                    let args = args.watched(&fixture.queue, cookie);
                    mrs.0.push(reg(&fixture.pd, &args));
                }
                Kind::OnDemand => {
                    let access = args.access | IBV_ACCESS_ON_DEMAND;
                    mrs.1
                        .push(reg_plain(&fixture.pd, &MrArgs { access, ..args }));
                }
            }
        }
        let nowhere = Map::nowhere();
        let shared = Arc::new(Shared::default());
        let threads = (0..threads)
            .map(|_| {
                let (fixture, shared, own) = (fixture.clone(), shared.clone(), Map::new(1));
                if kind == Kind::Watched {
                    mrs.0.push(fixture.watch(own, 0..1, u64::MAX));
                }
                thread::spawn(move || {
                    loop {
                        thread::park();
                        let work = shared.work.load(Ordering::Acquire);
                        if Work::of(work) == Work::Nothing {
                            continue;
                        }
                        shared.at_work.fetch_add(1, Ordering::AcqRel);
                        while shared.work.load(Ordering::Acquire) == work {
                            Work::of(work).once(&fixture, own, nowhere);
                            shared.done.fetch_add(1, Ordering::Relaxed);
                        }
                        shared.at_work.fetch_sub(1, Ordering::AcqRel);
                    }
                })
            })
            .collect();
        Self {
            fixture,
            map,
            _mrs: mrs,
            shared,
            threads,
        }
    }

    fn obey(self, orders: &UnixStream) -> ! {
        let mut order = [0; 2];
        loop {
            let done = self.shared.done.load(Ordering::Relaxed);
            write(orders, &done.to_ne_bytes()).expect("answer");
            let len = read(orders, &mut order).expect("read an order");
            assert_eq!(len, order.len(), "bytes of an order");
            self.set(Work::Nothing, 0);
            match Work::of(order[0]) {
                // The next change finds everything as the first one did.
                Work::Nothing => drop(read_all(&self.fixture.queue)),
                work => self.set(work, order[1].into()),
            }
        }
    }

    /// Returns when that is so.
    fn set(&self, work: Work, threads: usize) {
        self.shared.work.store(work as u8, Ordering::Release);
        for thread in &self.threads[..threads] {
            thread.thread().unpark();
        }
        while self.shared.at_work.load(Ordering::Acquire) != threads {
            thread::yield_now();
        }
        self.map.load(0);
    }
}

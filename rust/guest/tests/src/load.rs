// SPDX-License-Identifier: GPL-2.0
//! Threads that use a device until it, or their context, is gone.

use crate::{Fixture, Map, process::within, try_reg};
use rustix::{event::PollFlags, io::Errno};
use std::{
    io, mem,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};
use uverbs_mmu_notify::{Event, Mr, NotifyQueue};

/// Threads that register and deregister.
const OWNERS: usize = 2;
/// Threads that wait in read(), and threads that wait in poll().
const WAITERS: usize = 2;
const THREADS: usize = OWNERS + 2 * WAITERS + 1;
/// Regions that live as long as the load.
const REGIONS: usize = 8;

struct Shared {
    /// Its queue is for poll().
    fixture: Fixture,
    /// For read().
    blocking: NotifyQueue,
    /// Where the regions are that live as long as the load.
    map: Map,
    /// What ends each thread.
    end: Errno,
    ended: AtomicBool,
    /// How often each thread has done its work.
    done: [AtomicUsize; THREADS],
    read: AtomicUsize,
}

/// The threads.
pub struct Load {
    shared: Arc<Shared>,
    /// Each returns the sum of the counts of its regions.
    threads: Vec<JoinHandle<usize>>,
    mrs: Vec<Mr>,
}

impl Load {
    /// Starts threads that use a device, of which some register, one changes the mapping, some
    /// read and some poll, until `end`. Returns when each is at work.
    pub fn new(device: &str, end: Errno) -> Self {
        let fixture = Fixture::on(device);
        let blocking = NotifyQueue::alloc(&fixture.context).expect("make a queue");
        let shared = Arc::new(Shared {
            fixture,
            blocking,
            map: Map::new(REGIONS),
            end,
            ended: AtomicBool::new(false),
            done: Default::default(),
            read: AtomicUsize::new(0),
        });
        let watch = |page: usize| shared.watch(shared.map, page).expect("register");
        let mrs = (0..REGIONS).map(watch).collect();
        let works: [fn(&Shared, usize) -> usize; THREADS] = [
            Shared::own,
            Shared::own,
            Shared::wait_in_read,
            Shared::wait_in_read,
            Shared::wait_in_poll,
            Shared::wait_in_poll,
            Shared::change,
        ];
        let spawn = |(nth, work): (usize, fn(&Shared, usize) -> usize)| {
            let shared = shared.clone();
            thread::spawn(move || work(&shared, nth))
        };
        let this = Self {
            threads: works.into_iter().enumerate().map(spawn).collect(),
            shared: shared.clone(),
            mrs,
        };
        within("the start of the load", || {
            let done = |nth: &AtomicUsize| nth.load(Ordering::Relaxed) > 2;
            while !shared.done.iter().all(done) {
                let ended = this.threads.iter().any(JoinHandle::is_finished);
                assert!(!ended, "a thread has ended");
                thread::yield_now();
            }
        });
        this
    }

    /// Closes the context.
    pub fn disconnect(&self) {
        let context = &self.shared.fixture.context;
        context.disconnect().expect("close the context");
    }

    /// All threads must end. If it is by the removal of the device, each region can still be
    /// deregistered, and the counts are those of all events.
    #[track_caller]
    pub fn join(mut self) {
        let threads = mem::take(&mut self.threads).into_iter();
        let counted: usize = within("a thread of the load", || {
            threads.map(|thread| thread.join().expect("a thread")).sum()
        });
        let kept: usize = mem::take(&mut self.mrs)
            .into_iter()
            .map(|mr| self.shared.deregister(mr))
            .sum();
        if self.shared.end == Errno::IO {
            let read = self.shared.read.load(Ordering::Relaxed);
            assert_eq!(counted + kept, read, "events counted, and read");
        }
    }
}

impl Shared {
    /// Watches a page, for readers or for pollers.
    fn watch(&self, map: Map, page: usize) -> io::Result<Mr> {
        let mut args = self.fixture.args(map, page..page + 1, page as u64);
        if page.is_multiple_of(2) {
            args = args.watched(&self.blocking, page as u64);
        }
        try_reg(&self.fixture.pd, &args)
    }

    /// Whether `result` is the end.
    #[track_caller]
    fn is_end<T>(&self, result: &io::Result<T>) -> bool {
        let Err(e) = result else { return false };
        assert_eq!(Errno::from_io_error(e), Some(self.end), "{e}");
        self.ended.store(true, Ordering::Release);
        true
    }

    fn done(&self, nth: usize) {
        self.done[nth].fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the count.
    fn deregister(&self, mut mr: Mr) -> usize {
        match mr.destroy() {
            // The context has taken the region with it.
            Err(e) if self.end != Errno::IO && Errno::from_io_error(&e) == Some(self.end) => 0,
            reported => reported.expect("deregister") as usize,
        }
    }

    /// Registers and deregisters.
    fn own(&self, nth: usize) -> usize {
        let map = Map::new(2);
        let mut counted = 0;
        loop {
            let mrs = [self.watch(map, 0), self.watch(map, 1)];
            map.map_over(0..2);
            let ended = mrs.iter().any(|mr| self.is_end(mr));
            let mrs = mrs.into_iter().flatten();
            counted += mrs.map(|mr| self.deregister(mr)).sum::<usize>();
            if ended {
                return counted;
            }
            self.done(nth);
        }
    }

    fn wait_in_read(&self, nth: usize) -> usize {
        let mut events = [Event::default(); 3];
        loop {
            let read = self.blocking.read(&mut events);
            if self.is_queue_end(&read) {
                return 0;
            }
            self.read.fetch_add(read.unwrap_or(0), Ordering::Relaxed);
            self.done(nth);
        }
    }

    fn wait_in_poll(&self, nth: usize) -> usize {
        let queue = &self.fixture.queue;
        let mut events = [Event::default(); 3];
        loop {
            let ready = queue.poll(None).expect("poll()");
            let read = queue.read(&mut events);
            if read
                .as_ref()
                .is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
            {
                continue;
            }
            if self.is_queue_end(&read) {
                let ready = queue.poll(None).expect("poll()");
                assert_eq!(ready, PollFlags::ERR, "poll() at the end");
                return 0;
            }
            assert_eq!(ready, PollFlags::IN, "poll()");
            self.read.fetch_add(read.unwrap_or(0), Ordering::Relaxed);
            self.done(nth);
        }
    }

    /// Whether `read` is the end of its queue.
    #[track_caller]
    fn is_queue_end(&self, read: &io::Result<usize>) -> bool {
        let Err(e) = read else { return false };
        assert_eq!(Errno::from_io_error(e), Some(Errno::IO), "read(): {e}");
        true
    }

    /// Changes the mapping under the regions that live as long as the load.
    fn change(&self, nth: usize) -> usize {
        while !self.ended.load(Ordering::Acquire) {
            self.map.map_over(0..REGIONS);
            self.done(nth);
        }
        self.map.map_over(0..REGIONS);
        0
    }
}

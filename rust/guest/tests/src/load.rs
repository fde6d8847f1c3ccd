// SPDX-License-Identifier: GPL-2.0
//! Threads that use a device until their context is closed.

use crate::{Fixture, Map, process::within, try_reg};
use rustix::{event::PollFlags, io::Errno};
use std::{
    io,
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
    ended: AtomicBool,
    /// How often each thread has done its work.
    done: [AtomicUsize; THREADS],
}

/// The threads.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    mrs: Vec<Mr>,
}

impl Load {
    /// Starts threads that use a device, of which some register, one changes the mapping, some
    /// read and some poll. Returns when each is at work.
    pub fn new(device: &str) -> Self {
        let fixture = Fixture::on(device);
        let blocking = NotifyQueue::alloc(&fixture.context).expect("make a queue");
        let shared = Arc::new(Shared {
            fixture,
            blocking,
            map: Map::new(REGIONS),
            ended: AtomicBool::new(false),
            done: Default::default(),
        });
        let watch = |page: usize| shared.watch(shared.map, page).expect("register");
        let mrs = (0..REGIONS).map(watch).collect();
        let works: [fn(&Shared, usize); THREADS] = [
            Shared::own,
            Shared::own,
            Shared::wait_in_read,
            Shared::wait_in_read,
            Shared::wait_in_poll,
            Shared::wait_in_poll,
            Shared::change,
        ];
        let spawn = |(nth, work): (usize, fn(&Shared, usize))| {
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

    /// All threads must end.
    #[track_caller]
    pub fn join(self) {
        let threads = self.threads.into_iter();
        within("a thread of the load", || {
            threads.for_each(|thread| thread.join().expect("a thread"));
        });
        self.mrs.into_iter().for_each(deregister);
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
        assert_eq!(Errno::from_io_error(e), Some(Errno::NOTTY), "{e}");
        self.ended.store(true, Ordering::Release);
        true
    }

    fn done(&self, nth: usize) {
        self.done[nth].fetch_add(1, Ordering::Relaxed);
    }

    /// Registers and deregisters.
    fn own(&self, nth: usize) {
        let map = Map::new(2);
        loop {
            let mrs = [self.watch(map, 0), self.watch(map, 1)];
            map.map_over(0..2);
            let ended = mrs.iter().any(|mr| self.is_end(mr));
            mrs.into_iter().flatten().for_each(deregister);
            if ended {
                return;
            }
            self.done(nth);
        }
    }

    fn wait_in_read(&self, nth: usize) {
        let mut events = [Event::default(); 3];
        while !self.is_queue_end(&self.blocking.read(&mut events)) {
            self.done(nth);
        }
    }

    fn wait_in_poll(&self, nth: usize) {
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
                return;
            }
            assert_eq!(ready, PollFlags::IN, "poll()");
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
    fn change(&self, nth: usize) {
        while !self.ended.load(Ordering::Acquire) {
            self.map.map_over(0..REGIONS);
            self.done(nth);
        }
        self.map.map_over(0..REGIONS);
    }
}

fn deregister(mut mr: Mr) {
    let result = mr.destroy();
    // The context may have taken the region with it.
    if let Err(e) = result {
        assert_eq!(
            Errno::from_io_error(&e),
            Some(Errno::NOTTY),
            "deregister: {e}"
        );
    }
}

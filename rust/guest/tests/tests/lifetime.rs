// SPDX-License-Identifier: GPL-2.0
//! G8: files, regions, contexts and processes end in any order.

use rustix::{
    event::PollFlags,
    io::{Errno, FdFlags, fcntl_getfd},
    mm::MapFlags,
};
use std::{
    fs, mem,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};
use uverbs_mmu_notify::{Context, Event, GenerationPage, Mr, MrArgs, NotifyQueue};
use uverbs_mmu_notify_tests::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Fd,
    Region,
    Context,
    Page,
}

const ENDS: [End; 4] = [End::Fd, End::Region, End::Context, End::Page];

/// All orders in which all of them end, after those of `ended`.
fn orders(ended: &[End]) -> Vec<Vec<End>> {
    if ended.len() == ENDS.len() {
        return vec![ended.to_vec()];
    }
    let left = ENDS.into_iter().filter(|end| !ended.contains(end));
    left.flat_map(|end| orders(&[ended, &[end]].concat()))
        .collect()
}

/// A watched region, its objects, some of which have ended, and the expected state.
struct Setup {
    context: Arc<Context>,
    queue: Option<NotifyQueue>,
    page: Option<GenerationPage>,
    mr: Option<Mr>,
    map: Map,
    changes: usize,
    delivered: u32,
    generation: u64,
    context_closed: bool,
    queue_closed: bool,
}

impl Setup {
    fn new() -> Self {
        let fixture = Fixture::new();
        let map = Map::new(ENDS.len() + 1);
        let mr = fixture.watch(map, 0..ENDS.len() + 1, 7);
        let Fixture {
            context,
            queue,
            page,
            ..
        } = fixture;
        Self {
            context,
            queue: Some(queue),
            generation: page.load(),
            page: Some(page),
            mr: Some(mr),
            map,
            changes: 0,
            delivered: 0,
            context_closed: false,
            queue_closed: false,
        }
    }

    fn end(&mut self, end: End) {
        match end {
            End::Fd => self.queue = None,
            End::Page => self.page = None,
            End::Region => {
                let mut mr = self.mr.take().expect("it ends once");
                if self.context_closed {
                    expect_errno(mr.destroy(), Errno::NOTTY, "MR_DESTROY");
                } else {
                    assert_eq!(mr.destroy().unwrap(), self.delivered, "events reported");
                }
                mem::forget(mr);
            }
            End::Context => {
                self.context.disconnect().expect("close the context");
                self.context_closed = true;
                self.generation += u64::from(!self.queue_closed);
            }
        }
        // A mapping keeps the file open.
        self.queue_closed |= self.context_closed || self.queue.is_none() && self.page.is_none();
    }

    /// Changes the mapping, and checks all objects that still exist.
    fn check(&mut self) {
        let watched = self.mr.is_some() && !self.queue_closed;
        self.generation += u64::from(watched);
        let pages = self.changes..self.changes + 1;
        self.map.unmap(pages.clone());
        self.changes += 1;

        if let Some(page) = &self.page {
            assert_eq!(page.load(), self.generation, "generation");
        }
        let Some(queue) = &self.queue else { return };
        let mut events = [Event::default(); 2];
        if self.queue_closed {
            return expect_closed(queue);
        }
        let ready = queue.poll(NOW).unwrap();
        if watched {
            assert_eq!(ready, PollFlags::IN, "poll() after a change");
            let record = Record::new(self.map, pages, 7, self.generation, UNMAPPED);
            expect_records(queue, &[record]);
            self.delivered += 1;
        } else {
            assert_eq!(ready, PollFlags::empty(), "poll() without a region");
            expect_errno(
                queue.read(&mut events),
                Errno::AGAIN,
                "read() without a region",
            );
        }
    }

    fn run(order: &[End]) {
        eprintln!("{order:?}");
        let mut setup = Self::new();
        setup.check();
        for &end in order {
            setup.end(end);
            setup.check();
        }
        // Nothing ends by itself behind the back of the test.
        mem::forget(setup);
    }
}

/// G8: all objects end, in each order, and each state behaves as documented.
#[test]
fn ends_in_every_order() {
    let orders = orders(&[]);
    assert_eq!(orders.len(), 24);
    for order in orders {
        Setup::run(&order);
    }
}

/// G8: the process ends in each of these states.
#[test]
fn process_exits_in_every_state() {
    // Loads what the children would each load again.
    Context::devices().unwrap();
    for state in 0..1 << ENDS.len() {
        let ended = ENDS.into_iter().enumerate();
        let ended: Vec<_> = ended
            .filter_map(|(n, end)| (state & 1 << n != 0).then_some(end))
            .collect();
        let child = in_child(|| {
            Setup::run(&ended);
            0
        });
        assert_eq!(child, Exit::Code(0), "the child that ended {ended:?}");
    }
    expect_no_regions();
}

/// G5: the FD is closed while its regions are watched. Deregistration still returns the
/// count.
#[test]
fn fd_closed_before_the_region() {
    let fixture = Fixture::new();
    let map = Map::new(4);
    let mut mrs = [fixture.watch(map, 0..4, 1), fixture.watch(map, 1..4, 2)];
    map.unmap(0..1);
    map.unmap(1..2);
    assert_eq!(read_all(&fixture.queue).len(), 2, "events read");
    map.unmap(2..3);
    let Fixture { queue, page, .. } = fixture;
    drop(page);
    drop(queue);
    map.unmap(3..4);
    for mr in &mut mrs {
        assert_eq!(mr.destroy().unwrap(), 1, "events reported");
    }
}

/// Interface: a duplicate keeps the queue alive.
#[test]
fn fd_is_duplicated() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let _mr = fixture.watch(map, 0..1, 7);
    let other = rustix::io::dup(&fixture.queue).unwrap();
    let Fixture { queue, page, .. } = fixture;
    drop((queue, page));
    map.unmap(0..1);
    expect_records(&other.into(), &[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
}

/// Interface: the end of the context drops pending events, advances the generation once,
/// and read() and poll() return EIO and EPOLLERR from then on.
#[test]
fn context_closed_with_an_event_pending() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let mr = fixture.watch(map, 0..2, 7);
    map.unmap(0..1);
    let before = fixture.page.load();
    fixture.context.disconnect().unwrap();
    mem::forget(mr);
    assert_eq!(fixture.page.load(), before + 1, "generation after the end");
    map.unmap(1..2);
    assert_eq!(fixture.page.load(), before + 1, "generation later");
    for _ in 0..2 {
        expect_closed(&fixture.queue);
    }
}

/// Interface: the page is not part of core dumps.
#[test]
fn page_is_not_dumped() {
    let _fixture = Fixture::new();
    let smaps = fs::read_to_string("/proc/self/smaps").expect("list the mappings");
    let (_, page) = smaps.split_once("[infinibandmmunotify]").expect("the page");
    let flags = page.lines().find(|line| line.starts_with("VmFlags:"));
    let flags = flags.expect("its flags");
    assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
}

/// G8: the page is freed with the file and its mappings, although a region is watched.
#[test]
fn page_is_freed_with_the_file() {
    let fixture = Fixture::new();
    let pages = counter_pages();
    let map = Map::new(1);
    let mut mr = fixture.watch(map, 0..1, 7);
    let Fixture { queue, page, .. } = fixture;
    drop((queue, page));
    assert_eq!(counter_pages(), pages - 1, "counter pages");
    map.map_over(0..1);
    assert_eq!(mr.destroy().unwrap(), 0, "events reported");
}

/// Interface: the FD is close-on-exec.
#[test]
fn fd_is_close_on_exec() {
    let fixture = Fixture::new();
    assert_eq!(fcntl_getfd(&fixture.queue).unwrap(), FdFlags::CLOEXEC);
}

/// G8: a process is killed while one thread changes the mapping, one reads, two wait in
/// read(), and one registers and deregisters.
#[test]
fn killed() {
    // How often each of three threads has done its work.
    let done = Map::anonymous(1, MapFlags::SHARED).at(0);
    let done: *const [AtomicU32; 3] = done.cast_const().cast();
    // SAFETY: It is zeroed, never unmapped, and the processes only access it as atomics.
    let done = unsafe { &*done };
    let child = Child::fork(|| {
        let fixture = Fixture::new();
        let waiting = NotifyQueue::alloc(&fixture.context).expect("make a queue");
        let waiting = Arc::new(waiting);
        let _readers = [(); 2].map(|()| {
            let queue = waiting.clone();
            let read = move || queue.read(&mut [Event::default()]);
            Blocked::spawn(&[libc::SYS_read], read)
        });
        let map = Map::new(2);
        let _mr = fixture.watch(map, 0..2, 7);
        let repeat = |nth: usize, work: &(dyn Fn() + Sync)| {
            loop {
                work();
                done[nth].fetch_add(1, Ordering::Relaxed);
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| repeat(0, &|| map.map_over(0..2)));
            scope.spawn(|| {
                repeat(1, &|| while read_all(&fixture.queue).is_empty() {});
            });
            scope.spawn(|| {
                let other = Map::new(1);
                repeat(2, &|| drop(fixture.watch(other, 0..1, 8)));
            });
        });
        0
    });
    within("the threads", || {
        while done.iter().any(|done| done.load(Ordering::Relaxed) < 20) {
            thread::yield_now();
        }
    });
    assert_eq!(child.kill(), Exit::Signal(libc::SIGKILL), "the child");
    expect_no_regions();
}

/// G8: a context with many queues and regions ends before them.
#[test]
fn many_queues() {
    let fixture = Fixture::new();
    let map = Map::new(8);
    let queues: Vec<_> = (0..8)
        .map(|_| NotifyQueue::alloc(&fixture.context).expect("make a queue"))
        .collect();
    let mrs: Vec<_> = (0..64)
        .map(|n| {
            let args = MrArgs::new(map.at(n % 8), PAGE).watched(&queues[n / 8], n as u64);
            reg(&fixture.pd, &args)
        })
        .collect();
    map.unmap(0..4);
    fixture.context.disconnect().unwrap();
    mem::forget(mrs);
    map.unmap(4..8);
    for queue in &queues {
        expect_closed(queue);
    }
    let _ = fixture.context.as_fd();
    expect_no_regions();
}

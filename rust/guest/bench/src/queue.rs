// SPDX-License-Identifier: GPL-2.0
//! The fast path, hits by how many overlap and by who waits, and drains, with few other
//! watches.

use crate::{
    measure::{BATCH, SAMPLES, count, each, now, pairs, sample},
    row::Rows,
};
use anyhow::{Result, ensure};
use rustix::{
    event::epoll::{self, CreateFlags, EventData, EventFlags},
    mm::{MapFlags, ProtFlags, mmap},
};
use std::{
    ffi::c_long,
    hint::black_box,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
    ptr,
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};
use uverbs_mmu_notify::{
    Event, Mr, MrArgs,
    cache::{Cache, Verbs},
};
use uverbs_mmu_notify_tests::*;

const PAGES: usize = 16;

pub fn run(rows: &mut Rows) -> Result<()> {
    let fixture = Fixture::new();
    fast_path(rows, &fixture)?;
    overlapping(rows, &fixture);
    merged(rows, &fixture);
    waiters(rows);
    drains(rows, &fixture);
    contention(rows, &fixture);
    Ok(())
}

/// What a lookup of the manual's sample reads.
struct Sample<'a> {
    generation: &'a AtomicU64,
    applied: AtomicU64,
}

/// An entry of it.
struct Entry {
    start: u64,
    end: u64,
    lkey: u32,
    stale: AtomicBool,
}

impl Entry {
    #[inline(always)]
    fn key(&self, addr: u64, length: u64) -> Option<u32> {
        (self.start <= addr && addr + length <= self.end).then_some(self.lkey)
    }
}

#[inline(never)]
fn unguarded(_: &Sample<'_>, entry: &Entry, addr: u64, length: u64) -> Option<u32> {
    entry.key(addr, length)
}

/// Of a cache that has no stale entries, because it takes them out when it drains.
#[inline(never)]
fn with_generation(cache: &Sample<'_>, entry: &Entry, addr: u64, length: u64) -> Option<u32> {
    if cache.generation.load(Ordering::Relaxed) != cache.applied.load(Ordering::Acquire) {
        return None;
    }
    entry.key(addr, length)
}

#[inline(never)]
fn guarded(cache: &Sample<'_>, entry: &Entry, addr: u64, length: u64) -> Option<u32> {
    if cache.generation.load(Ordering::Relaxed) != cache.applied.load(Ordering::Acquire)
        || entry.stale.load(Ordering::Relaxed)
    {
        return None;
    }
    entry.key(addr, length)
}

fn fast_path(rows: &mut Rows, fixture: &Fixture) -> Result<()> {
    const LOOKUPS: usize = 1024;
    let flags = (ProtFlags::READ, MapFlags::SHARED);
    // SAFETY: A new mapping, at an address of the kernel's choice.
    let page = unsafe { mmap(ptr::null_mut(), PAGE, flags.0, flags.1, &fixture.queue, 0) }?;
    let cache = Sample {
        // SAFETY: The page begins with the generation, and stays mapped. Only relaxed loads
        // are sure not to write; every load of x86 has acquire order.
        generation: unsafe { AtomicU64::from_ptr(page.cast()) },
        applied: AtomicU64::new(fixture.page.load()),
    };
    let (start, length) = (1 << 30, 64 << 10);
    let entry = Entry {
        start,
        end: start + length,
        lkey: 1,
        stale: AtomicBool::new(false),
    };
    type Lookup = fn(&Sample<'_>, &Entry, u64, u64) -> Option<u32>;
    let lookup = |lookup: Lookup| {
        let (lookup, cache, entry) = (black_box(lookup), black_box(&cache), black_box(&entry));
        assert!(lookup(cache, entry, start, length).is_some(), "a hit");
        sample(|| {
            each(LOOKUPS, |_| {
                black_box(lookup(cache, entry, start, length));
            })
        })
    };
    let plain = lookup(unguarded);
    for (name, checked) in [
        ("lookup, generation", with_generation as Lookup),
        ("lookup, generation and stale flag", guarded),
    ] {
        rows.added(name, &[], lookup(checked), plain);
    }

    // SAFETY: Maps only, to which there are no references.
    let cache = Cache::new(unsafe { Verbs::new(&fixture.pd) }?);
    let map = Map::new(1);
    let range = map.at(0) as u64..map.at(1) as u64;
    drop(cache.get(range.clone())?);
    let found = sample(|| each(LOOKUPS, |_| drop(black_box(cache.lookup(&range)))));
    ensure!(cache.lookup(&range)?.is_some(), "the entry is in the cache");
    rows.add("lookup of the crate's cache, with its locks", &[], found);

    let mut events = [Event::default(); 16];
    let empty = sample(|| {
        each(BATCH, |_| {
            assert!(fixture.queue.read(&mut events).is_err(), "it is empty");
        })
    });
    rows.add("read() that returns EAGAIN", &[], empty);
    let mut fd = libc::pollfd {
        fd: fixture.queue.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let polled = sample(|| {
        each(BATCH, |_| {
            // SAFETY: There is one.
            let ready = unsafe { libc::poll(&mut fd, 1, 0) };
            assert_eq!(ready, 0, "it is empty");
        })
    });
    rows.add("poll() of an empty queue", &[], polled);
    Ok(())
}

fn register(fixture: &Fixture, map: Map, pages: Range<usize>, watched: bool) -> Mr {
    let args = MrArgs::new(map.at(pages.start), pages.len() * PAGE);
    reg(
        &fixture.pd,
        &match watched {
            true => args.watched(&fixture.queue, 0),
            false => args,
        },
    )
}

fn overlapping(rows: &mut Rows, fixture: &Fixture) {
    for (regions, times) in [(1, 31), (10, 31), (100, 15), (1000, 7)] {
        let [pair] = pairs(times, |watched| {
            let map = Map::new(PAGES);
            let register = |_| register(fixture, map, 0..PAGES, watched);
            let mrs: Vec<_> = (0..regions).map(register).collect();
            let count = count(|| map.unmap(0..PAGES));
            drop(read_all(&fixture.queue));
            drop(mrs);
            [count]
        });
        let params = [("overlapping", regions.into())];
        let each = pair.more / regions as f64;
        rows.add("hit, munmap, for each watch", &params, each);
    }
}

/// Changes of an MR whose last event was read, and of one that has an event pending. No
/// page is left there, so none has to be freed.
fn merged(rows: &mut Rows, fixture: &Fixture) {
    let both = [false, true].map(|watched| {
        let maps: Vec<_> = (0..BATCH).map(|_| Map::new(PAGES)).collect();
        let register = |&map| register(fixture, map, 0..PAGES, watched);
        let mrs: Vec<_> = maps.iter().map(register).collect();
        maps.iter().for_each(|map| map.dont_need(0..PAGES));
        (maps, mrs)
    });
    drop(read_all(&fixture.queue));
    let [first, merged] = pairs(SAMPLES, |watched| {
        let maps = &both[usize::from(watched)].0;
        let counts = [(); 2].map(|()| each(BATCH, |n| maps[n].dont_need(0..PAGES)));
        assert_eq!(read_all(&fixture.queue).len(), BATCH * usize::from(watched));
        counts
    });
    for (maps, mrs) in both {
        drop(mrs);
        maps.iter().for_each(|map| map.unmap(0..PAGES));
    }
    rows.pair("hit, MADV_DONTNEED", &[], first);
    rows.pair("merged hit, MADV_DONTNEED", &[], merged);
}

/// How a thread waits for events.
#[derive(Clone, Copy, PartialEq)]
enum Wait {
    Nobody,
    Read,
    Poll,
    Epoll,
}

/// A munmap() whose event finds the queue empty.
fn waiters(rows: &mut Rows) {
    const CALLS: &[c_long] = &[
        libc::SYS_read,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
    ];
    for (wait, name) in [
        (Wait::Nobody, "nobody"),
        (Wait::Read, "a sleeping reader"),
        (Wait::Poll, "poll()"),
        (Wait::Epoll, "epoll"),
    ] {
        let fixture = Arc::new(Fixture::new());
        let nonblocking = wait != Wait::Read;
        fixture.queue.set_nonblocking(nonblocking).expect("fcntl");
        let stop = Arc::new(AtomicBool::new(false));
        let waiter = (wait != Wait::Nobody).then(|| {
            let (fixture, stop) = (fixture.clone(), stop.clone());
            Blocked::spawn(CALLS, move || {
                while !stop.load(Ordering::Acquire) {
                    wait_once(&fixture, wait);
                }
            })
        });
        let [pair] = pairs(31, |watched| {
            let map = Map::new(PAGES);
            let mr = register(&fixture, map, 0..PAGES, watched);
            if let Some(waiter) = &waiter {
                waiter.wait_asleep();
            }
            // So that the thread that is woken does not run at once.
            set_realtime(true);
            let count = count(|| map.unmap(0..PAGES));
            set_realtime(false);
            match &waiter {
                None => drop(read_all(&fixture.queue)),
                Some(waiter) => waiter.wait_asleep(),
            }
            drop(mr);
            [count]
        });
        let params = [("waiting", name.into())];
        rows.pair("hit of an empty queue, munmap", &params, pair);
        if let Some(waiter) = waiter {
            let map = Map::new(PAGES);
            let _mr = register(&fixture, map, 0..PAGES, true);
            stop.store(true, Ordering::Release);
            map.unmap(0..PAGES);
            waiter.join();
        }
    }
}

fn wait_once(fixture: &Fixture, wait: Wait) {
    match wait {
        Wait::Nobody => (),
        Wait::Read => drop(fixture.queue.read(&mut [Event::default(); 16])),
        Wait::Poll => drop(fixture.queue.poll(None)),
        Wait::Epoll => {
            let epoll = epoll::create(CreateFlags::CLOEXEC).expect("epoll_create");
            let data = EventData::new_u64(0);
            epoll::add(&epoll, &fixture.queue, data, EventFlags::IN).expect("epoll_ctl");
            let mut events = Vec::with_capacity(1);
            epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)
                .expect("epoll_wait");
        }
    }
    if wait != Wait::Read {
        drop(read_all(&fixture.queue));
    }
}

fn set_realtime(on: bool) {
    let (policy, priority) = match on {
        true => (libc::SCHED_FIFO, 1),
        false => (libc::SCHED_OTHER, 0),
    };
    let param = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: It reads `param`.
    let ret = unsafe { libc::sched_setscheduler(0, policy, &param) };
    assert_eq!(ret, 0, "sched_setscheduler");
}

fn drains(rows: &mut Rows, fixture: &Fixture) {
    const SIZES: [usize; 4] = [1, 16, 256, 4096];
    let most = SIZES[3];
    let area = Map::new(most);
    let mrs = fixture.watch_each(area, 0..most);
    let pages = |events: usize| (events * size_of::<Event>()).div_ceil(PAGE);
    let hot = Map::new(pages(most));
    for events in SIZES {
        for buffer in ["hot", "not faulted in"] {
            let read = sample(|| {
                area.dont_need(0..events);
                let len = events * size_of::<Event>();
                let to = match buffer {
                    "hot" => hot,
                    _ => Map::untouched(pages(events)),
                };
                let mut read = 0;
                let count = count(|| read = read_raw(&fixture.queue, to.at(0), len).expect("read"));
                assert_eq!(read, len, "bytes read");
                if buffer != "hot" {
                    to.unmap(0..pages(events));
                }
                count / events as f64
            });
            let params = [("batch", events.into()), ("buffer", buffer.into())];
            rows.add("drain, for each event", &params, read);
        }
    }
    let until_eagain = sample(|| {
        area.dont_need(0..1);
        let mut events = [Event::default(); 16];
        count(|| while fixture.queue.read(&mut events).is_ok() {})
    });
    rows.add("drain of one event, until EAGAIN", &[], until_eagain);
    drop(mrs);
    area.unmap(0..most);
    hot.unmap(0..pages(most));
}

/// Threads that take turns to hit watches of one queue. There are as many watches for any
/// number of threads, and one CPU, so what grows is what the threads do to each other.
fn contention(rows: &mut Rows, fixture: &Fixture) {
    const WATCHES: usize = 1024;
    const THREADS: [usize; 4] = [1, 2, 4, 8];
    let areas = [false, true].map(|watched| {
        let area = Map::new(WATCHES);
        let mrs = (0..WATCHES).map(|page| register(fixture, area, page..page + 1, watched));
        (area, mrs.collect::<Vec<_>>())
    });
    let hits = THREADS.map(|threads| {
        let [pair] = pairs(7, |watched| {
            let area = areas[usize::from(watched)].0;
            let barrier = Arc::new(Barrier::new(threads));
            let handles: Vec<_> = (0..threads)
                .map(|thread| {
                    let barrier = barrier.clone();
                    thread::spawn(move || {
                        barrier.wait();
                        let start = now();
                        for page in (thread..WATCHES).step_by(threads) {
                            area.dont_need(page..page + 1);
                            thread::yield_now();
                        }
                        (start, now())
                    })
                })
                .collect();
            let times = handles
                .into_iter()
                .map(|handle| handle.join().expect("a thread"));
            let times = times.fold((u64::MAX, 0), |all, own| {
                (all.0.min(own.0), all.1.max(own.1))
            });
            let count = (times.1 - times.0) as f64 / WATCHES as f64;
            assert_eq!(
                read_all(&fixture.queue).len(),
                WATCHES * usize::from(watched)
            );
            [count]
        });
        let params = [("threads", threads.into())];
        rows.pair("hit, MADV_DONTNEED, of one queue", &params, pair);
        pair.more
    });
    let params = [("from", THREADS[0].into()), ("to", THREADS[2].into())];
    let growth = (hits[2] / hits[0] - 1.0) * 100.0;
    rows.other("growth of a hit by threads", &params, "%", growth);
}

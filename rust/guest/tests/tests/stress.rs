// SPDX-License-Identifier: GPL-2.0
//! Threads that register, change the mapping, read and deregister at random. What they
//! read is compared with what they did.

use rand::{
    RngExt, SeedableRng,
    rngs::{SmallRng, SysRng},
};
use rustix::event::Timespec;
use std::{
    collections::{HashMap, HashSet},
    env,
    ops::Range,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};
use uverbs_mmu_notify::{Event, Mr};
use uverbs_mmu_notify_tests::*;

/// Threads that register.
const OWNERS: usize = 3;
const READERS: usize = 2;
const STEPS: usize = 60;
const PAGES: usize = 8;

/// The memory of an owner.
#[derive(Clone, Copy)]
struct Memory {
    /// Only the owner changes its mapping, so all events of it are known.
    own: Map,
    /// Another thread changes this mapping as well.
    disturbed: Map,
}

struct Setup {
    fixture: Fixture,
    next_cookie: AtomicU64,
    /// The events that have been read, by cookie.
    seen: Mutex<HashMap<u64, Vec<Record>>>,
    memory: [Memory; OWNERS],
    done: AtomicBool,
}

/// A region, as its owner knows it.
struct Owned {
    mr: Mr,
    cookie: u64,
    pages: Range<usize>,
}

fn some_pages(random: &mut SmallRng) -> Range<usize> {
    let start = random.random_range(0..PAGES);
    start..random.random_range(start + 1..=PAGES)
}

fn change(map: Map, pages: Range<usize>, random: &mut SmallRng) {
    if random.random() {
        map.map_over(pages);
    } else {
        // Without a page there would be no event.
        pages.clone().for_each(|page| map.store(page, 0x11));
        map.dont_need(pages);
    }
}

impl Setup {
    /// Registers, changes, deregisters. Returns the count of each region.
    fn own(&self, memory: Memory, mut random: SmallRng) -> Vec<(u64, u32)> {
        let (mut own, mut disturbed) = (Vec::new(), Vec::new());
        let mut counts = Vec::new();
        for _ in 0..STEPS {
            let in_own = random.random();
            let (map, regions) = match in_own {
                true => (memory.own, &mut own),
                false => (memory.disturbed, &mut disturbed),
            };
            match random.random_range(0..4) {
                0 => {
                    let cookie = self.next_cookie.fetch_add(1, Ordering::Relaxed);
                    let pages = some_pages(&mut random);
                    let mr = self.fixture.watch(map, pages.clone(), cookie);
                    regions.push(Owned { mr, cookie, pages });
                }
                1 if !regions.is_empty() => {
                    let region = regions.swap_remove(random.random_range(0..regions.len()));
                    counts.push(deregister(region));
                }
                _ if in_own => self.change_own(map, regions, &mut random),
                _ => change(map, some_pages(&mut random), &mut random),
            }
        }
        counts.extend(own.into_iter().chain(disturbed).map(deregister));
        counts
    }

    /// Makes a change. Events must cover it exactly for each region that it concerns, and
    /// their generations must be newer than before the change, but not than after it. No
    /// event of these regions is pending before the change.
    fn change_own(&self, map: Map, regions: &[Owned], random: &mut SmallRng) {
        let pages = some_pages(random);
        let concerned: Vec<_> = regions
            .iter()
            .filter(|region| pages.start < region.pages.end && region.pages.start < pages.end)
            .map(|region| (region, self.seen(region.cookie, 0).len()))
            .collect();
        let before = self.fixture.page.load();
        change(map, pages.clone(), random);
        let after = self.fixture.page.load();
        for (region, old) in concerned {
            let (start, end) = (
                pages.start.max(region.pages.start),
                pages.end.min(region.pages.end),
            );
            let changed = map.at(start) as u64..map.at(end) as u64;
            let is_covered = |events: &[Record]| {
                (changed.start..changed.end)
                    .step_by(PAGE)
                    .all(|page| events.iter().any(|event| event.range.contains(&page)))
            };
            let events = loop {
                let events = self.seen(region.cookie, old);
                if is_covered(&events) {
                    break events;
                }
                thread::yield_now();
            };
            for event in events {
                assert!(
                    changed.start <= event.range.start && event.range.end <= changed.end,
                    "changed was {changed:#x?}: {event:?}"
                );
                assert!(
                    before < event.generation && event.generation <= after,
                    "the generation was {before}, then {after}: {event:?}"
                );
            }
        }
    }

    /// The events of `cookie` that have been read, without the first `old` ones.
    fn seen(&self, cookie: u64, old: usize) -> Vec<Record> {
        let seen = self.seen.lock().unwrap();
        seen.get(&cookie)
            .map_or(Vec::new(), |events| events[old..].to_vec())
    }

    /// Changes the memory of all owners.
    fn disturb(&self, mut random: SmallRng) {
        while !self.done.load(Ordering::Acquire) {
            let map = self.memory[random.random_range(0..OWNERS)].disturbed;
            map.map_over(some_pages(&mut random));
            thread::yield_now();
        }
    }

    /// Reads, in pieces of random size, until nothing more can come.
    fn read(&self, mut random: SmallRng) {
        const MOMENT: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 1_000_000,
        };
        loop {
            let done = self.done.load(Ordering::Acquire);
            let mut events = vec![Event::default(); random.random_range(1..20)];
            let count = match self.fixture.queue.read(&mut events) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if done {
                        return;
                    }
                    self.fixture.queue.poll(Some(MOMENT)).expect("poll");
                    continue;
                }
                count => count.expect("read"),
            };
            let events = &events[..count];
            let ordered = events.is_sorted_by(|a, b| a.generation < b.generation);
            assert!(ordered, "generations of one read(): {events:?}");
            let mut seen = self.seen.lock().unwrap();
            for &event in events {
                seen.entry(event.cookie).or_default().push(event.into());
            }
        }
    }
}

/// Returns the cookie and the count.
fn deregister(mut region: Owned) -> (u64, u32) {
    (region.cookie, region.mr.destroy().expect("deregister"))
}

/// G1: G2: G4: G5: each change of a watched page is reported, and deregistration returns
/// the number of events that were read.
#[test]
fn reports_add_up() {
    let seed = match env::var("UVERBS_TEST_SEED") {
        Ok(seed) => seed.parse().expect("UVERBS_TEST_SEED is a number"),
        Err(_) => SmallRng::try_from_rng(&mut SysRng).unwrap().random(),
    };
    eprintln!("UVERBS_TEST_SEED={seed}");
    let mut seeds = SmallRng::seed_from_u64(seed);
    let mut random = || SmallRng::from_rng(&mut seeds);

    let setup = Setup {
        fixture: Fixture::new(),
        next_cookie: AtomicU64::new(1),
        seen: Mutex::default(),
        memory: std::array::from_fn(|_| Memory {
            own: Map::new(PAGES),
            disturbed: Map::new(PAGES),
        }),
        done: AtomicBool::new(false),
    };
    let counts: Vec<_> = within("the threads", || {
        thread::scope(|scope| {
            let owners = setup.memory.map(|memory| {
                let (setup, random) = (&setup, random());
                scope.spawn(move || setup.own(memory, random))
            });
            for _ in 0..READERS {
                let (setup, random) = (&setup, random());
                scope.spawn(move || setup.read(random));
            }
            let (disturber, random) = (&setup, random());
            scope.spawn(move || disturber.disturb(random));
            let counts = owners.map(|owner| owner.join());
            setup.done.store(true, Ordering::Release);
            counts
                .into_iter()
                .flat_map(|counts| counts.expect("an owner"))
                .collect()
        })
    });

    let seen = setup.seen.into_inner().unwrap();
    for (cookie, count) in &counts {
        let seen = seen.get(cookie).map_or(0, Vec::len);
        assert_eq!(
            seen, *count as usize,
            "events read of region {cookie}, and its count"
        );
    }
    let read: usize = seen.values().map(Vec::len).sum();
    let counted: u32 = counts.iter().map(|(_, count)| count).sum();
    assert_eq!(
        read, counted as usize,
        "events read, and the sum of the counts"
    );
    let events = seen.values().flatten();
    let generations: HashSet<_> = events.map(|event| event.generation).collect();
    assert_eq!(generations.len(), read, "generations of all events");
    assert!(read > 0, "nothing was read");
    eprintln!("{} regions, {read} events", counts.len());
}

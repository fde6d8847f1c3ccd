// SPDX-License-Identifier: GPL-2.0
//! Threads that register, change the mapping, read and deregister at random, and
//! all that they are told is compared with what they did.

use rand::{
    RngExt, SeedableRng,
    rngs::{SmallRng, SysRng},
};
use rustix::event::Timespec;
use std::{
    collections::HashMap,
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

/// Threads that register, each memory of its own.
const OWNERS: usize = 3;
const READERS: usize = 2;
const STEPS: usize = 60;
const PAGES: usize = 8;

/// What has been read for one region.
#[derive(Default)]
struct Seen {
    count: u32,
    /// Of each event: what it covers, and its generation.
    events: Vec<(Range<u64>, u64)>,
}

impl Seen {
    /// Whether events newer than `generation` cover all of `changed`.
    fn covers(&self, changed: &Range<u64>, generation: u64) -> bool {
        let newer = || {
            self.events
                .iter()
                .filter(|(_, newest)| *newest > generation)
        };
        (changed.start..changed.end)
            .step_by(PAGE)
            .all(|page| newer().any(|(hull, _)| hull.contains(&page)))
    }
}

struct Setup {
    fixture: Fixture,
    next_cookie: AtomicU64,
    seen: Mutex<HashMap<u64, Seen>>,
    maps: [Map; OWNERS],
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

fn addresses(map: Map, pages: &Range<usize>) -> Range<u64> {
    map.at(pages.start) as u64..map.at(pages.end) as u64
}

impl Setup {
    /// Registers, changes, deregisters. Returns the count of each region.
    fn own(&self, map: Map, mut random: SmallRng) -> Vec<(u64, u32)> {
        let mut regions = Vec::<Owned>::new();
        let mut counts = Vec::new();
        for _ in 0..STEPS {
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
                _ => {
                    let pages = some_pages(&mut random);
                    self.change(map, pages, &regions, &mut random);
                }
            }
        }
        counts.extend(regions.into_iter().map(deregister));
        counts
    }

    /// G1, G2: a change is reported for each region of these that it concerns.
    fn change(&self, map: Map, pages: Range<usize>, regions: &[Owned], random: &mut SmallRng) {
        let before = self.fixture.page.load();
        if random.random() {
            map.map_over(pages.clone());
        } else {
            // Without a page there would be nothing to give up, nor to report.
            pages.clone().for_each(|page| map.store(page, 0x11));
            map.dont_need(pages.clone());
        }
        let after = self.fixture.page.load();
        let concerned =
            |region: &&Owned| pages.start < region.pages.end && region.pages.start < pages.end;
        for (nth, region) in regions.iter().filter(concerned).enumerate() {
            assert!(after > before + nth as u64, "{before}, then {after}");
            let changed = pages.start.max(region.pages.start)..pages.end.min(region.pages.end);
            let changed = addresses(map, &changed);
            while !self.has_seen(region.cookie, &changed, before) {
                thread::yield_now();
            }
        }
    }

    fn has_seen(&self, cookie: u64, changed: &Range<u64>, generation: u64) -> bool {
        let seen = self.seen.lock().unwrap();
        seen.get(&cookie)
            .is_some_and(|seen| seen.covers(changed, generation))
    }

    /// Changes the memory of all the owners, who do not know when.
    fn disturb(&self, mut random: SmallRng) {
        while !self.done.load(Ordering::Acquire) {
            let map = self.maps[random.random_range(0..OWNERS)];
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
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => 0,
                count => count.expect("read"),
            };
            let mut seen = self.seen.lock().unwrap();
            for event in &events[..count] {
                let seen = seen.entry(event.cookie).or_default();
                seen.count += 1;
                seen.events.push((event.start..event.end, event.generation));
            }
            drop(seen);
            if count == 0 {
                if done {
                    return;
                }
                self.fixture.queue.poll(Some(MOMENT)).expect("poll");
            }
        }
    }
}

/// Returns the cookie and the count.
fn deregister(mut region: Owned) -> (u64, u32) {
    (region.cookie, region.mr.destroy().expect("deregister"))
}

/// G1, G2, G4, G5: each change of a watched page is reported, once in each event
/// that was read, and deregistration returns how many those were.
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
        maps: std::array::from_fn(|_| Map::new(PAGES)),
        done: AtomicBool::new(false),
    };
    let counts: Vec<_> = within("the threads", || {
        thread::scope(|scope| {
            let owners = setup.maps.map(|map| {
                let (setup, random) = (&setup, random());
                scope.spawn(move || setup.own(map, random))
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
        let seen = seen.get(cookie).map_or(0, |seen| seen.count);
        assert_eq!(
            seen, *count,
            "events read of region {cookie}, and its count"
        );
    }
    let read: u32 = seen.values().map(|seen| seen.count).sum();
    let counted: u32 = counts.iter().map(|(_, count)| count).sum();
    assert_eq!(read, counted, "events read, and the sum of the counts");
    assert!(read > 0, "nothing was read");
    eprintln!("{} regions, {read} events", counts.len());
}

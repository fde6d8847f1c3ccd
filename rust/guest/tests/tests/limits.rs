// SPDX-License-Identifier: GPL-2.0
//! Very many regions and events, and no memory. How long it takes is printed.

use rustix::fs::MemfdFlags;
use rustix::mm::MapFlags;
use std::{
    io::Read,
    iter,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};
use uverbs_mmu_notify::{Event, Mr, MrArgs};
use uverbs_mmu_notify_tests::*;

/// `count`, or a part of it on the debug kernels, which are slow.
fn many(count: usize) -> usize {
    let is_debug = ["kmemleak", "kcsan"]
        .iter()
        .any(|file| Path::new("/sys/kernel/debug").join(file).exists());
    if is_debug { count / 50 } else { count }
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let result = run();
    eprintln!("{what}: {:?}", begin.elapsed());
    result
}

/// Makes a call at least once, and until `stop`, and prints how long the longest one took.
fn longest(what: &str, stop: &AtomicBool, call: impl Fn()) {
    let (mut longest, mut calls) = (Duration::ZERO, 0);
    loop {
        let begin = Instant::now();
        call();
        longest = longest.max(begin.elapsed());
        calls += 1;
        if stop.load(Relaxed) {
            break;
        }
    }
    eprintln!("meanwhile {what}: {calls} calls, the longest {longest:?}");
}

/// Deregisters. Each region must have had `expected` events.
#[track_caller]
fn deregister(mrs: Vec<Mr>, expected: impl Fn(usize) -> u32) {
    for (n, mut mr) in mrs.into_iter().enumerate() {
        let reported = mr.destroy().expect("deregister");
        assert_eq!(reported, expected(n), "events reported of region {n}");
    }
}

/// G1: G4: G5: of very many regions one is reported, then all of them at once. Eight readers
/// read each event once, in order.
#[test]
fn regions() {
    const READERS: usize = 8;
    let count = many(100_000);
    let fixture = Fixture::new();
    let map = Map::new(count);
    let what = format!("registering {count} pages");
    let mrs = timed(&what, || fixture.watch_each(map, 0..count));

    let one = count / 3;
    // It does not split what is mapped, which would concern the 2 MiB around.
    timed("purging one of them", || map.dont_need(one..one + 1));
    let pages = one..one + 1;
    fixture.expect(&[Record::new(map, pages, one as u64, 1, MAYBE_STALE)]);
    timed("munmap() of all", || map.unmap(0..count));
    assert_eq!(fixture.page.load(), 1 + count as u64, "generation");

    // Each has its first events before one takes the second ones.
    let begun = &Barrier::new(READERS);
    let read = |nth: usize| {
        let mut events = vec![Event::default(); 1 << nth];
        let mut all = Vec::with_capacity(count);
        let mut result = fixture.queue.read(&mut events);
        begun.wait();
        while let Ok(read) = result {
            all.extend(
                events[..read]
                    .iter()
                    .map(|event| (event.generation, event.cookie)),
            );
            result = fixture.queue.read(&mut events);
        }
        assert!(!all.is_empty(), "no event for reader {nth}");
        all
    };
    let mut all = timed("reading all", || {
        thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS)
                .map(|nth| scope.spawn(move || read(nth)))
                .collect();
            let read = readers
                .into_iter()
                .map(|reader| reader.join().expect("a reader"));
            read.inspect(|all| assert!(all.is_sorted(), "a reader's generations: {all:?}"))
                .flatten()
                .collect::<Vec<_>>()
        })
    });
    all.sort();
    let generations = all.iter().map(|event| event.0);
    assert!(generations.eq(2..2 + count as u64), "each generation once");
    all.sort_by_key(|event| event.1);
    let cookies = all.iter().map(|event| event.1);
    assert!(cookies.eq(0..count as u64), "each region once");
    timed("deregistering all", || {
        deregister(mrs, |n| 1 + u32::from(n == one))
    });
}

/// G1: G4: G5: one change of a page that very many regions have is reported for each. Prints
/// whom it delays.
#[test]
fn regions_of_one_page() {
    let count = many(10_000);
    let fixture = Fixture::new();
    let map = Map::new(3);
    let watch = |n: usize| fixture.watch(map, n % 2..2 + n / 2 % 2, n as u64);
    let mrs: Vec<_> = (0..count).map(watch).collect();
    let what = format!("munmap() of a page of {count} regions");
    let (faulted, mapped, plain) = (Map::new(1), Map::new(1), Map::new(1));
    let plain = MrArgs::new(plain.at(0), PAGE);
    let bystanders: [(&str, &(dyn Fn() + Sync)); 3] = [
        ("a page is faulted in", &|| {
            faulted.dont_need(0..1);
            faulted.store(0, 0x11);
        }),
        ("a page is mapped", &|| mapped.map_over(0..1)),
        ("a page is registered", &|| drop(reg(&fixture.pd, &plain))),
    ];
    let (stop, begun) = (&AtomicBool::new(false), &Barrier::new(4));
    thread::scope(|scope| {
        for (what, call) in bystanders {
            scope.spawn(move || {
                begun.wait();
                longest(what, stop, call);
            });
        }
        begun.wait();
        timed(&what, || map.unmap(1..2));
        stop.store(true, Relaxed);
    });
    let events = timed("reading all", || read_all(&fixture.queue));
    let page = map.at(1) as u64..map.at(2) as u64;
    assert!(events.iter().all(|event| event.range == page), "ranges");
    let cookies = events.iter().map(|event| event.cookie);
    assert!(cookies.eq(0..count as u64), "each region once");
    let mut generations: Vec<_> = events.iter().map(|event| event.generation).collect();
    generations.sort();
    assert!(
        generations.into_iter().eq(1..=count as u64),
        "each generation once"
    );
    deregister(mrs, |_| 1);
}

/// G3: G4: G8: in a memory cgroup that is full registrations fail, and changes under the
/// regions that it has are reported.
#[test]
fn memory_cgroup_is_full() {
    const REGIONS: usize = 8;
    const MORE: usize = 10_000;
    in_group(|group| {
        let fixture = Fixture::new();
        let file = memfd(REGIONS, MemfdFlags::empty());
        let map = Map::of_file(&file, REGIONS, MapFlags::SHARED);
        (0..REGIONS).for_each(|page| map.store(page, 0x11));
        let mrs = fixture.watch_each(map, 0..REGIONS);
        let args = fixture.args(Map::new(1), 0..1, 99);
        let mut more: Vec<_> = iter::repeat_with(|| None).take(MORE).collect();
        let mut events = [Event::default(); 2 * REGIONS];
        let limit = group.open("memory.max");
        let mut current = String::new();
        group
            .open("memory.current")
            .read_to_string(&mut current)
            .expect("memory.current");
        let current: usize = current.trim().parse().expect("a number");

        // Nothing may be reclaimed that this process then needs again.
        // SAFETY: It takes a number.
        let ret = unsafe { libc::mlockall(libc::MCL_CURRENT) };
        assert_eq!(ret, 0, "mlockall");
        std::fs::write("/proc/self/oom_score_adj", "-1000").expect("not to be killed");
        let reports = Reports::of("invoked oom-killer");
        let bytes = (current + (1 << 20)).to_string();
        limit
            .write_all_at(bytes.as_bytes(), 0)
            .expect("limit the cgroup");
        let mut failed = 0;
        let mut left = more.iter_mut();
        while failed < 3 {
            match try_reg(&fixture.pd, &args) {
                Ok(mr) => *left.next().expect("the cgroup is not full") = Some(mr),
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::ENOMEM), "REG_MR");
                    failed += 1;
                }
            }
        }
        map.unmap(0..REGIONS);
        let read = fixture.queue.read(&mut events);
        limit.write_all_at(b"max", 0).expect("do not limit it");
        let reports = reports.end();
        eprintln!("{reports} reports of a full cgroup");
        assert!(reports > 0, "the cgroup was not full");

        let mut cookies: Vec<_> = events[..read.expect("read")]
            .iter()
            .map(|e| e.cookie)
            .collect();
        cookies.sort();
        assert!(
            cookies.into_iter().eq(0..REGIONS as u64),
            "each region once"
        );
        deregister(mrs, |_| 1);
        drop(reg(&fixture.pd, &args));
        deregister(more.into_iter().flatten().collect(), |_| 0);
        fixture.expect_quiet(REGIONS as u64, "all others");
    });
    expect_no_regions();
}

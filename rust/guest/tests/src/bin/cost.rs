// SPDX-License-Identifier: GPL-2.0
//! What watching costs, in nanoseconds of the guest. Under QEMU's
//! `-icount shift=0,sleep=off`, with one CPU, one is one instruction. Each figure
//! is the difference of two loops that differ in one thing.

use std::time::Instant;
use uverbs_mmu_notify::{Event, Mr, MrArgs};
use uverbs_mmu_notify_tests::*;

const COUNT: usize = 256;
const PAGES: usize = 16;

/// Nanoseconds that each of `COUNT` calls took.
fn each(mut run: impl FnMut(usize)) -> f64 {
    let start = Instant::now();
    for n in 0..COUNT {
        run(n);
    }
    start.elapsed().as_nanos() as f64 / COUNT as f64
}

/// Registers `COUNT` regions of `pages` pages each; what one took.
fn register(fixture: &Fixture, map: Map, pages: usize, watched: bool) -> (Vec<Mr>, f64) {
    let mut mrs = Vec::with_capacity(COUNT);
    let cost = each(|n| {
        let args = MrArgs::new(map.at(n * pages), pages * PAGE);
        let args = match watched {
            true => args.watched(&fixture.queue, n as u64),
            false => args,
        };
        mrs.push(reg(&fixture.pd, &args));
    });
    (mrs, cost)
}

fn main() {
    let fixture = Fixture::new();
    // Once for what is only done the first time.
    for watched in [false, true] {
        drop(register(&fixture, Map::new(COUNT), 1, watched));
    }

    let (_, plain) = register(&fixture, Map::new(COUNT * PAGES), PAGES, false);
    let (_, watched) = register(&fixture, Map::new(COUNT * PAGES), PAGES, true);
    println!("REG_MR of 64 KiB                       {plain:8.0}");
    println!(
        "watching it                            {:8.0}",
        watched - plain
    );

    let unmap = |watched| {
        let map = Map::new(COUNT);
        let (mrs, _) = register(&fixture, map, 1, watched);
        (each(|n| map.unmap(n..n + 1)), mrs)
    };
    let (plain, _mrs) = unmap(false);
    let (watched, mut mrs) = unmap(true);
    println!("munmap of a page                       {plain:8.0}");
    println!(
        "an invalidation of a watch             {:8.0}",
        watched - plain
    );

    let mut events = [Event::default(); COUNT];
    let start = Instant::now();
    let read = fixture.queue.read(&mut events).expect("read");
    let cost = start.elapsed().as_nanos() as f64 / COUNT as f64;
    assert_eq!(read, COUNT, "events read");
    println!("reading an event, {COUNT} at once          {cost:8.0}");
    for mr in &mut mrs {
        assert_eq!(mr.destroy().expect("deregister"), 1, "events reported");
    }

    // What a drain costs that goes on until EAGAIN, beyond the events that it reads.
    let empty = each(|_| {
        let read = fixture.queue.read(&mut events[..16]);
        assert!(read.is_err(), "read of an empty queue");
    });
    println!("reading an empty queue, EAGAIN         {empty:8.0}");

    // The smallest drain: one event, by the read() that gets it, and by the next one.
    let mut drain = |reads| {
        let map = Map::new(COUNT);
        let (mrs, _) = register(&fixture, map, 1, true);
        let cost = each(|n| {
            map.unmap(n..n + 1);
            for _ in 0..reads {
                let _ = fixture.queue.read(&mut events[..16]);
            }
        });
        (cost, mrs)
    };
    let costs = [0, 1, 2].map(|reads| {
        let (cost, mrs) = drain(reads);
        let _ = read_all(&fixture.queue);
        drop(mrs);
        cost
    });
    println!(
        "reading one event                      {:8.0}",
        costs[1] - costs[0]
    );
    println!(
        "the same until EAGAIN                  {:8.0}",
        costs[2] - costs[0]
    );

    let looked_up = each(|_| {
        std::hint::black_box(fixture.page.load());
    });
    println!("loading the generation                 {looked_up:8.1}");
}

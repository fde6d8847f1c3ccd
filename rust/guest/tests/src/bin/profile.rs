// SPDX-License-Identifier: GPL-2.0
//! The phases of `make profile`, each between two markers that a plugin of QEMU looks
//! for, and the rows that are made of them.

use std::arch::asm;
use uverbs_mmu_notify::{Event, Mr, MrArgs};
use uverbs_mmu_notify_tests::*;

const COUNT: usize = 256;
const PAGES: usize = 16;

#[derive(Default)]
struct Profile {
    phases: usize,
}

impl Profile {
    /// Runs a phase and returns its number.
    fn phase(&mut self, mut run: impl FnMut(usize)) -> usize {
        // SAFETY: A NOP.
        unsafe { asm!(".byte 0x0f, 0x1f, 0x84, 0x00, 0x01, 0x00, 0xed, 0x5e") };
        for n in 0..COUNT {
            run(n);
        }
        // SAFETY: A NOP.
        unsafe { asm!(".byte 0x0f, 0x1f, 0x84, 0x00, 0x02, 0x00, 0xed, 0x5e") };
        self.phases += 1;
        self.phases - 1
    }
}

/// Prints a row: a phase without what another one does, divided by `COUNT`.
fn row(name: &str, phase: usize, baseline: Option<usize>) {
    let baseline = baseline.map_or("-".to_owned(), |phase| phase.to_string());
    println!("row {COUNT} {phase} {baseline} {name}");
}

fn main() {
    let mut profile = Profile::default();

    // Before the first notification FD of this process.
    let purge_all = |profile: &mut Profile| {
        let map = Map::new(COUNT);
        profile.phase(|n| map.dont_need(n..n + 1))
    };
    purge_all(&mut profile);
    let without_fd = purge_all(&mut profile);

    let fixture = Fixture::new();
    let register = |map: Map, pages: usize, watched: bool, n: usize| {
        let args = MrArgs::new(map.at(n * pages), pages * PAGE);
        reg(
            &fixture.pd,
            &match watched {
                true => args.watched(&fixture.queue, n as u64),
                false => args,
            },
        )
    };
    // Once for what is only done the first time.
    for watched in [false, true] {
        let map = Map::new(COUNT);
        drop(
            (0..COUNT)
                .map(|n| register(map, 1, watched, n))
                .collect::<Vec<_>>(),
        );
    }

    let with_fd = purge_all(&mut profile);
    row(
        "MADV_DONTNEED, added by a notification FD",
        with_fd,
        Some(without_fd),
    );
    let elsewhere = Map::new(COUNT);
    let mrs: Vec<Mr> = (0..COUNT)
        .map(|n| register(elsewhere, 1, true, n))
        .collect();
    let missed = purge_all(&mut profile);
    row(
        "MADV_DONTNEED, added by a notification FD and 256 watches elsewhere",
        missed,
        Some(without_fd),
    );
    drop(mrs);

    let phases = [false, true].map(|watched| {
        let map = Map::new(COUNT * PAGES);
        let mut mrs: Vec<Option<Mr>> = (0..COUNT).map(|_| None).collect();
        let reg = profile.phase(|n| mrs[n] = Some(register(map, PAGES, watched, n)));
        let dereg = profile.phase(|n| {
            mrs[n].as_mut().unwrap().destroy().expect("deregister");
        });
        (reg, dereg)
    });
    row("REG_MR, added by watching", phases[1].0, Some(phases[0].0));
    row(
        "MR_DESTROY, added by watching",
        phases[1].1,
        Some(phases[0].1),
    );

    let mut purge = |watched| {
        let map = Map::new(COUNT);
        let mrs: Vec<Mr> = (0..COUNT).map(|n| register(map, 1, watched, n)).collect();
        let first = profile.phase(|n| map.dont_need(n..n + 1));
        let again = profile.phase(|n| map.dont_need(n..n + 1));
        (first, again, mrs)
    };
    let plain = purge(false);
    let watched = purge(true);
    row(
        "MADV_DONTNEED, first invalidation of a watch",
        watched.0,
        Some(plain.0),
    );
    row(
        "MADV_DONTNEED, merged invalidation",
        watched.1,
        Some(plain.1),
    );

    // One phase for all events: no loop.
    let mut events = [Event::default(); COUNT];
    let drain = profile.phase(|n| {
        if n == 0 {
            assert_eq!(fixture.queue.read(&mut events).expect("read"), COUNT);
        }
    });
    row("read() of an event, 256 at once", drain, None);

    let empty = profile.phase(|_| assert!(fixture.queue.read(&mut events[..16]).is_err()));
    row("read() of an empty queue", empty, None);

    let mut one = |reads| {
        let map = Map::new(COUNT);
        let mrs: Vec<Mr> = (0..COUNT).map(|n| register(map, 1, true, n)).collect();
        let phase = profile.phase(|n| {
            map.dont_need(n..n + 1);
            if reads {
                assert_eq!(fixture.queue.read(&mut events[..16]).expect("read"), 1);
            }
        });
        let _ = read_all(&fixture.queue);
        (phase, mrs)
    };
    let (unread, read) = (one(false), one(true));
    row("read() of one event", read.0, Some(unread.0));
}

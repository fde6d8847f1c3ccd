// SPDX-License-Identifier: GPL-2.0
//! The tracepoints.

use std::fs;
use uverbs_mmu_notify_tests::*;

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: &str = "events/ib_uverbs_mmu_notify/enable";

fn set(file: &str, value: &str) {
    fs::write(format!("{TRACING}/{file}"), value).unwrap_or_else(|e| panic!("{file}: {e}"));
}

/// Turns the tracepoints off after the test, also if it fails.
struct Traced;

impl Traced {
    fn new() -> Self {
        set("trace", "");
        set(EVENTS, "1");
        Self
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        set(EVENTS, "0");
    }
}

/// The events of cookie `cookie`, in order, without task, time and queue.
fn traced(cookie: u64) -> Vec<String> {
    let trace = fs::read_to_string(format!("{TRACING}/trace")).expect("read the trace");
    let of_cookie = format!(" cookie={cookie:#x} ");
    trace
        .lines()
        .map(|line| format!("{line} "))
        .filter(|line| line.contains(&of_cookie))
        .map(|line| {
            let (_, line) = line
                .split_once(": uverbs_mmu_notify_")
                .expect("one of ours");
            let (name, rest) = line.split_once(": queue=").expect("it has a queue");
            let (_, fields) = rest.split_once(' ').expect("it has fields");
            format!("{name} {}", fields.trim())
        })
        .collect()
}

/// Interface: the whole life of a region. An invalidation that is merged into a pending event has
/// no generation.
#[test]
fn whole_life() {
    const COOKIE: u64 = 0x7abc;
    let _traced = Traced::new();
    let fixture = Fixture::new();
    let map = Map::new(4);
    let at = |page| map.at(page) as usize;
    let mut mr = fixture.watch(map, 1..3, COOKIE);
    map.dont_need(0..2);
    map.unmap(2..4);
    assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
    assert_eq!(mr.destroy().unwrap(), 1, "events reported");

    let own = format!("cookie={COOKIE:#x}");
    assert_eq!(
        traced(COOKIE),
        [
            format!("start {own} start={:#x} end={:#x}", at(1), at(3)),
            format!(
                "invalidate {own} event=CLEAR start={:#x} end={:#x} generation=1",
                at(0),
                at(2)
            ),
            format!(
                "invalidate {own} event=UNMAP start={:#x} end={:#x} generation=0",
                at(2),
                at(4)
            ),
            format!(
                "deliver {own} start={:#x} end={:#x} generation=1 reasons=0x3",
                at(1),
                at(3)
            ),
            format!("stop {own} events_reported=1"),
        ]
    );
}

/// G2: exit advances the generation before any memory is unmapped. That is then merged
/// into the pending event.
#[test]
fn exit() {
    const COOKIE: u64 = 0x7abe;
    let _traced = Traced::new();
    let child = Child::fork(|| {
        let fixture = Fixture::new();
        let mr = fixture.watch(Map::new(1), 0..1, COOKIE);
        std::mem::forget((fixture, mr));
        stop();
        0
    });
    child.wait_stopped();
    let context = child.fd("/dev/infiniband/uverbs"); // it would end the watch
    child.resume();
    assert_eq!(child.wait(), Exit::Code(0), "the child");

    let events: Vec<_> = traced(COOKIE)
        .into_iter()
        .filter_map(|line| {
            let (_, event) = line.split_once(" event=")?;
            let (event, _) = event.split_once(' ')?;
            let (_, generation) = line.split_once(" generation=")?;
            Some(format!("{event} {generation}"))
        })
        .collect();
    assert_eq!(events, ["RELEASE 1", "UNMAP 0"]);
    drop(context);
    expect_no_regions();
}

/// Interface: an invalidation during the registration has no generation yet.
#[test]
fn born_stale() {
    const COOKIE: u64 = 0x7abd;
    let _traced = Traced::new();
    let fixture = Fixture::new();
    let map = Map::untouched(1);
    assert_eq!(map.load(0), 0, "the zero page");
    let _mr = fixture.watch(map, 0..1, COOKIE);
    let seen: Vec<_> = traced(COOKIE)
        .into_iter()
        .filter(|line| line.starts_with("invalidate "))
        .collect();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(
        seen[0].contains(" event=CLEAR ") && seen[0].ends_with(" generation=0"),
        "{seen:?}"
    );
}

/// Interface: an invalidation when the FD is closed is traced without a generation.
#[test]
fn closed() {
    const COOKIE: u64 = 0x7abf;
    let _traced = Traced::new();
    let fixture = Fixture::new();
    let map = Map::new(2);
    let mut mr = fixture.watch(map, 0..2, COOKIE);
    map.unmap(0..1);
    assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
    let Fixture { queue, page, .. } = fixture;
    drop((queue, page));
    map.unmap(1..2);
    let generations: Vec<_> = traced(COOKIE)
        .into_iter()
        .filter(|line| line.starts_with("invalidate "))
        .map(|line| {
            line.split_once(" generation=")
                .expect("a generation")
                .1
                .to_owned()
        })
        .collect();
    assert_eq!(generations, ["1", "0"]);
    assert_eq!(mr.destroy().unwrap(), 1, "events reported");
}

/// Interface: the stack of an invalidation shows the call that changes the mapping.
#[test]
fn stack() {
    const COOKIE: u64 = 0x7ac0;
    const TRIGGER: &str = "events/ib_uverbs_mmu_notify/uverbs_mmu_notify_invalidate/trigger";
    let traced = Traced::new();
    set(TRIGGER, "stacktrace");
    let fixture = Fixture::new();
    let map = Map::new(1);
    let _mr = fixture.watch(map, 0..1, COOKIE);
    map.dont_need(0..1);
    set(TRIGGER, "!stacktrace");
    drop(traced);
    let trace = fs::read_to_string(format!("{TRACING}/trace")).expect("read the trace");
    let (_, stack) = trace
        .split_once(&format!(" cookie={COOKIE:#x} event=CLEAR "))
        .expect("the invalidation");
    let frames = stack.lines().skip_while(|line| !line.contains(" => "));
    let frames: Vec<_> = frames.take_while(|line| line.contains(" => ")).collect();
    assert!(
        frames.iter().any(|frame| frame.contains("madvise")),
        "the stack: {frames:?}"
    );
}

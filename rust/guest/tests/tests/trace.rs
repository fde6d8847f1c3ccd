// SPDX-License-Identifier: GPL-2.0
//! The tracepoints, read as a person would.

use std::fs;
use uverbs_mmu_notify_tests::*;

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: &str = "events/ib_uverbs_mmu_notify/enable";

fn set(file: &str, value: &str) {
    fs::write(format!("{TRACING}/{file}"), value).unwrap_or_else(|e| panic!("{file}: {e}"));
}

/// Events are off again after the test, also if it fails.
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

/// What is said of cookie `cookie`, in order, without who and when, and without
/// the pointer that tells queues apart.
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

/// A region's whole life can be followed, with the kernel's own events and
/// ranges, and what is not reported now is told apart.
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
            format!("attach {own} start={:#x} end={:#x}", at(1), at(3)),
            format!(
                "hit {own} event=CLEAR start={:#x} end={:#x} generation=1",
                at(0),
                at(2)
            ),
            format!(
                "hit {own} event=UNMAP start={:#x} end={:#x} generation=2",
                at(2),
                at(4)
            ),
            format!(
                "deliver {own} start={:#x} end={:#x} generation=2 reasons=0x3",
                at(1),
                at(3)
            ),
            format!("detach {own} events_reported=1"),
        ]
    );
}

/// G2: the end of the address space is told before any of it is unmapped.
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
            Some(event.split(' ').next()?.to_owned())
        })
        .collect();
    assert_eq!(events, ["RELEASE", "UNMAP"]);
    drop(context);
    expect_no_regions();
}

/// A hit during the registration is seen, and marked as not reported yet.
#[test]
fn born_stale() {
    const COOKIE: u64 = 0x7abd;
    let _traced = Traced::new();
    let fixture = Fixture::new();
    let map = Map::untouched(1);
    assert_eq!(map.load(0), 0, "the zero page");
    let _mr = fixture.watch(map, 0..1, COOKIE);
    let hits: Vec<_> = traced(COOKIE)
        .into_iter()
        .filter(|line| line.starts_with("hit "))
        .collect();
    assert_eq!(hits.len(), 1, "{hits:?}");
    assert!(
        hits[0].contains(" event=CLEAR ") && hits[0].ends_with(" generation=0"),
        "{hits:?}"
    );
}

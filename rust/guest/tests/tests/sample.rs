// SPDX-License-Identifier: GPL-2.0
//! The C program of Documentation/uapi.md, which build.rs compiles.

use std::process::Command;
use uverbs_mmu_notify_tests::*;

/// Interface: it sees a change, and the count is that of the events it has read.
#[test]
fn program_of_uapi_md() {
    let output = Command::new(concat!(env!("OUT_DIR"), "/sample"))
        .arg(device())
        .output()
        .expect("run the program");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let lines: Vec<_> = said.lines().collect();
    let [generation, event, count] = lines[..] else {
        panic!("three lines: {said}");
    };
    assert_eq!(generation, "generation: 0 -> 1");
    assert!(
        event.starts_with("cookie 42: ") && event.ends_with(" may be stale"),
        "{event}"
    );
    assert_eq!(count, "events reported: 1, seen: 1");
}

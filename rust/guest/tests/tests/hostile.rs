// SPDX-License-Identifier: GPL-2.0
//! Hostile input: the program `hostile`, which says what it checks, in a short run.

use std::{env, process::Command};

/// G8: Interface: wrong calls fail as they should, and the kernel writes only what it should.
#[test]
fn short_run() {
    let program = env::var_os("NEXTEST_BIN_EXE_hostile");
    let program = program.unwrap_or_else(|| env!("CARGO_BIN_EXE_hostile").into());
    // An episode of each kind, or more.
    let status = Command::new(program).arg("1200").status();
    assert!(status.expect("run hostile").success());
}

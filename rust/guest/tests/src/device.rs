// SPDX-License-Identifier: GPL-2.0
//! The RDMA device that a test is on.

use std::{
    env,
    process::{Child, Command},
};

const DEVICE: &str = "UVERBS_TEST_DEVICE";

/// The name of the device to test: `UVERBS_TEST_DEVICE`, or the soft-RoCE one.
pub fn device() -> String {
    env::var(DEVICE).unwrap_or_else(|_| "rxe0".to_owned())
}

/// [`device`] must have no region left.
#[track_caller]
pub fn expect_no_regions() {
    expect_regions(0);
}

/// [`device`] must have so many regions.
#[track_caller]
pub fn expect_regions(count: usize) {
    let shown = Command::new("rdma")
        .args(["resource", "show", &device()])
        .output()
        .expect("run rdma");
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(
        shown.contains(&format!(" mr {count} ")),
        "expected {count} MRs: {shown}"
    );
}

/// A separate device, which a test can remove.
pub struct Device(&'static str);

impl Device {
    /// Makes one with a driver, `rxe` or `siw`, and its own network device of the same
    /// name.
    pub fn new(name: &'static str, driver: &str) -> Self {
        run(&format!("ip link add {name} type dummy"));
        run(&format!("ip link set {name} up"));
        run(&format!("rdma link add {name} type {driver} netdev {name}"));
        Self(name)
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.0
    }

    /// Removes the RDMA device, but not the network device.
    pub fn remove(&self) {
        run(&self.removal());
    }

    /// Begins to remove the RDMA device, in another process.
    pub fn begin_removal(&self) -> Child {
        command(&self.removal()).spawn().expect("run rdma")
    }

    fn removal(&self) -> String {
        format!("rdma link delete {}", self.0)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        run(&format!("ip link delete {}", self.0));
    }
}

/// Runs the program src/bin/stress, which must succeed, on a device.
#[track_caller]
pub fn stress(device: &str, arguments: &[&str]) {
    // Not env!(): the archive of the tests may be elsewhere than it was built.
    let program = env::var("NEXTEST_BIN_EXE_stress").expect("cargo-nextest sets it");
    let mut command = Command::new(program);
    let status = command.args(arguments).env(DEVICE, device).status();
    assert!(status.expect("run the program").success());
}

fn command(line: &str) -> Command {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().expect("a command"));
    command.args(words);
    command
}

/// Runs a command, of words without quotes, which must succeed.
#[track_caller]
pub fn run(line: &str) {
    let status = command(line).status();
    assert!(
        status.as_ref().is_ok_and(|status| status.success()),
        "{line}: {status:?}"
    );
}

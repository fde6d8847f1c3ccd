// SPDX-License-Identifier: GPL-2.0
//! Memory cgroups.

use crate::{
    device::run,
    process::{Exit, in_child, within},
};
use std::{
    env,
    fs::{self, File},
    path::PathBuf,
    process, thread,
    time::Duration,
};

/// A memory cgroup.
pub struct Group {
    hierarchy: PathBuf,
    group: PathBuf,
}

impl Group {
    fn new() -> Self {
        let hierarchy = env::temp_dir().join(format!("cgroup-{}", process::id()));
        fs::create_dir(&hierarchy).expect("make a folder");
        run(&format!("mount -t cgroup2 none {}", hierarchy.display()));
        fs::write(hierarchy.join("cgroup.subtree_control"), "+memory").expect("enable memcg");
        let group = hierarchy.join(format!("test-{}", process::id()));
        fs::create_dir(&group).expect("make a cgroup");
        Self { hierarchy, group }
    }

    /// Moves this process, of one thread, there.
    fn enter(&self) {
        fs::write(self.group.join("cgroup.procs"), "0").expect("enter the cgroup");
    }

    /// The bytes of one kind of memory.
    fn charged(&self, kind: &str) -> usize {
        let stat = fs::read_to_string(self.group.join("memory.stat")).expect("memory.stat");
        let bytes = stat.lines().find_map(|line| {
            let (key, bytes) = line.split_once(' ')?;
            (key == kind).then(|| bytes.parse().expect("a number"))
        });
        bytes.unwrap_or_else(|| panic!("no {kind} in {stat}"))
    }

    /// Opens a file of the cgroup.
    pub fn open(&self, file: &str) -> File {
        let file = self.group.join(file);
        let opened = File::options().read(true).write(true).open(&file);
        opened.unwrap_or_else(|e| panic!("{}: {e}", file.display()))
    }

    /// `make` must add at least `expected` bytes. The statistics lag behind by two seconds,
    /// so they must first have what came before.
    pub fn adds<T>(&self, kind: &str, expected: usize, make: impl FnOnce() -> T) -> T {
        thread::sleep(Duration::from_secs(3));
        let before = self.charged(kind);
        let made = make();
        within(&format!("charging {expected} bytes of {kind}"), || {
            while self.charged(kind) < before + expected {
                thread::yield_now();
            }
        });
        made
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        fs::remove_dir(&self.group).expect("remove the cgroup");
        run(&format!("umount {}", self.hierarchy.display()));
        fs::remove_dir(&self.hierarchy).expect("remove the folder");
    }
}

/// Runs `run` in a memory cgroup of its own.
pub fn in_group(run: impl FnOnce(&Group)) {
    let group = Group::new();
    let child = in_child(|| {
        group.enter();
        run(&group);
        0
    });
    assert_eq!(child, Exit::Code(0), "the child");
}

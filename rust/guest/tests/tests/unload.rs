// SPDX-License-Identifier: GPL-2.0
//! G8: the kernel modules can be unloaded.

use std::{env, path::Path, process::Command};
use uverbs_mmu_notify::Mr;
use uverbs_mmu_notify_tests::*;

/// Under load rmmod removes the devices. But with lockdep a socket of each device holds a
/// reference to the module until the device is gone.
const REMOVE: &str = "rmmod rdma_rxe ||
    { rdma link delete rxe0 && rdma link delete gone5 && until rmmod rdma_rxe; do :; done; }";

const MODULES: [&str; 4] = ["rdma_rxe", "siw", "ib_uverbs", "ib_core"];

fn loaded(module: &str) -> bool {
    Path::new("/sys/module").join(module).exists()
}

fn unload(modules: &str) -> bool {
    let status = Command::new("rmmod").args(modules.split(' ')).status();
    status.expect("run rmmod").success()
}

/// Restores modules and devices for the next tests, also if this one fails.
struct Restore(String);

impl Drop for Restore {
    fn drop(&mut self) {
        run(&format!("modprobe -a -d {} ib_uverbs rdma_rxe siw", self.0));
        for (device, driver, network) in [("rxe0", "rxe", "veth0"), ("siw0", "siw", "veth1")] {
            if !Path::new("/sys/class/infiniband").join(device).exists() {
                run(&format!(
                    "rdma link add {device} type {driver} netdev {network}"
                ));
            }
        }
    }
}

/// A watched region with a delivered and a pending event.
fn used() -> (Fixture, Map, Mr) {
    let fixture = Fixture::new();
    let map = Map::new(3);
    let mr = fixture.watch(map, 0..3, 7);
    map.unmap(0..1);
    assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
    map.unmap(1..2);
    (fixture, map, mr)
}

/// G8: the modules can be unloaded as soon as everything is closed, also by processes that were
/// at work when the device went, but not while a queue is open. They can be loaded again.
#[test]
fn modules_are_unloaded() {
    let restore = Restore(env::var("MODULES").expect("MODULES, which the guest sets"));
    assert!(loaded("ib_uverbs"), "RDMA must be modules");

    let (fixture, map, mr) = used();
    let Fixture {
        context,
        pd,
        queue,
        page,
    } = fixture;
    drop((mr, page, pd, context));
    let device = Device::new("gone5", "rxe");
    stress(device.name(), &["removal", "sh", "-c", REMOVE]);
    drop(device);
    assert!(unload("siw"), "unload siw");
    assert!(
        !unload("ib_uverbs"),
        "ib_uverbs was unloaded under an open queue"
    );
    expect_closed(&queue);
    map.unmap(2..3);
    drop(queue);

    // There if a test has used it.
    if loaded("mmu_notify_test") {
        assert!(unload("mmu_notify_test"), "unload the tests' module");
    }
    // The rest is what they need. The last of it needs all others to be gone.
    let modules = format!(
        "modprobe -r -a -d {} ib_uverbs siw rdma_rxe ib_core",
        restore.0
    );
    run(&modules);
    for module in MODULES {
        assert!(!loaded(module), "{module} is still loaded");
    }
    map.map_over(0..3);

    drop(restore);
    let (fixture, map, _mr) = used();
    map.unmap(2..3);
    assert_eq!(read_all(&fixture.queue).len(), 1, "events read");
}

// SPDX-License-Identifier: GPL-2.0
//! G8: removal of the device. soft-RoCE removes it at once, while files are open; drivers
//! without that ability, such as soft-iWARP, wait for the last file and mapping.

use rustix::io::Errno;
use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    process, thread,
};
use uverbs_mmu_notify::{Request, sys::uapi::*};
use uverbs_mmu_notify_tests::*;

/// G5: G8: removal drops pending events and advances the generation once. The counter page
/// stays mapped, and deregistration returns the count.
#[test]
fn ends_delivery() {
    let device = Device::new("gone0", "rxe");
    let fixture = Fixture::on(device.name());
    let map = Map::new(2);
    let mut mr = fixture.watch(map, 0..2, 1);
    map.unmap(0..1);
    fixture.expect(&[Record::new(map, 0..1, 1, 1, UNMAPPED)]);
    map.unmap(1..2);
    assert_eq!(fixture.page.load(), 2, "generation before the removal");

    device.remove();
    assert_eq!(fixture.page.load(), 3, "generation after the removal");
    expect_closed(&fixture.queue);
    assert_eq!(mr.destroy().expect("deregister"), 1, "events reported");
    assert_eq!(fixture.page.load(), 3, "generation at the end");
}

/// G8: REG_MR refuses the FD of an object that was destroyed with its device. The kernel
/// used to crash.
#[test]
fn fd_is_refused() {
    let device = Device::new("gone1", "rxe");
    let fixture = Fixture::on(device.name());
    device.remove();
    let result = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR)
        .object(
            UVERBS_ATTR_REG_MR_NOTIFY_FD,
            i64::from(fixture.queue.as_fd().as_raw_fd()),
        )
        .call(&*fixture.context, fixture.context.driver_id());
    expect_errno(result, Errno::IO, "REG_MR");
}

/// Waits until a removal waits for the users of the device.
#[track_caller]
fn expect_held(removal: &mut process::Child, by: &str) {
    let stack = format!("/proc/{}/stack", removal.id());
    loop {
        let ended = removal.try_wait().expect("wait for rdma");
        assert!(ended.is_none(), "removed in spite of {by}: {ended:?}");
        if fs::read_to_string(&stack).is_ok_and(|stack| stack.contains("ib_uverbs_remove_one")) {
            return;
        }
        thread::yield_now();
    }
}

/// G8: a device of a driver that cannot be removed while in use stays until the last of
/// context, FD and mapping is closed, and events are reported until then.
#[test]
fn waits_for_the_last_file_and_mapping() {
    let device = Device::new("held0", "siw");
    let fixture = Fixture::on(device.name());
    let map = Map::new(2);
    let mut mr = fixture.watch(map, 0..2, 1);
    let mut removal = device.begin_removal();
    expect_held(&mut removal, "all of it");

    map.unmap(0..1);
    fixture.expect(&[Record::new(map, 0..1, 1, 1, UNMAPPED)]);
    map.unmap(1..2);
    assert_eq!(mr.destroy().expect("deregister"), 1, "events reported");

    let Fixture {
        context,
        pd,
        queue,
        page,
    } = fixture;
    drop((mr, pd, context));
    assert_eq!(page.load(), 3, "generation after the end of the context");
    expect_held(&mut removal, "FD and mapping");
    drop(queue);
    expect_held(&mut removal, "the mapping");
    assert_eq!(page.load(), 3, "generation of a mapping alone");
    drop(page);
    let status = within("the removal", || removal.wait()).expect("wait for rdma");
    assert!(status.success(), "rdma link delete: {status}");
}

/// G1: G5: G6: G8: the device is removed while processes do all that they can at random. Each
/// gets EIO, and deregistration returns the counts.
#[test]
fn removed_under_load() {
    let device = Device::new("gone2", "rxe");
    stress(
        device.name(),
        &["removal", "rdma", "link", "delete", device.name()],
    );
}

/// G1: G5: G6: G8: the same for the network device, which takes the RDMA device with it. Both
/// can be made again.
#[test]
fn network_removed_under_load() {
    let make = || {
        run("ip link add gone3 type dummy");
        run("ip link set gone3 up");
        run("rdma link add gone3 type rxe netdev gone3");
    };
    let expect_removed = || {
        within("the end of the RDMA device", || {
            while Path::new("/sys/class/infiniband/gone3").exists() {
                thread::yield_now();
            }
        });
    };
    make();
    stress("gone3", &["removal", "ip", "link", "delete", "gone3"]);
    expect_removed();
    make();
    drop(Fixture::on("gone3"));
    run("ip link delete gone3");
    expect_removed();
}

/// G6: G8: a device that waits for its users is removed while they are at work, and their
/// context is closed.
#[test]
fn closed_under_load() {
    let device = Device::new("held1", "siw");
    let load = Load::new(device.name());
    let mut removal = device.begin_removal();
    expect_held(&mut removal, "the load");
    load.disconnect();
    load.join();
    let status = within("the removal", || removal.wait()).expect("wait for rdma");
    assert!(status.success(), "rdma link delete: {status}");
}

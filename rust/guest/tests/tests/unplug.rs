// SPDX-License-Identifier: GPL-2.0
//! G8: the device goes away. soft-RoCE lets it go at once, while files are open.

use rustix::{
    event::{PollFlags, Timespec},
    io::Errno,
};
use std::{
    os::fd::{AsFd, AsRawFd},
    process::Command,
};
use uverbs_mmu_notify::{Event, Request, sys::uapi::*};
use uverbs_mmu_notify_tests::*;

/// A soft-RoCE device that can be removed.
struct Device(&'static str);

impl Device {
    fn new(name: &'static str) -> Self {
        run(&format!("ip link add {name} type dummy"));
        run(&format!("ip link set {name} up"));
        run(&format!("rdma link add {name} type rxe netdev {name}"));
        Self(name)
    }

    /// Removes the RDMA device, but not the network device.
    fn remove(&self) {
        run(&format!("rdma link delete {}", self.0));
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        run(&format!("ip link delete {}", self.0));
    }
}

fn run(command: &str) {
    let words: Vec<_> = command.split(' ').collect();
    let status = Command::new(words[0]).args(&words[1..]).status();
    assert!(
        status.as_ref().is_ok_and(|status| status.success()),
        "{command}: {status:?}"
    );
}

/// G8, and read() and poll() of the interface: what waits to be read is dropped,
/// the counter changes once and stays mapped, deregistration still returns what
/// was delivered.
#[test]
fn ends_delivery() {
    const NOW: Option<Timespec> = Some(Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    });
    let device = Device::new("gone0");
    let fixture = Fixture::on(device.0);
    let map = Map::new(2);
    let mut mr = fixture.watch(map, 0..2, 1);
    map.unmap(0..1);
    fixture.expect(&[Record::new(map, 0..1, 1, 1, UNMAPPED)]);
    map.unmap(1..2);
    assert_eq!(fixture.page.load(), 2, "generation before the removal");

    device.remove();
    assert_eq!(fixture.page.load(), 3, "generation after the removal");
    let mut events = [Event::default(); 2];
    expect_errno(fixture.queue.read(&mut events), Errno::IO, "read");
    let ready = fixture.queue.poll(NOW).expect("poll");
    assert!(ready.contains(PollFlags::ERR), "poll: {ready:?}");
    assert_eq!(mr.destroy().expect("deregister"), 1, "events reported");
    assert_eq!(fixture.page.load(), 3, "generation at the end");
}

/// The stand-alone fix of the look-up: naming the file of an object that went
/// away with its device is refused. The kernel used to crash.
#[test]
fn fd_is_refused() {
    let device = Device::new("gone1");
    let fixture = Fixture::on(device.0);
    device.remove();
    let result = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR)
        .object(
            UVERBS_ATTR_REG_MR_NOTIFY_FD,
            i64::from(fixture.queue.as_fd().as_raw_fd()),
        )
        .call(&*fixture.context, fixture.context.driver_id());
    expect_errno(result, Errno::IO, "REG_MR");
}

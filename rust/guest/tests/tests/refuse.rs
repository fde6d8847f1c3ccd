// SPDX-License-Identifier: GPL-2.0
//! Registrations that are refused, and fail, leave nothing.

use rustix::io::{Errno, dup};
use std::{
    fs::File,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
};
use uverbs_mmu_notify::{MrArgs, Request, sys::uapi::*, sys::verbs::*};
use uverbs_mmu_notify_tests::*;

/// A map, and what watches it as it should be.
fn fixture() -> (Fixture, Map, MrArgs) {
    let (fixture, map) = (Fixture::new(), Map::new(2));
    let args = fixture.args(map, 0..2, 7);
    (fixture, map, args)
}

/// REG_MR of `args` must fail with `errno`, and leave nothing.
#[track_caller]
fn refused(fixture: &Fixture, args: &MrArgs, errno: Errno, what: &str) {
    let before = fixture.page.load();
    expect_errno(try_reg(&fixture.pd, args), errno, what);
    fixture.expect_quiet_since(before, what);
}

/// The same with an FD that is not the queue's.
#[track_caller]
fn refused_fd(fd: i64, errno: Errno, what: &str) {
    let (fixture, _, args) = fixture();
    let notify_fd = Some(fd);
    refused(&fixture, &MrArgs { notify_fd, ..args }, errno, what);
}

/// Interface: FD and cookie come together.
#[test]
fn one_attribute_without_the_other() {
    let (fixture, _, args) = fixture();
    let no_fd = MrArgs {
        notify_fd: None,
        ..args
    };
    refused(&fixture, &no_fd, Errno::INVAL, "a cookie without an FD");
    let no_cookie = MrArgs {
        cookie: None,
        ..args
    };
    refused(&fixture, &no_cookie, Errno::INVAL, "an FD without a cookie");
}

/// Interface: the queue must be of the same context.
#[test]
fn fd_of_another_context() {
    let other = Fixture::new();
    let fd = other.queue.as_fd().as_raw_fd().into();
    refused_fd(fd, Errno::BADF, "the queue of another context");
    other.expect_quiet_since(0, "the refused registration");
}

/// Interface: the FD must be a queue.
#[test]
fn fd_of_another_type() {
    let other = Fixture::new();
    let file = File::open("/dev/null").unwrap();
    refused_fd(file.as_raw_fd().into(), Errno::BADF, "/dev/null");
    let fd = other.context.as_fd().as_raw_fd().into();
    refused_fd(fd, Errno::BADF, "a context");

    let (fixture, _, args) = fixture();
    // SAFETY: The context is open.
    let channel = unsafe { ibv_create_comp_channel(fixture.context.as_ptr()) };
    assert!(!channel.is_null(), "ibv_create_comp_channel");
    // SAFETY: It is valid.
    let notify_fd = Some(unsafe { (*channel).fd }.into());
    let args = MrArgs { notify_fd, ..args };
    refused(
        &fixture,
        &args,
        Errno::BADF,
        "a completion channel of the context",
    );
    // SAFETY: It is valid, and not used again.
    assert_eq!(unsafe { ibv_destroy_comp_channel(channel) }, 0);
}

/// Interface: the FD must be open.
#[test]
fn fd_that_is_not_open() {
    let closed = {
        let fd = dup(File::open("/dev/null").unwrap()).unwrap();
        fd.as_raw_fd() + 100
    };
    refused_fd(closed.into(), Errno::BADF, "a closed FD");
    refused_fd(-1, Errno::BADF, "-1");
    refused_fd(1 << 32, Errno::INVAL, "a number that is no FD");
}

/// Interface: no bytes, no watch.
#[test]
fn length_of_zero() {
    let (fixture, _, args) = fixture();
    let args = MrArgs { length: 0, ..args };
    refused(&fixture, &args, Errno::INVAL, "a length of 0");
}

/// Interface: the range must not wrap around, nor its last page.
#[test]
fn wrap_around() {
    let (fixture, _, args) = fixture();
    let page = PAGE as u64;
    for (addr, length) in [
        (args.addr, u64::MAX),
        (args.addr, args.addr.wrapping_neg()),
        (args.addr, args.addr.wrapping_neg() - 1),
        (page.wrapping_neg(), page),
        (page.wrapping_neg(), page - 1),
        (page.wrapping_neg(), 2 * page),
    ] {
        let args = MrArgs {
            addr,
            length,
            ..args
        };
        let what = format!("{length:#x} bytes at {addr:#x}");
        refused(&fixture, &args, Errno::INVAL, &what);
    }
}

/// Interface: what follows the mapping by itself is not watched; the device can
/// do it unwatched.
#[test]
fn on_demand_paging() {
    let (fixture, map, args) = fixture();
    let access = args.access | IBV_ACCESS_ON_DEMAND;
    let plain = MrArgs {
        access,
        ..MrArgs::new(map.at(0), PAGE)
    };
    drop(reg(&fixture.pd, &plain));
    refused(
        &fixture,
        &MrArgs { access, ..args },
        Errno::OPNOTSUPP,
        "ODP",
    );
}

/// Interface: access flags are checked as for plain regions.
#[test]
fn unknown_access_flags() {
    let (fixture, _, args) = fixture();
    for access in [
        1 << 31,
        IBV_ACCESS_LOCAL_WRITE | 1 << 10,
        IBV_ACCESS_REMOTE_WRITE,
    ] {
        let args = MrArgs { access, ..args };
        refused(
            &fixture,
            &args,
            Errno::INVAL,
            &format!("access {access:#x}"),
        );
    }
}

/// G3: a registration that the driver fails, after the watch began, delivers
/// nothing, and what was its range is not watched.
#[test]
fn memory_that_cannot_be_pinned() {
    let (fixture, map, args) = fixture();
    map.unmap(1..2);
    refused(&fixture, &args, Errno::FAULT, "a range with a hole");
    let before = fixture.page.load();
    map.unmap(0..1);
    fixture.expect_quiet_since(before, "the munmap of what was not registered");
}

/// REG_MR of `args`, with the keys to the address `keys`, plus `change`.
fn request<'a>(
    fixture: &Fixture,
    args: &MrArgs,
    keys: *mut u8,
    change: impl FnOnce(Request<'a>) -> Request<'a>,
) -> std::io::Result<u32> {
    let output = |id: u32| {
        let mut attr = ib_uverbs_attr {
            attr_id: id as u16,
            len: 4,
            flags: UVERBS_ATTR_F_MANDATORY as u16,
            ..Default::default()
        };
        attr.__bindgen_anon_1.data = keys as u64;
        attr
    };
    let request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR)
        .object(UVERBS_ATTR_REG_MR_HANDLE, 0)
        .object(UVERBS_ATTR_REG_MR_PD_HANDLE, fixture.pd.handle().into())
        .input(UVERBS_ATTR_REG_MR_IOVA, args.addr)
        .input(UVERBS_ATTR_REG_MR_ADDR, args.addr)
        .input(UVERBS_ATTR_REG_MR_LENGTH, args.length)
        .input(UVERBS_ATTR_REG_MR_ACCESS_FLAGS, args.access.into());
    // SAFETY: The tests pass only addresses of maps.
    let request = unsafe {
        request
            .raw(output(UVERBS_ATTR_REG_MR_RESP_LKEY))
            .raw(output(UVERBS_ATTR_REG_MR_RESP_RKEY))
    };
    let mut request = change(request);
    fixture.context.call(&mut request)?;
    Ok(request.data(UVERBS_ATTR_REG_MR_HANDLE).unwrap() as u32)
}

fn watched<'a>(args: &MrArgs) -> impl FnOnce(Request<'a>) -> Request<'a> + use<'a> {
    let (fd, cookie) = (args.notify_fd.unwrap(), args.cookie.unwrap());
    move |request| {
        request
            .object(UVERBS_ATTR_REG_MR_NOTIFY_FD, fd)
            .input(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, cookie)
    }
}

/// G3: a registration whose keys cannot be copied out, after the region was
/// made, delivers nothing.
#[test]
fn response_faults() {
    let (fixture, map, args) = fixture();
    let keys = Map::new(1);
    // The registration must be born stale, if it is born.
    let untouched = Map::untouched(2);
    let _ = untouched.load(0);
    let stale = MrArgs {
        addr: untouched.at(0) as u64,
        ..args
    };
    keys.unmap(0..1);
    let before = fixture.page.load();
    for args in [args, stale] {
        let reg = request(&fixture, &args, keys.at(0), watched(&args));
        expect_errno(reg, Errno::FAULT, "keys to an unmapped page");
    }
    map.unmap(0..2);
    untouched.unmap(0..2);
    fixture.expect_quiet_since(before, "the failed registrations");
}

/// Interface: an attribute that the kernel does not know is refused if it is
/// mandatory, and else ignored.
#[test]
fn unknown_attribute() {
    const UNKNOWN: u32 = 31;
    let (fixture, map, args) = fixture();
    let keys = Map::new(1);
    let before = fixture.page.load();
    let reg = request(&fixture, &args, keys.at(0), |request| {
        watched(&args)(request).input(UNKNOWN, 0)
    });
    expect_errno(reg, Errno::PROTONOSUPPORT, "a mandatory unknown attribute");
    map.unmap(0..1);
    fixture.expect_quiet_since(before, "the refused registration");

    let args = fixture.args(map, 1..2, 7);
    let optional = ib_uverbs_attr {
        attr_id: UNKNOWN as u16,
        ..Default::default()
    };
    request(&fixture, &args, keys.at(0), |request| {
        // SAFETY: It has no pointer.
        unsafe { watched(&args)(request).raw(optional) }
    })
    .expect("register with an optional unknown attribute");
    map.unmap(1..2);
    fixture.expect(&[Record::new(map, 1..2, 7, before + 1, UNMAPPED)]);
}

/// Interface: the attributes have their exact length, and nothing reserved.
#[test]
fn malformed_attributes() {
    let (fixture, _, args) = fixture();
    let keys = Map::new(1);
    let (fd, cookie) = (args.notify_fd.unwrap(), args.cookie.unwrap());
    let attr = |id: u32, len, reserved, data: u64| {
        let mut attr = ib_uverbs_attr {
            attr_id: id as u16,
            len,
            flags: UVERBS_ATTR_F_MANDATORY as u16,
            ..Default::default()
        };
        attr.attr_data.reserved = reserved;
        attr.__bindgen_anon_1.data = data;
        attr
    };
    let fd_attr = |len, reserved| attr(UVERBS_ATTR_REG_MR_NOTIFY_FD, len, reserved, fd as u64);
    let cookie_attr = |len, reserved| {
        // Longer than eight bytes it is a pointer.
        let data = if len > 8 { keys.at(0) as u64 } else { cookie };
        attr(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, len, reserved, data)
    };
    let call = |attrs: &[ib_uverbs_attr]| {
        request(&fixture, &args, keys.at(0), |request| {
            // SAFETY: The only pointer is to sixteen bytes of `keys`.
            attrs
                .iter()
                .fold(request, |request, attr| unsafe { request.raw(*attr) })
        })
    };
    for (what, attrs) in [
        ("an FD of 8 bytes", [fd_attr(8, 0), cookie_attr(8, 0)]),
        (
            "an FD with reserved bits",
            [fd_attr(0, 1), cookie_attr(8, 0)],
        ),
        ("a cookie of 4 bytes", [fd_attr(0, 0), cookie_attr(4, 0)]),
        ("a cookie of 16 bytes", [fd_attr(0, 0), cookie_attr(16, 0)]),
        (
            "a cookie with reserved bits",
            [fd_attr(0, 0), cookie_attr(8, 1)],
        ),
        ("two FDs", [fd_attr(0, 0), fd_attr(0, 0)]),
    ] {
        expect_errno(call(&attrs), Errno::INVAL, what);
    }
    call(&[fd_attr(0, 0), cookie_attr(8, 0)]).expect("well-formed attributes");
}

/// Interface, G8: after refusals of every kind the queue watches as before.
#[test]
fn refusals_do_no_harm() {
    let (fixture, map, args) = fixture();
    let hit = |pages: Range<usize>| {
        let before = fixture.page.load();
        map.unmap(pages.clone());
        fixture.expect(&[Record::new(map, pages, 7, before + 1, UNMAPPED)]);
    };
    let _mr = reg(&fixture.pd, &args);
    for _ in 0..50 {
        expect_errno(
            try_reg(&fixture.pd, &MrArgs { length: 0, ..args }),
            Errno::INVAL,
            "length 0",
        );
        expect_errno(
            try_reg(&fixture.pd, &MrArgs { addr: 0, ..args }),
            Errno::FAULT,
            "address 0",
        );
    }
    hit(0..1);
    hit(1..2);
}

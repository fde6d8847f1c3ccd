// SPDX-License-Identifier: GPL-2.0
//! A kernel without the series' option behaves as one without the series. Built with the
//! feature `off` only, and run on both kernels.

use rustix::io::{Errno, write};
use uverbs_mmu_notify::{Context, MrArgs, Request, sys::uapi::*, wc_status_str};
use uverbs_mmu_notify_tests::*;

/// Interface: no device sets the core-support bit.
#[test]
fn core_support() {
    for name in Context::devices().unwrap() {
        let context = Context::open(&name).unwrap();
        let bits = context.core_support().unwrap();
        assert_ne!(
            bits & u64::from(IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS),
            0,
            "bits of {name}: {bits:#b}"
        );
        assert!(!context.mmu_notify_supported().unwrap(), "{name}");
    }
}

/// Interface: the object does not exist.
#[test]
fn object() {
    let pd = open();
    let id = UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE;
    for method in [UVERBS_METHOD_MMU_NOTIFY_ALLOC, u32::from(u16::MAX)] {
        let mut request = Request::new(UVERBS_OBJECT_MMU_NOTIFY, method).object(id, 0);
        let made = pd.context().call(&mut request);
        expect_errno(made, Errno::PROTONOSUPPORT, "MMU_NOTIFY_ALLOC");
    }
}

/// Interface: REG_MR with the attributes, marked mandatory, fails and registers nothing.
#[test]
fn mandatory_attributes() {
    let pd = open();
    let map = Map::new(1);
    let args = MrArgs::new(map.at(0), PAGE);
    for (notify_fd, cookie) in [(Some(-1), Some(7)), (Some(-1), None), (None, Some(7))] {
        let args = MrArgs {
            notify_fd,
            cookie,
            ..args
        };
        let what = format!("{args:x?}");
        expect_errno(try_reg(&pd, &args), Errno::PROTONOSUPPORT, &what);
    }
    expect_no_regions();
}

/// Interface: REG_MR ignores the attributes, whatever their value, if they are not marked
/// mandatory, and registers a plain region.
#[test]
fn optional_attributes() {
    let pd = open();
    let map = Map::new(1);
    let args = MrArgs::new(map.at(0), PAGE);
    let (mut lkey, mut rkey) = (0_u32, 0_u32);
    let mut request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR)
        .object(UVERBS_ATTR_REG_MR_HANDLE, 0)
        .object(UVERBS_ATTR_REG_MR_PD_HANDLE, pd.handle().into())
        .input(UVERBS_ATTR_REG_MR_IOVA, args.addr)
        .input(UVERBS_ATTR_REG_MR_ADDR, args.addr)
        .input(UVERBS_ATTR_REG_MR_LENGTH, args.length)
        .input(UVERBS_ATTR_REG_MR_ACCESS_FLAGS, args.access.into())
        .output(UVERBS_ATTR_REG_MR_RESP_LKEY, &mut lkey)
        .output(UVERBS_ATTR_REG_MR_RESP_RKEY, &mut rkey);
    for (id, len) in [
        (UVERBS_ATTR_REG_MR_NOTIFY_FD, 0),
        (UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, 3),
    ] {
        let attr = ib_uverbs_attr {
            attr_id: id as u16,
            len,
            ..Default::default()
        };
        // SAFETY: It has no pointer.
        request = unsafe { request.raw(attr) };
    }
    pd.context().call(&mut request).expect("REG_MR");
    let handle = request.data(UVERBS_ATTR_REG_MR_HANDLE).unwrap();

    map.unmap(0..1);
    let mut reported = 4711_u32;
    let destroy = || {
        Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY)
            .object(UVERBS_ATTR_DESTROY_MR_HANDLE, handle as i64)
    };
    let id = UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED;
    let marked = pd.context().call(&mut destroy().output(id, &mut reported));
    expect_errno(marked, Errno::PROTONOSUPPORT, "MR_DESTROY with the output");
    pd.context()
        .call(&mut destroy().optional_output(id, &mut reported))
        .expect("MR_DESTROY with the output, unmarked");
    assert_eq!(reported, 4711, "what no kernel wrote");
    expect_no_regions();
}

/// Interface: neither form has the extended commands of the series.
#[test]
fn commands() {
    let pd = open();
    for number in 1..=3 {
        let command = (IB_USER_VERBS_EX_CMD_MODIFY_CQ + number) | IB_USER_VERBS_CMD_FLAG_EXTENDED;
        let what = format!("command {command:#x}");
        // The header, the extended header, and room for any input.
        let mut buffer = [0; 8 + 16 + 48];
        buffer[..4].copy_from_slice(&command.to_ne_bytes());
        buffer[4] = 6;
        let written = write(pd.context(), &buffer);
        expect_errno(written.map_err(Into::into), Errno::OPNOTSUPP, &what);

        let mut request = Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INVOKE_WRITE)
            .input(UVERBS_ATTR_WRITE_CMD, command.into())
            .input(UVERBS_ATTR_CORE_IN, 0);
        expect_errno(pd.context().call(&mut request), Errno::OPNOTSUPP, &what);
    }
}

/// Interface: plain regions work.
#[test]
fn plain_region() {
    let pd = open();
    let peer = Peer::new(&pd);
    let map = Map::new(1);
    let mr = reg_plain(&pd, &MrArgs::new(map.at(0), PAGE));
    let status = wc_status_str(peer.write(map.at(0), mr.rkey(), 0x22));
    assert_eq!((status, map.load(0)), ("success", 0x22), "an RDMA write");
    mr.destroy().expect("ibv_dereg_mr");
}

// SPDX-License-Identifier: GPL-2.0
//! Calls that need methods which no software driver has. The tests' module lends them to
//! the device.

use rustix::io::Errno;
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};
use uverbs_mmu_notify::{Request, sys::uapi::*};
use uverbs_mmu_notify_tests::*;

/// Interface: QUERY_CONTEXT returns the support bit, and the others that GET_CONTEXT
/// returns.
#[test]
fn query_context() {
    let pd = open();
    let context = pd.context();
    // By GET_CONTEXT, as the method is missing.
    let expected = context.core_support().expect("GET_CONTEXT");
    let _methods = Methods::new(&device());
    let mut bits = 0;
    Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_QUERY_CONTEXT)
        .output(UVERBS_ATTR_QUERY_CONTEXT_CORE_SUPPORT, &mut bits)
        .call(context, context.driver_id())
        .expect("QUERY_CONTEXT");
    assert_eq!(bits, expected, "bits of both methods");
    assert!(context.mmu_notify_supported().unwrap(), "{bits:#b}");
}

/// Registers a page of a dma-buf by REG_MR, watched or not. The FD is not looked at before
/// the driver does.
fn reg_dmabuf(fixture: &Fixture, watched: bool) -> io::Result<()> {
    let (mut lkey, mut rkey) = (0_u32, 0_u32);
    let mut request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR)
        .object(UVERBS_ATTR_REG_MR_HANDLE, 0)
        .object(UVERBS_ATTR_REG_MR_PD_HANDLE, fixture.pd.handle().into())
        .input(UVERBS_ATTR_REG_MR_IOVA, 0)
        .input(UVERBS_ATTR_REG_MR_LENGTH, PAGE as u64)
        .input(
            UVERBS_ATTR_REG_MR_ACCESS_FLAGS,
            IB_UVERBS_ACCESS_LOCAL_WRITE.into(),
        )
        .object(UVERBS_ATTR_REG_MR_FD, 0)
        .input(UVERBS_ATTR_REG_MR_FD_OFFSET, 0)
        .output(UVERBS_ATTR_REG_MR_RESP_LKEY, &mut lkey)
        .output(UVERBS_ATTR_REG_MR_RESP_RKEY, &mut rkey);
    if watched {
        request = notify(request, fixture);
    }
    fixture.context.call(&mut request)
}

/// Adds the two attributes.
fn notify<'a>(request: Request<'a>, fixture: &Fixture) -> Request<'a> {
    let fd = fixture.queue.as_fd().as_raw_fd();
    request
        .object(UVERBS_ATTR_REG_MR_NOTIFY_FD, fd.into())
        .input(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, 7)
}

/// G3: REG_MR refuses to watch a dma-buf, and does not ask the driver.
#[test]
fn reg_mr_of_a_dmabuf() {
    let fixture = Fixture::new();
    let _methods = Methods::new(&device());
    let watches = Watches::new();
    let plain = reg_dmabuf(&fixture, false);
    expect_errno(plain, Errno::NODATA, "REG_MR of a dma-buf, by the driver");
    let watched = reg_dmabuf(&fixture, true);
    expect_errno(watched, Errno::OPNOTSUPP, "REG_MR of a dma-buf, watched");
    watches.expect_stopped(0);
    fixture.expect_quiet(0, "registrations that failed");
}

/// Interface: REG_DMABUF_MR does not have the attributes.
#[test]
fn reg_dmabuf_mr() {
    let fixture = Fixture::new();
    let _methods = Methods::new(&device());
    let (mut lkey, mut rkey) = (0_u32, 0_u32);
    let mut call = |watched| {
        let fd = ib_uverbs_attr {
            attr_id: UVERBS_ATTR_REG_DMABUF_MR_FD as u16,
            len: 4,
            flags: UVERBS_ATTR_F_MANDATORY as u16,
            ..Default::default()
        };
        let request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_DMABUF_MR)
            .object(UVERBS_ATTR_REG_DMABUF_MR_HANDLE, 0)
            .object(
                UVERBS_ATTR_REG_DMABUF_MR_PD_HANDLE,
                fixture.pd.handle().into(),
            )
            .input(UVERBS_ATTR_REG_DMABUF_MR_OFFSET, 0)
            .input(UVERBS_ATTR_REG_DMABUF_MR_LENGTH, PAGE as u64)
            .input(UVERBS_ATTR_REG_DMABUF_MR_IOVA, 0)
            .input(
                UVERBS_ATTR_REG_DMABUF_MR_ACCESS_FLAGS,
                IB_UVERBS_ACCESS_LOCAL_WRITE.into(),
            )
            .output(UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY, &mut lkey)
            .output(UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY, &mut rkey);
        // SAFETY: Four bytes are in the attribute itself.
        let mut request = unsafe { request.raw(fd) };
        if watched {
            request = notify(request, &fixture);
        }
        fixture.context.call(&mut request)
    };
    expect_errno(call(false), Errno::NODATA, "REG_DMABUF_MR, by the driver");
    let errno = Errno::PROTONOSUPPORT;
    expect_errno(call(true), errno, "REG_DMABUF_MR, watched");
}

// SPDX-License-Identifier: GPL-2.0
//! Calls that need methods which no software driver has. The tests' module lends them to
//! the device, or has a device with them.

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

/// Adds an input of four bytes, which are 0.
fn zero(request: Request<'_>, id: u32) -> Request<'_> {
    let attr = ib_uverbs_attr {
        attr_id: id as u16,
        len: 4,
        flags: UVERBS_ATTR_F_MANDATORY as u16,
        ..Default::default()
    };
    // SAFETY: Four bytes are in the attribute itself.
    unsafe { request.raw(attr) }
}

/// A call of REG_DMABUF_MR. The FD is not looked at before the driver does.
fn dmabuf_mr(pd: u32, iova: u64, length: u64, [lkey, rkey]: &mut [u32; 2]) -> Request<'_> {
    let request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_DMABUF_MR)
        .object(UVERBS_ATTR_REG_DMABUF_MR_HANDLE, 0)
        .object(UVERBS_ATTR_REG_DMABUF_MR_PD_HANDLE, pd.into())
        .input(UVERBS_ATTR_REG_DMABUF_MR_OFFSET, 0)
        .input(UVERBS_ATTR_REG_DMABUF_MR_LENGTH, length)
        .input(UVERBS_ATTR_REG_DMABUF_MR_IOVA, iova)
        .input(
            UVERBS_ATTR_REG_DMABUF_MR_ACCESS_FLAGS,
            IB_UVERBS_ACCESS_LOCAL_WRITE.into(),
        )
        .output(UVERBS_ATTR_REG_DMABUF_MR_RESP_LKEY, lkey)
        .output(UVERBS_ATTR_REG_DMABUF_MR_RESP_RKEY, rkey);
    zero(request, UVERBS_ATTR_REG_DMABUF_MR_FD)
}

/// Interface: REG_DMABUF_MR does not have the attributes.
#[test]
fn reg_dmabuf_mr() {
    let fixture = Fixture::new();
    let _methods = Methods::new(&device());
    let mut keys = [0; 2];
    let mut call = |watched| {
        let mut request = dmabuf_mr(fixture.pd.handle(), 0, PAGE as u64, &mut keys);
        if watched {
            request = notify(request, &fixture);
        }
        fixture.context.call(&mut request)
    };
    expect_errno(call(false), Errno::NODATA, "REG_DMABUF_MR, by the driver");
    let errno = Errno::PROTONOSUPPORT;
    expect_errno(call(true), errno, "REG_DMABUF_MR, watched");
}

/// The iova and the length of a region.
fn query(device: &OwnDevice, mr: u32) -> (u64, u64) {
    let (mut lkey, mut rkey) = (0_u32, 0_u32);
    let (mut iova, mut length) = (0_u64, 0_u64);
    let mut request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_QUERY_MR)
        .object(UVERBS_ATTR_QUERY_MR_HANDLE, mr.into())
        .output(UVERBS_ATTR_QUERY_MR_RESP_LKEY, &mut lkey)
        .output(UVERBS_ATTR_QUERY_MR_RESP_RKEY, &mut rkey)
        .output(UVERBS_ATTR_QUERY_MR_RESP_LENGTH, &mut length)
        .output(UVERBS_ATTR_QUERY_MR_RESP_IOVA, &mut iova);
    device.call(&mut request).expect("QUERY_MR");
    (iova, length)
}

/// Interface: QUERY_MR returns iova and length of a region by REG_DMABUF_MR.
#[test]
fn dmabuf_mr_has_iova_and_length() {
    let device = OwnDevice::new();
    let (iova, length) = (0x1234_0000_0000, 3 * PAGE as u64);
    let mut keys = [0; 2];
    let mut request = dmabuf_mr(device.alloc_pd(), iova, length, &mut keys);
    device.call(&mut request).expect("REG_DMABUF_MR");
    let mr = request.data(UVERBS_ATTR_REG_DMABUF_MR_HANDLE);
    let mr = mr.expect("it was added above") as u32;
    assert_eq!(query(&device, mr), (iova, length), "iova and length");
}

/// Interface: DM_MR_REG does not have the attributes. QUERY_MR returns the length of a
/// region by it.
#[test]
fn dm_mr_reg() {
    const DM_LENGTH: u64 = 4096;
    const LENGTH: u64 = 1024;
    let device = OwnDevice::new();
    let watches = Watches::new();
    let pd = device.alloc_pd();

    let request = Request::new(UVERBS_OBJECT_DM, UVERBS_METHOD_DM_ALLOC)
        .object(UVERBS_ATTR_ALLOC_DM_HANDLE, 0)
        .input(UVERBS_ATTR_ALLOC_DM_LENGTH, DM_LENGTH);
    let mut request = zero(request, UVERBS_ATTR_ALLOC_DM_ALIGNMENT);
    device.call(&mut request).expect("DM_ALLOC");
    let dm = request.data(UVERBS_ATTR_ALLOC_DM_HANDLE);
    let dm = dm.expect("it was added above") as i64;

    let queue = device.alloc_queue();

    let reg = |fd: Option<i64>, cookie: Option<u64>| {
        let (mut lkey, mut rkey) = (0_u32, 0_u32);
        let mut request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_DM_MR_REG)
            .object(UVERBS_ATTR_REG_DM_MR_HANDLE, 0)
            .object(UVERBS_ATTR_REG_DM_MR_PD_HANDLE, pd.into())
            .object(UVERBS_ATTR_REG_DM_MR_DM_HANDLE, dm)
            .input(UVERBS_ATTR_REG_DM_MR_OFFSET, DM_LENGTH - LENGTH)
            .input(UVERBS_ATTR_REG_DM_MR_LENGTH, LENGTH)
            .input(
                UVERBS_ATTR_REG_DM_MR_ACCESS_FLAGS,
                (IB_UVERBS_ACCESS_LOCAL_WRITE | IB_UVERBS_ACCESS_ZERO_BASED).into(),
            )
            .output(UVERBS_ATTR_REG_DM_MR_RESP_LKEY, &mut lkey)
            .output(UVERBS_ATTR_REG_DM_MR_RESP_RKEY, &mut rkey);
        if let Some(fd) = fd {
            request = request.object(UVERBS_ATTR_REG_MR_NOTIFY_FD, fd);
        }
        if let Some(cookie) = cookie {
            request = request.input(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, cookie);
        }
        device.call(&mut request)?;
        let mr = request.data(UVERBS_ATTR_REG_DM_MR_HANDLE);
        Ok(mr.expect("it was added above") as u32)
    };
    let mr = reg(None, None).expect("DM_MR_REG");
    assert_eq!(query(&device, mr).1, LENGTH, "length");

    let fd = Some(queue.as_raw_fd().into());
    for (fd, cookie) in [(fd, Some(7)), (fd, None), (None, Some(7))] {
        expect_errno(reg(fd, cookie), Errno::PROTONOSUPPORT, "DM_MR_REG, watched");
    }
    assert_eq!(device.regions(), 1, "regions");
    watches.expect_stopped(0);
    let reported = destroy_handle_of(&device, RDMA_DRIVER_UNKNOWN, mr, 99);
    assert_eq!(reported, 0, "events reported");
    assert_eq!(device.regions(), 0, "regions then");
}

// SPDX-License-Identifier: GPL-2.0
//! Protection domains and memory regions.

use crate::{
    context::{Context, Owned},
    ioctl::Request,
    queue::NotifyQueue,
    sys::{uapi::*, verbs::*},
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    ptr,
    sync::Arc,
};

/// A protection domain.
pub struct Pd {
    raw: Owned<ibv_pd>,
    context: Arc<Context>,
}

impl Pd {
    /// Allocates a protection domain.
    pub fn alloc(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: The context is open, and `Pd` keeps it so.
        let raw = unsafe { Owned::new(ibv_alloc_pd(context.as_ptr()), ibv_dealloc_pd) }?;
        Ok(Arc::new(Self {
            raw,
            context: context.clone(),
        }))
    }

    /// The context it is of.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The kernel's handle.
    pub fn handle(&self) -> u32 {
        // SAFETY: The PD is valid until `self` is dropped.
        unsafe { (*self.as_ptr()).handle }
    }

    /// libibverbs' own object, for calls that this crate does not wrap.
    pub fn as_ptr(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    /// Frees it, with the errno if that fails. Dropping ignores it.
    pub fn destroy(self) -> io::Result<()> {
        self.raw.destroy()
    }
}

/// What to register. All combinations can be expressed, wrong ones too.
#[derive(Clone, Copy, Debug)]
pub struct MrArgs {
    /// The first address of the region. Its IOVA is the same.
    pub addr: u64,
    /// Bytes.
    pub length: u64,
    /// `IBV_ACCESS_*`.
    pub access: u32,
    /// The queue for events of this region.
    pub notify_fd: Option<i64>,
    /// What the events of this region carry; need not be unique.
    pub cookie: Option<u64>,
}

impl MrArgs {
    /// A plain region that may be read and written, also remotely.
    pub fn new(addr: *const u8, length: usize) -> Self {
        Self {
            addr: addr as u64,
            length: length as u64,
            access: IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ,
            notify_fd: None,
            cookie: None,
        }
    }

    /// The same region, watched. Events for it may be read from `queue` before
    /// the registration has returned.
    #[must_use]
    pub fn watched(self, queue: &NotifyQueue, cookie: u64) -> Self {
        Self {
            notify_fd: Some(queue.as_fd().as_raw_fd().into()),
            cookie: Some(cookie),
            ..self
        }
    }
}

/// A memory region, plain or watched, registered with the ioctl method.
pub struct Mr {
    handle: u32,
    lkey: u32,
    rkey: u32,
    registered: bool,
    pd: Arc<Pd>,
}

impl Mr {
    /// Registers a region.
    ///
    /// # Safety
    ///
    /// Until the region is deregistered RDMA may read the pages that are mapped
    /// there now, and write to them as `access` allows, at any time and from
    /// any host that knows the key: no Rust reference may rely on them. Changing
    /// the mapping is allowed; the pages stay pinned.
    pub unsafe fn reg(pd: &Arc<Pd>, args: &MrArgs) -> io::Result<Self> {
        let (mut lkey, mut rkey, mut stag) = (0, 0, 0u64);
        let mut request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR)
            .object(UVERBS_ATTR_REG_MR_HANDLE, 0)
            .object(UVERBS_ATTR_REG_MR_PD_HANDLE, pd.handle().into())
            .input(UVERBS_ATTR_REG_MR_IOVA, args.addr)
            .input(UVERBS_ATTR_REG_MR_ADDR, args.addr)
            .input(UVERBS_ATTR_REG_MR_LENGTH, args.length)
            .input(UVERBS_ATTR_REG_MR_ACCESS_FLAGS, args.access.into())
            .output(UVERBS_ATTR_REG_MR_RESP_LKEY, &mut lkey)
            .output(UVERBS_ATTR_REG_MR_RESP_RKEY, &mut rkey);
        if let Some(fd) = args.notify_fd {
            request = request.object(UVERBS_ATTR_REG_MR_NOTIFY_FD, fd);
        }
        if let Some(cookie) = args.cookie {
            request = request.input(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, cookie);
        }
        if pd.context.driver_id() == RDMA_DRIVER_SIW {
            // What its provider adds to each call: 8 bits of the key, and the
            // whole key in return.
            request = request
                .input(UVERBS_ATTR_UHW_IN, 0)
                .output(UVERBS_ATTR_UHW_OUT, &mut stag);
        }
        pd.context.call(&mut request)?;
        let handle = request.data(UVERBS_ATTR_REG_MR_HANDLE);
        let handle = handle.expect("it was added above") as u32;
        Ok(Self {
            handle,
            lkey,
            rkey,
            registered: true,
            pd: pd.clone(),
        })
    }

    /// The kernel's handle.
    pub fn handle(&self) -> u32 {
        self.handle
    }

    /// The key for work requests of this process.
    pub fn lkey(&self) -> u32 {
        self.lkey
    }

    /// The key for the peer.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }

    /// Deregisters, and returns how many events of this region were read from
    /// its queue, modulo 2^32; no more will be. 0 for a plain region. After an
    /// error the region is as it was, and this may be tried again.
    ///
    /// # Panics
    ///
    /// If the region was destroyed before.
    pub fn destroy(&mut self) -> io::Result<u32> {
        assert!(self.registered, "the region was destroyed before");
        let mut reported = 0_u32;
        // The output is optional: a kernel that does not know it has no watched
        // regions, and plain ones have no events.
        Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY)
            .object(UVERBS_ATTR_DESTROY_MR_HANDLE, self.handle.into())
            .optional_output(UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED, &mut reported)
            .call(&*self.pd.context, self.pd.context.driver_id())?;
        self.registered = false;
        Ok(reported)
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        if self.registered {
            // What fails to be deregistered now is when the context is closed.
            let _ = self.destroy();
        }
    }
}

/// A memory region registered with ibv_reg_mr(), as programs have always done.
pub struct PlainMr {
    raw: Owned<ibv_mr>,
    _pd: Arc<Pd>,
}

impl PlainMr {
    /// Registers the address, length and access of `args`.
    ///
    /// # Safety
    ///
    /// As [`Mr::reg`].
    pub unsafe fn reg(pd: &Arc<Pd>, args: &MrArgs) -> io::Result<Self> {
        let addr = ptr::with_exposed_provenance_mut(args.addr as usize);
        // SAFETY: The PD is valid, and `PlainMr` keeps it so. The rest is up
        // to the caller.
        let raw = unsafe {
            let mr = ibv_reg_mr(pd.as_ptr(), addr, args.length as usize, args.access as i32);
            Owned::new(mr, ibv_dereg_mr)
        }?;
        let _pd = pd.clone();
        Ok(Self { raw, _pd })
    }

    /// The key for work requests of this process.
    pub fn lkey(&self) -> u32 {
        // SAFETY: The region is valid until `self` is dropped.
        unsafe { (*self.as_ptr()).lkey }
    }

    /// The key for the peer.
    pub fn rkey(&self) -> u32 {
        // SAFETY: As above.
        unsafe { (*self.as_ptr()).rkey }
    }

    /// libibverbs' own object, for calls that this crate does not wrap.
    pub fn as_ptr(&self) -> *mut ibv_mr {
        self.raw.as_ptr()
    }

    /// Deregisters, with the errno if that fails. Dropping ignores it.
    pub fn destroy(self) -> io::Result<()> {
        self.raw.destroy()
    }
}

// SPDX-License-Identifier: GPL-2.0
//! A verbs context: an open RDMA device.

use crate::{
    ioctl::Request,
    sys::{uapi::*, verbs::*},
};
use rustix::{
    fs::{Mode, OFlags, open},
    io::{Errno, dup2},
};
use std::{
    ffi::{CStr, c_int},
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr::{self, NonNull},
    slice,
    sync::Arc,
};

/// An object of libibverbs with the function that frees it.
pub(crate) struct Owned<T> {
    ptr: NonNull<T>,
    free: unsafe extern "C" fn(*mut T) -> c_int,
}

// SAFETY: Any thread may use and free libibverbs' objects; it has its own locks.
unsafe impl<T> Send for Owned<T> {}
// SAFETY: As above.
unsafe impl<T> Sync for Owned<T> {}

impl<T> Owned<T> {
    /// # Safety
    ///
    /// `ptr` is NULL, and errno says why, or an object that nobody else frees
    /// and that may be freed with `free`.
    pub(crate) unsafe fn new(
        ptr: *mut T,
        free: unsafe extern "C" fn(*mut T) -> c_int,
    ) -> io::Result<Self> {
        let ptr = NonNull::new(ptr).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { ptr, free })
    }

    pub(crate) fn as_ptr(&self) -> *mut T {
        self.ptr.as_ptr()
    }

    pub(crate) fn destroy(self) -> io::Result<()> {
        let this = ManuallyDrop::new(self);
        // SAFETY: By the contract of `new`; `this` is not used again.
        check(unsafe { (this.free)(this.as_ptr()) })
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: By the contract of `new`. An error leaves the object to the
        // kernel, which frees it with the context.
        unsafe { (self.free)(self.as_ptr()) };
    }
}

/// libibverbs returns an errno, or -1 and sets errno.
pub(crate) fn check(ret: c_int) -> io::Result<()> {
    match ret {
        0 => Ok(()),
        ..0 => Err(io::Error::last_os_error()),
        1.. => Err(io::Error::from_raw_os_error(ret)),
    }
}

/// An open RDMA device.
pub struct Context {
    raw: Owned<ibv_context>,
    driver_id: u32,
}

impl Context {
    /// The names of the RDMA devices that libibverbs finds.
    pub fn devices() -> io::Result<Vec<String>> {
        with_devices(|list| {
            Ok(list
                .iter()
                // SAFETY: The list holds valid devices.
                .map(|&device| unsafe { device_name(device) }.to_owned())
                .collect())
        })
    }

    /// Opens the device of that name, or fails with `ENODEV`.
    pub fn open(name: &str) -> io::Result<Arc<Self>> {
        let raw = with_devices(|list| {
            let device = list
                .iter()
                // SAFETY: The list holds valid devices.
                .find(|&&device| unsafe { device_name(device) } == name)
                .ok_or(Errno::NODEV)?;
            // SAFETY: The device is valid until the list is freed, and the
            // context that is returned keeps it alive.
            unsafe { Owned::new(ibv_open_device(*device), ibv_close_device) }
        })?;
        let mut context = Self {
            raw,
            driver_id: RDMA_DRIVER_UNKNOWN,
        };
        context.driver_id = context.find_driver_id()?;
        Ok(Arc::new(context))
    }

    /// Every call must carry the driver's number, which no file of sysfs
    /// shows. A wrong one is refused with `EINVAL` before anything else is
    /// looked at, so a call of an object that does not exist finds it.
    fn find_driver_id(&self) -> io::Result<u32> {
        let is_driver = |&id: &u32| {
            let answer = Request::new(u32::MAX, 0).call(self.as_fd(), id);
            answer.is_err_and(|e| Errno::from_io_error(&e) == Some(Errno::PROTONOSUPPORT))
        };
        let id = (RDMA_DRIVER_UNKNOWN..=u8::MAX.into()).find(is_driver);
        Ok(id.ok_or(Errno::NODEV)?)
    }

    /// The device's `RDMA_DRIVER_*`.
    pub fn driver_id(&self) -> u32 {
        self.driver_id
    }

    /// Makes a call in this context.
    pub fn call(&self, request: &mut Request) -> io::Result<()> {
        request.call(self, self.driver_id)
    }

    /// The kernel's `IB_UVERBS_CORE_SUPPORT_*` bits.
    pub fn core_support(&self) -> io::Result<u64> {
        let mut bits = 0;
        let id = UVERBS_ATTR_QUERY_CONTEXT_CORE_SUPPORT;
        let asked = Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_QUERY_CONTEXT)
            .output(id, &mut bits)
            .call(self, self.driver_id);
        match asked {
            Err(e) if Errno::from_io_error(&e) == Some(Errno::OPNOTSUPP) => self.probe_support(),
            asked => asked.map(|()| bits),
        }
    }

    /// Most drivers have no QUERY_CONTEXT; the bits are then had only by making
    /// another context. They are valid even if the driver refuses that for the
    /// lack of its own input, because the core writes them first.
    fn probe_support(&self) -> io::Result<u64> {
        // SAFETY: The device lives as long as its context.
        let name = unsafe { CStr::from_ptr((*(*self.raw.as_ptr()).device).dev_name.as_ptr()) };
        let path = format!("/dev/infiniband/{}", name.to_string_lossy());
        let file = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let mut bits = 0;
        let id = UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT;
        let mut request =
            Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_GET_CONTEXT).output(id, &mut bits);
        let asked = request.call(&file, self.driver_id);
        if !request.is_written(id) {
            asked?;
        }
        Ok(bits)
    }

    /// Whether this kernel can watch memory regions. Ask before registering: a
    /// kernel that cannot may ignore what it does not know.
    pub fn mmu_notify_supported(&self) -> io::Result<bool> {
        Ok(self.core_support()? & u64::from(IB_UVERBS_CORE_SUPPORT_MMU_NOTIFY) != 0)
    }

    /// Closes the kernel's half, as the end of the process would: every object
    /// of the context is destroyed, unless a mapping or another process holds
    /// it open. The objects here stay, and all their calls fail.
    pub fn disconnect(&self) -> io::Result<()> {
        let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        // SAFETY: libibverbs owns the FD, whose number stays open and its own.
        let mut fd = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd((*self.as_ptr()).cmd_fd) });
        Ok(dup2(null, &mut fd)?)
    }

    /// Closes the context, with the errno if that fails. Dropping ignores it.
    pub fn close(self) -> io::Result<()> {
        self.raw.destroy()
    }

    /// libibverbs' own context, for calls that this crate does not wrap.
    pub fn as_ptr(&self) -> *mut ibv_context {
        self.raw.as_ptr()
    }
}

/// The uverbs file that the context's calls go to.
impl AsFd for Context {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: The context owns cmd_fd and closes it last.
        unsafe { BorrowedFd::borrow_raw((*self.as_ptr()).cmd_fd) }
    }
}

fn with_devices<T>(f: impl FnOnce(&[*mut ibv_device]) -> io::Result<T>) -> io::Result<T> {
    let mut count = 0;
    // SAFETY: `count` may be written.
    let list = unsafe { ibv_get_device_list(&mut count) };
    if list.is_null() {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The list has `count` members until it is freed below.
    let result = f(unsafe { slice::from_raw_parts(list, count as usize) });
    // SAFETY: The list is from ibv_get_device_list() and no longer used.
    unsafe { ibv_free_device_list(list) };
    result
}

/// # Safety
///
/// `device` is valid for `'a`.
unsafe fn device_name<'a>(device: *mut ibv_device) -> &'a str {
    // SAFETY: A device's name is a string that lives as long as the device.
    let name = unsafe { CStr::from_ptr(ptr::addr_of!((*device).name).cast()) };
    name.to_str().unwrap_or_default()
}

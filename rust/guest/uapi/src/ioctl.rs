// SPDX-License-Identifier: GPL-2.0
//! One call of a uverbs method: `RDMA_VERBS_IOCTL` and its attributes.

use crate::sys::uapi::*;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use std::{io, marker::PhantomData, mem, os::fd::AsFd};

const VERBS_IOCTL: Opcode = opcode::read_write::<ib_uverbs_ioctl_hdr>(RDMA_IOCTL_MAGIC as u8, 1);
const MAX_ATTRS: usize = 16;

#[repr(C)]
struct Buffer {
    hdr: ib_uverbs_ioctl_hdr,
    attrs: [ib_uverbs_attr; MAX_ATTRS],
}

/// A call of a method of a uverbs object, built attribute by attribute.
///
/// Attributes are sent as mandatory, so that a kernel that does not know one
/// refuses the call (`EPROTONOSUPPORT`) instead of ignoring it. The builder
/// checks nothing: wrong calls can be built with it.
pub struct Request<'a> {
    buffer: Buffer,
    outputs: PhantomData<&'a mut u64>,
}

impl<'a> Request<'a> {
    /// Starts a call of `method` (`UVERBS_METHOD_*`) of `object`
    /// (`UVERBS_OBJECT_*`).
    pub fn new(object: u32, method: u32) -> Self {
        let mut buffer = Buffer {
            hdr: Default::default(),
            attrs: Default::default(),
        };
        buffer.hdr.object_id = object as u16;
        buffer.hdr.method_id = method as u16;
        Self {
            buffer,
            outputs: PhantomData,
        }
    }

    /// Adds an attribute as it is.
    ///
    /// # Safety
    ///
    /// If the kernel takes the attribute for a pointer, then `data` must point
    /// to `len` bytes that it may read, or write, until the call has returned.
    ///
    /// # Panics
    ///
    /// If there are more than 16 attributes.
    #[must_use]
    pub unsafe fn raw(mut self, attr: ib_uverbs_attr) -> Self {
        self.buffer.attrs[self.buffer.hdr.num_attrs as usize] = attr;
        self.buffer.hdr.num_attrs += 1;
        self
    }

    fn attr(self, id: u32, len: usize, flags: u32, data: u64) -> Self {
        let mut attr = ib_uverbs_attr {
            attr_id: id as u16,
            len: len as u16,
            flags: flags as u16,
            ..Default::default()
        };
        attr.__bindgen_anon_1.data = data;
        // SAFETY: The callers below pass either no pointer, or one from a
        // borrow of `len` bytes that lives as long as `self`.
        unsafe { self.raw(attr) }
    }

    /// Adds an input of eight bytes, carried in the attribute itself.
    #[must_use]
    pub fn input(self, id: u32, value: u64) -> Self {
        self.attr(id, size_of::<u64>(), UVERBS_ATTR_F_MANDATORY, value)
    }

    /// Adds the handle, or FD, of an existing object. For an object that the
    /// call makes pass 0 and take its handle from [`Request::data`].
    #[must_use]
    pub fn object(self, id: u32, handle: i64) -> Self {
        self.attr(id, 0, UVERBS_ATTR_F_MANDATORY, handle as u64)
    }

    /// Adds an output that the kernel writes to `value`.
    #[must_use]
    pub fn output<T: Output>(self, id: u32, value: &'a mut T) -> Self {
        let ptr: *mut T = value;
        self.attr(id, size_of::<T>(), UVERBS_ATTR_F_MANDATORY, ptr as u64)
    }

    /// As [`Request::output`], but a kernel that does not know the attribute
    /// leaves `value` alone.
    #[must_use]
    pub fn optional_output<T: Output>(self, id: u32, value: &'a mut T) -> Self {
        let ptr: *mut T = value;
        self.attr(id, size_of::<T>(), 0, ptr as u64)
    }

    /// The data word of attribute `id` after the call: the handle or FD of the
    /// object that was made.
    pub fn data(&self, id: u32) -> Option<u64> {
        // SAFETY: All members of the union are eight plain bytes.
        self.find(id)
            .map(|attr| unsafe { attr.__bindgen_anon_1.data })
    }

    /// Whether the kernel has written output `id`, even if the call failed.
    pub fn is_written(&self, id: u32) -> bool {
        self.find(id)
            .is_some_and(|attr| u32::from(attr.flags) & UVERBS_ATTR_F_VALID_OUTPUT != 0)
    }

    fn find(&self, id: u32) -> Option<&ib_uverbs_attr> {
        self.buffer.attrs[..self.buffer.hdr.num_attrs as usize]
            .iter()
            .find(|attr| u32::from(attr.attr_id) == id)
    }

    /// Makes the call on the uverbs file `fd` of a device of `driver_id`
    /// (`RDMA_DRIVER_*`).
    pub fn call(&mut self, fd: impl AsFd, driver_id: u32) -> io::Result<()> {
        let hdr = &mut self.buffer.hdr;
        let attrs = hdr.num_attrs as usize * size_of::<ib_uverbs_attr>();
        hdr.length = (mem::offset_of!(Buffer, attrs) + attrs) as u16;
        hdr.driver_id = driver_id;
        // SAFETY: RDMA_VERBS_IOCTL reads and writes `length` bytes, all of
        // them in `buffer`, and what the attributes point to: see `raw`.
        let call = unsafe { Updater::<VERBS_IOCTL, Buffer>::new(&mut self.buffer) };
        // SAFETY: As above.
        Ok(unsafe { ioctl(fd, call) }?)
    }
}

/// What a method may write: plain integers.
pub trait Output: private::Sealed {}
impl Output for u32 {}
impl Output for u64 {}

mod private {
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
}

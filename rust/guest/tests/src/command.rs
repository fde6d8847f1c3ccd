// SPDX-License-Identifier: GPL-2.0
//! The extended commands.

use crate::OwnDevice;
use rustix::io::write;
use std::{io, os::fd::AsFd, slice, sync::Arc};
use uverbs_mmu_notify::{Context, Request, sys::uapi::*};

/// struct ib_uverbs_cmd_hdr and struct ib_uverbs_ex_cmd_hdr.
const HEADER: usize = 24;

/// How an extended command is sent.
#[derive(Clone, Copy, Debug)]
pub enum Form {
    /// write()
    Write,
    /// INVOKE_WRITE
    Invoke,
}

/// An open uverbs file with a context.
pub trait Uverbs: AsFd {
    /// The driver's number, for ioctls.
    fn driver_id(&self) -> u32;
}

impl Uverbs for Context {
    fn driver_id(&self) -> u32 {
        Context::driver_id(self)
    }
}

impl Uverbs for Arc<Context> {
    fn driver_id(&self) -> u32 {
        Context::driver_id(self)
    }
}

impl Uverbs for OwnDevice {
    fn driver_id(&self) -> u32 {
        RDMA_DRIVER_UNKNOWN
    }
}

/// Plain integers without padding, a multiple of eight bytes.
pub trait Plain: Copy + Default {}
impl Plain for ib_uverbs_ex_create_mmu_notify {}
impl Plain for ib_uverbs_ex_create_mmu_notify_resp {}
impl Plain for ib_uverbs_ex_reg_mr_notify {}
impl Plain for ib_uverbs_ex_reg_mr_notify_resp {}
impl Plain for ib_uverbs_ex_dereg_mr_notify {}
impl Plain for ib_uverbs_ex_dereg_mr_notify_resp {}

/// The bytes of a request.
pub fn bytes<T: Plain>(value: &T) -> Vec<u8> {
    let ptr = (&raw const *value).cast();
    // SAFETY: It has no padding.
    unsafe { slice::from_raw_parts(ptr, size_of::<T>()) }.to_vec()
}

/// A mandatory attribute with this data, for [`Request::raw`].
pub fn attr(id: u32, len: u16, data: u64) -> ib_uverbs_attr {
    let mut attr = ib_uverbs_attr {
        attr_id: id as u16,
        len,
        flags: UVERBS_ATTR_F_MANDATORY as u16,
        ..Default::default()
    };
    attr.__bindgen_anon_1.data = data;
    attr
}

/// Sends a command whose response goes to `response`, `room` bytes.
pub fn send_command(
    form: Form,
    context: &impl Uverbs,
    command: u32,
    input: &[u8],
    response: *mut u8,
    room: usize,
) -> io::Result<()> {
    let command = command | IB_USER_VERBS_CMD_FLAG_EXTENDED;
    match form {
        Form::Write => {
            let mut buffer = Vec::with_capacity(HEADER + input.len());
            buffer.extend(command.to_ne_bytes());
            buffer.extend((input.len() as u16 / 8).to_ne_bytes());
            buffer.extend((room as u16 / 8).to_ne_bytes());
            // struct ib_uverbs_ex_cmd_hdr: no room, no response.
            let response = if room == 0 { 0 } else { response as u64 };
            buffer.extend(response.to_ne_bytes());
            buffer.extend([0; 8]);
            buffer.extend(input);
            write(context, &buffer)?;
            Ok(())
        }
        Form::Invoke => {
            // Up to eight bytes are in the attribute itself.
            let data = match input.first_chunk() {
                Some(word) if input.len() == 8 => u64::from_ne_bytes(*word),
                _ => input.as_ptr() as u64,
            };
            let request = Request::new(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INVOKE_WRITE)
                .input(UVERBS_ATTR_WRITE_CMD, command.into());
            // SAFETY: `input` lives until the call returns, and the kernel
            // checks the address of the response.
            let mut request = unsafe {
                request
                    .raw(attr(UVERBS_ATTR_CORE_IN, input.len() as u16, data))
                    .raw(attr(UVERBS_ATTR_CORE_OUT, room as u16, response as u64))
            };
            request.call(context, context.driver_id())
        }
    }
}

/// Sends a command, and returns its response.
pub fn call_command<I: Plain, O: Plain>(
    form: Form,
    context: &impl Uverbs,
    command: u32,
    input: &I,
) -> io::Result<O> {
    let mut output = O::default();
    let response = (&raw mut output).cast();
    send_command(
        form,
        context,
        command,
        &bytes(input),
        response,
        size_of::<O>(),
    )?;
    Ok(output)
}

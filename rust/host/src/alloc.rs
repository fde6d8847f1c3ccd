// SPDX-License-Identifier: GPL-2.0

//! Allocations that are counted, may fail, and are neither made nor freed under a spinlock.

use crate::{
    check::Allocation,
    error::{Error, Result}, //
};
use core::{ops::Deref, pin::Pin};
use pinned_init::{Init, PinInit};

#[derive(Debug)]
pub struct AllocError;

#[derive(Clone, Copy)]
pub struct Flags(());

pub const GFP_KERNEL_ACCOUNT: Flags = Flags(());

/// A box that can not be moved out of. The one of the kernel is in memory of `vmalloc()`.
pub struct VBox<T> {
    value: Pin<Box<T>>,
    // Declared, and so dropped, after what it stands for.
    _allocation: Allocation,
}

impl<T> VBox<T> {
    pub fn init<E>(init: impl Init<T, E>, flags: Flags) -> Result<Self>
    where
        Error: From<E>,
    {
        Self::pin_init(init, flags)
    }

    pub(crate) fn pin_init<E>(init: impl PinInit<T, E>, _: Flags) -> Result<Self>
    where
        Error: From<E>,
    {
        let allocation = Allocation::new()?;
        let mut value = Box::<T>::new_uninit();

        // SAFETY: The pointer is valid for writes, and on success the value gets pinned.
        unsafe { init.__pinned_init(value.as_mut_ptr())? };
        Ok(Self {
            // SAFETY: The initializer has returned success.
            value: Box::into_pin(unsafe { value.assume_init() }),
            _allocation: allocation,
        })
    }
}

impl<T> Deref for VBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

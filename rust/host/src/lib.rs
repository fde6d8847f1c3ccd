// SPDX-License-Identifier: GPL-2.0

//! As much of the `kernel` crate as `state.rs` and `queue.rs` need, on the primitives of loom.
//!
//! Rules of the kernel are checked, see [`check`]. Everything here only works inside of
//! [`check::model`].

pub mod alloc;
pub mod check;
pub mod list;
pub mod mm;
pub mod sync;

/// What the tests read through `bindings`, with the values of `include/uapi/asm-generic/poll.h`.
pub mod bindings {
    pub const POLLIN: u32 = 0x1;
    pub const POLLERR: u32 = 0x8;
    pub const POLLRDNORM: u32 = 0x40;
}

pub mod error {
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Error(i32);

    pub type Result<T = (), E = Error> = core::result::Result<T, E>;

    impl From<core::convert::Infallible> for Error {
        fn from(error: core::convert::Infallible) -> Self {
            match error {}
        }
    }

    impl From<crate::alloc::AllocError> for Error {
        fn from(_: crate::alloc::AllocError) -> Self {
            code::ENOMEM
        }
    }

    pub mod code {
        use super::Error;

        pub const EPERM: Error = Error(-1);
        pub const EINTR: Error = Error(-4);
        pub const EIO: Error = Error(-5);
        pub const EAGAIN: Error = Error(-11);
        pub const ENOMEM: Error = Error(-12);
        pub const EFAULT: Error = Error(-14);
        pub const EINVAL: Error = Error(-22);
        pub const ERESTARTSYS: Error = Error(-512);
    }
}

pub mod fs {
    pub struct File;
}

pub mod page {
    pub const PAGE_SHIFT: usize = 12;
    pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
    pub const PAGE_MASK: usize = !(PAGE_SIZE - 1);

    pub fn page_align(addr: usize) -> Option<usize> {
        addr.checked_next_multiple_of(PAGE_SIZE)
    }
}

pub mod prelude {
    pub use crate::{
        alloc::{GFP_KERNEL_ACCOUNT, VBox},
        error::{Error, Result, code::*},
        try_pin_init,
    };
    pub use core::{ffi::c_uint, pin::Pin};
    pub use pinned_init::{init, pin_data, pin_init};
}

// Tests name this crate `pin_init` as well.
pub use pinned_init::init_zeroed;

#[macro_export]
macro_rules! try_pin_init {
    ($($initializer:tt)*) => {
        ::pinned_init::try_pin_init!($($initializer)* ? $crate::error::Error)
    };
}

/// Lock classes are for lockdep; [`check`] has its own means.
#[macro_export]
macro_rules! static_lock_class {
    () => {
        ()
    };
}

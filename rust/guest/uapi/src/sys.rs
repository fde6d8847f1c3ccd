// SPDX-License-Identifier: GPL-2.0
//! What bindgen makes of the C headers. Names are those of the headers.

#![allow(
    missing_docs,
    non_camel_case_types,
    unsafe_op_in_unsafe_fn,
    clippy::all,
    clippy::undocumented_unsafe_blocks
)]

/// The kernel's interface: the headers of the patched kernel tree.
pub mod uapi {
    include!(concat!(env!("OUT_DIR"), "/uapi.rs"));
}

/// libibverbs: the system's `<infiniband/verbs.h>`.
pub mod verbs {
    include!(concat!(env!("OUT_DIR"), "/verbs.rs"));
}

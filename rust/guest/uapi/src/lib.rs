// SPDX-License-Identifier: GPL-2.0
//! Notification of userspace about changes under RDMA memory regions: the
//! interface of `CONFIG_INFINIBAND_USER_MMU_NOTIFY` and a registration cache
//! that uses it as it is meant to be used.
//!
//! Start with [`cache`]: its rules are what a library has to do, and the rest
//! of the crate is what that needs. [`sys`] holds the plain C interface.
//!
//! Every error is an [`std::io::Error`] with the errno of the call that failed.

pub mod cache;
mod context;
mod ioctl;
mod mr;
mod qp;
mod queue;
pub mod sys;

pub use context::Context;
pub use ioctl::Request;
pub use mr::{Mr, MrArgs, Pd, PlainMr};
pub use qp::{Location, QpPair, wc_status_str};
pub use queue::{Event, Events, GenerationPage, NotifyQueue};

// SPDX-License-Identifier: GPL-2.0
//! Queues that are sent to other processes.

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};
use uverbs_mmu_notify::NotifyQueue;

const SPACE: usize = rustix::cmsg_space!(ScmRights(1));

/// Two sockets that are connected to each other.
pub fn sockets() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("socketpair")
}

/// Sends an FD.
pub fn send(socket: &OwnedFd, fd: impl AsFd) {
    try_send(socket, fd).expect("sendmsg");
}

/// Sends an FD, or fails.
pub fn try_send(socket: &OwnedFd, fd: impl AsFd) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let (fds, data) = ([fd.as_fd()], [IoSlice::new(b"x")]);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(socket, &data, &mut control, SendFlags::empty()).map(drop)
}

/// Receives a queue.
pub fn receive(socket: &OwnedFd) -> NotifyQueue {
    try_receive(socket).expect("recvmsg")
}

/// Receives a queue. Also fails if the kernel drops the FD of a message.
pub fn try_receive(socket: &OwnedFd) -> io::Result<NotifyQueue> {
    let (mut byte, mut space) = ([0], [MaybeUninit::uninit(); SPACE]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let data = &mut [IoSliceMut::new(&mut byte)];
    recvmsg(socket, data, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(fds.next().ok_or(Errno::NOMEM)?.into())
}

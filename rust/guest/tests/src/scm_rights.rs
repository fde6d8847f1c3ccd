// SPDX-License-Identifier: GPL-2.0
//! Queues that are sent to other processes.

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::{
    io::{IoSlice, IoSliceMut},
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
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(
        socket,
        &[IoSlice::new(b"x")],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent, Ok(1), "sendmsg");
}

/// Receives a queue.
pub fn receive(socket: &OwnedFd) -> NotifyQueue {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let data = &mut [IoSliceMut::new(&mut byte)];
    recvmsg(socket, data, &mut control, RecvFlags::CMSG_CLOEXEC).expect("recvmsg");
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.next().expect("an FD in the message").into()
}

// SPDX-License-Identifier: GPL-2.0
//! RDMA traffic: two reliable connected queue pairs of one device.

use crate::{
    context::{Owned, check},
    mr::Pd,
    sys::verbs::*,
};
use rustix::io::Errno;
use std::{ffi::CStr, hint, io, ptr, sync::Arc};

const PORT: u8 = 1;
/// How often to look for a completion before asking whether there still is a device.
const SPINS: u32 = 1 << 16;

/// Where a work request reads or writes.
#[derive(Clone, Copy, Debug)]
pub struct Location {
    /// The first address.
    pub addr: u64,
    /// The lkey of a local region, the rkey of a remote one.
    pub key: u32,
}

impl Location {
    /// A location in memory of this process.
    pub fn new(addr: *const u8, key: u32) -> Self {
        Self {
            addr: addr as u64,
            key,
        }
    }
}

/// Two RC queue pairs connected to each other: what the first one writes to a
/// "remote" region goes through the device's whole transport.
///
/// For InfiniBand and RoCE devices; iWARP ones connect in another way.
pub struct QpPair {
    requester: Owned<ibv_qp>,
    _responder: Owned<ibv_qp>,
    cq: Owned<ibv_cq>,
    _pd: Arc<Pd>,
}

impl QpPair {
    /// Makes and connects the two on the first port of the device.
    pub fn connect(pd: &Arc<Pd>) -> io::Result<Self> {
        let context = pd.context().as_ptr();
        // SAFETY: The context is open, and the PD keeps it so.
        let cq = unsafe {
            let cq = ibv_create_cq(context, 1, ptr::null_mut(), ptr::null_mut(), 0);
            Owned::new(cq, ibv_destroy_cq)
        }?;
        let create = || {
            let mut init = ibv_qp_init_attr {
                send_cq: cq.as_ptr(),
                recv_cq: cq.as_ptr(),
                qp_type: IBV_QPT_RC,
                sq_sig_all: 1,
                ..Default::default()
            };
            init.cap.max_send_wr = 1;
            init.cap.max_recv_wr = 1;
            init.cap.max_send_sge = 1;
            init.cap.max_recv_sge = 1;
            // SAFETY: PD and CQ are valid; `QpPair` destroys the QP first.
            unsafe { Owned::new(ibv_create_qp(pd.as_ptr(), &mut init), ibv_destroy_qp) }
        };
        let (requester, responder) = (create()?, create()?);
        let (gid_index, gid) = find_gid(context)?;
        connect(&requester, &responder, gid_index, gid)?;
        connect(&responder, &requester, gid_index, gid)?;
        Ok(Self {
            requester,
            _responder: responder,
            cq,
            _pd: pd.clone(),
        })
    }

    /// RDMA WRITE of `length` bytes from `local` to `remote`. Waits for the
    /// completion and returns its status, `IBV_WC_SUCCESS` or another
    /// `IBV_WC_*`. After another one the pair is of no more use.
    pub fn write(
        &self,
        local: Location,
        remote: Location,
        length: u32,
    ) -> io::Result<ibv_wc_status> {
        self.post(IBV_WR_RDMA_WRITE, local, remote, length)
    }

    /// RDMA READ of `length` bytes from `remote` to `local`; else as
    /// [`QpPair::write`].
    pub fn read(
        &self,
        local: Location,
        remote: Location,
        length: u32,
    ) -> io::Result<ibv_wc_status> {
        self.post(IBV_WR_RDMA_READ, local, remote, length)
    }

    fn post(
        &self,
        opcode: ibv_wr_opcode,
        local: Location,
        remote: Location,
        length: u32,
    ) -> io::Result<ibv_wc_status> {
        let mut sge = ibv_sge {
            addr: local.addr,
            length,
            lkey: local.key,
        };
        let mut wr = ibv_send_wr {
            sg_list: &mut sge,
            num_sge: 1,
            opcode,
            ..Default::default()
        };
        wr.wr.rdma.remote_addr = remote.addr;
        wr.wr.rdma.rkey = remote.key;
        let (mut bad_wr, qp) = (ptr::null_mut(), self.as_ptr());
        // SAFETY: The QP and so its context are valid. The device touches
        // registered memory only, which `Mr::reg` has been promised.
        unsafe {
            let post_send = (*(*qp).context).ops.post_send;
            check(post_send.ok_or(Errno::OPNOTSUPP)?(qp, &mut wr, &mut bad_wr))?;
        }
        self.wait()
    }

    /// Waits for the completion of what was posted last, and returns its status. `EIO` if the
    /// device is gone.
    pub fn wait(&self) -> io::Result<ibv_wc_status> {
        let (cq, mut wc) = (self.cq.as_ptr(), ibv_wc::default());
        // SAFETY: The CQ is valid, and so is its context.
        let poll_cq = unsafe { (*(*cq).context).ops.poll_cq }.ok_or(Errno::OPNOTSUPP)?;
        // The transport's own timeout ends this, unless the device is removed.
        let mut spins = 0_u32;
        loop {
            spins = spins.wrapping_add(1);
            // SAFETY: As above; there is room for one completion.
            match unsafe { poll_cq(cq, 1, &mut wc) } {
                0 if spins.is_multiple_of(SPINS) => {
                    let mut port = ibv_port_attr::default();
                    // SAFETY: The context is open, and `port` may be written.
                    check(unsafe { ibv_query_port((*cq).context, PORT, (&raw mut port).cast()) })?;
                }
                0 => hint::spin_loop(),
                1 => return Ok(wc.status),
                _ => return Err(Errno::IO.into()),
            }
        }
    }

    /// libibverbs' own QP, for calls that this crate does not wrap.
    pub fn as_ptr(&self) -> *mut ibv_qp {
        self.requester.as_ptr()
    }
}

/// The name of an `IBV_WC_*`.
pub fn wc_status_str(status: ibv_wc_status) -> &'static str {
    // SAFETY: It returns a string constant for any number.
    let name = unsafe { CStr::from_ptr(ibv_wc_status_str(status)) };
    name.to_str().unwrap_or_default()
}

/// The GID of the interface's IPv4 address, which needs no settling as an IPv6
/// one does, or else the first there is.
fn find_gid(context: *mut ibv_context) -> io::Result<(u8, ibv_gid)> {
    let gids: Vec<_> = (0..16)
        .filter_map(|index| {
            let mut gid = ibv_gid::default();
            // SAFETY: The context is open and `gid` may be written.
            let ret = unsafe { ibv_query_gid(context, PORT, index.into(), &mut gid) };
            // SAFETY: All members of the union are sixteen plain bytes.
            let raw = u128::from_be_bytes(unsafe { gid.raw });
            (ret == 0 && raw != 0).then_some((index, gid, raw >> 32 == 0xffff))
        })
        .collect();
    let found = gids.iter().find(|(.., v4)| *v4).or(gids.first());
    let (index, gid, _) = found.ok_or(Errno::ADDRNOTAVAIL)?;
    Ok((*index, *gid))
}

/// Takes `qp` to the state in which it sends to, and receives from, `peer`.
fn connect(
    qp: &Owned<ibv_qp>,
    peer: &Owned<ibv_qp>,
    gid_index: u8,
    gid: ibv_gid,
) -> io::Result<()> {
    let modify = |mut attr: ibv_qp_attr, state, mask: u32| {
        attr.qp_state = state;
        // SAFETY: The QP is valid.
        check(unsafe { ibv_modify_qp(qp.as_ptr(), &mut attr, (IBV_QP_STATE | mask) as i32) })
    };

    let init = ibv_qp_attr {
        port_num: PORT,
        qp_access_flags: IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ,
        ..Default::default()
    };
    modify(
        init,
        IBV_QPS_INIT,
        IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
    )?;

    let mut receive = ibv_qp_attr {
        // What fits the 1500 bytes of a plain Ethernet.
        path_mtu: IBV_MTU_1024,
        // SAFETY: The peer is valid.
        dest_qp_num: unsafe { (*peer.as_ptr()).qp_num },
        max_dest_rd_atomic: 1,
        min_rnr_timer: 12,
        ..Default::default()
    };
    receive.ah_attr.is_global = 1;
    receive.ah_attr.port_num = PORT;
    receive.ah_attr.grh.dgid = gid;
    receive.ah_attr.grh.sgid_index = gid_index;
    receive.ah_attr.grh.hop_limit = 1;
    modify(
        receive,
        IBV_QPS_RTR,
        IBV_QP_AV
            | IBV_QP_PATH_MTU
            | IBV_QP_DEST_QPN
            | IBV_QP_RQ_PSN
            | IBV_QP_MAX_DEST_RD_ATOMIC
            | IBV_QP_MIN_RNR_TIMER,
    )?;

    let send = ibv_qp_attr {
        // Half a second, seven times: an emulated machine may be slow.
        timeout: 17,
        retry_cnt: 7,
        rnr_retry: 7,
        max_rd_atomic: 1,
        ..Default::default()
    };
    modify(
        send,
        IBV_QPS_RTS,
        IBV_QP_TIMEOUT
            | IBV_QP_RETRY_CNT
            | IBV_QP_RNR_RETRY
            | IBV_QP_SQ_PSN
            | IBV_QP_MAX_QP_RD_ATOMIC,
    )
}

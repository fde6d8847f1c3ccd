// SPDX-License-Identifier: GPL-2.0
//! What is not new goes on as before, what is new can be probed for, and plain
//! calls work on watched regions.

use rustix::io::{Errno, write};
use std::{io, mem, slice};
use uverbs_mmu_notify::{
    Context, MrArgs, Request,
    sys::{uapi::*, verbs::*},
    wc_status_str,
};
use uverbs_mmu_notify_tests::*;

/// G7: plain regions, by ioctl and by write, are not reported.
#[test]
fn plain_regions_are_not_watched() {
    let fixture = Fixture::new();
    let map = Map::new(3);
    let _mr = fixture.watch(map, 2..3, 7);
    let before = fixture.page.load();
    let by_ioctl = reg(&fixture.pd, &MrArgs::new(map.at(0), PAGE));
    let by_write = reg_plain(&fixture.pd, &MrArgs::new(map.at(1), PAGE));

    map.unmap(0..2);
    fixture.expect_quiet_since(before, "munmap of plain regions");
    drop(by_ioctl);
    by_write.destroy().expect("ibv_dereg_mr");
    fixture.expect_quiet_since(before, "deregistration of plain regions");
    map.unmap(2..3);
    fixture.expect(&[Record::new(map, 2..3, 7, before + 1, UNMAPPED)]);
}

/// The fix of REG_MR by ioctl, on any kernel: RDMA works through a region so
/// registered as it does through one by `ibv_reg_mr`.
#[test]
fn rdma_through_a_region_by_ioctl() {
    let pd = open();
    let peer = Peer::new(&pd);
    let map = Map::new(2);
    let by_write = reg_plain(&pd, &MrArgs::new(map.at(0), PAGE));
    let by_ioctl = reg(&pd, &MrArgs::new(map.at(1), PAGE));
    for (page, rkey) in [(0, by_write.rkey()), (1, by_ioctl.rkey())] {
        let status = wc_status_str(peer.write(map.at(page), rkey, 0x22));
        assert_eq!(status, "success", "the write to page {page}");
        assert_eq!(map.load(page), 0x22, "page {page}");
    }
}

/// The fix of REG_MR by ioctl, on any kernel: QUERY_MR tells length and IOVA.
#[test]
fn query_of_a_region_by_ioctl() {
    let pd = open();
    let args = MrArgs::new(Map::new(2).at(0), 2 * PAGE);
    let mr = reg(&pd, &args);
    let (mut lkey, mut rkey, mut length, mut iova) = (0_u32, 0_u32, 0_u64, 0_u64);
    let mut request = Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_QUERY_MR)
        .object(UVERBS_ATTR_QUERY_MR_HANDLE, mr.handle().into())
        .output(UVERBS_ATTR_QUERY_MR_RESP_LKEY, &mut lkey)
        .output(UVERBS_ATTR_QUERY_MR_RESP_RKEY, &mut rkey)
        .output(UVERBS_ATTR_QUERY_MR_RESP_LENGTH, &mut length)
        .output(UVERBS_ATTR_QUERY_MR_RESP_IOVA, &mut iova);
    pd.context().call(&mut request).expect("QUERY_MR");
    assert_eq!((length, iova), (args.length, args.addr), "length and IOVA");
    assert_eq!((lkey, rkey), (mr.lkey(), mr.rkey()), "keys");
}

/// Writes a command to the context, as libibverbs does for the older ones.
fn command<T>(context: &Context, command: u32, input: T, out_bytes: usize) -> io::Result<()> {
    #[repr(C)]
    struct Command<T> {
        hdr: ib_uverbs_cmd_hdr,
        input: T,
    }
    let words = |bytes: usize| (bytes / 4) as u16;
    let command = Command {
        hdr: ib_uverbs_cmd_hdr {
            command,
            in_words: words(size_of::<Command<T>>()),
            out_words: words(out_bytes),
        },
        input,
    };
    // SAFETY: The commands below are plain integers without padding.
    let bytes =
        unsafe { slice::from_raw_parts((&raw const command).cast(), size_of_val(&command)) };
    write(context, bytes)?;
    Ok(())
}

/// Changes the access flags of a region.
fn rereg(context: &Context, handle: u32, flags: u32) -> io::Result<()> {
    let mut response = ib_uverbs_rereg_mr_resp::default();
    let input = ib_uverbs_rereg_mr {
        response: (&raw mut response) as u64,
        mr_handle: handle,
        flags,
        access_flags: IBV_ACCESS_LOCAL_WRITE,
        ..Default::default()
    };
    let out = size_of_val(&response);
    command(context, IB_USER_VERBS_CMD_REREG_MR, input, out)
}

/// Interface: a watched region cannot be reregistered, and stays as it is; a
/// plain one can, as before.
#[test]
fn reregistration() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let plain = reg(&fixture.pd, &MrArgs::new(map.at(0), PAGE));
    rereg(&fixture.context, plain.handle(), IBV_REREG_MR_CHANGE_ACCESS).expect("of a plain region");

    let mut watched = fixture.watch(map, 1..2, 7);
    let before = fixture.page.load();
    for flags in [
        IBV_REREG_MR_CHANGE_ACCESS,
        IBV_REREG_MR_CHANGE_PD,
        IBV_REREG_MR_CHANGE_TRANSLATION,
    ] {
        let what = format!("rereg of a watched region, flags {flags}");
        let changed = rereg(&fixture.context, watched.handle(), flags);
        expect_errno(changed, Errno::OPNOTSUPP, &what);
    }
    fixture.expect_quiet_since(before, "what was refused");
    map.unmap(1..2);
    fixture.expect(&[Record::new(map, 1..2, 7, before + 1, UNMAPPED)]);
    assert_eq!(watched.destroy().unwrap(), 1, "events reported");
}

/// Interface: the core-support bits tell of all devices.
#[test]
fn core_support() {
    let devices = Context::devices().unwrap();
    assert!(devices.contains(&device()), "{devices:?}");
    for name in devices {
        let bits = Context::open(&name).unwrap().core_support().unwrap();
        let expected = u64::from(
            IB_UVERBS_CORE_SUPPORT_MMU_NOTIFY | IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS,
        );
        assert_eq!(bits & expected, expected, "bits of {name}: {bits:#b}");
    }
}

/// Interface: a watched region can be deregistered by the older command, which
/// loses the count and ends the watch.
#[test]
fn deregistration_by_write() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let mr = fixture.watch(map, 0..2, 7);
    map.unmap(0..1);
    let before = fixture.page.load();
    let input = ib_uverbs_dereg_mr {
        mr_handle: mr.handle(),
    };
    command(&fixture.context, IB_USER_VERBS_CMD_DEREG_MR, input, 0).expect("DEREG_MR");
    mem::forget(mr);
    map.unmap(1..2);
    fixture.expect_quiet_since(before, "a pending event, and one after DEREG_MR");
}

/// Interface: MR_DESTROY without the output works as before.
#[test]
fn deregistration_without_the_count() {
    let fixture = Fixture::new();
    let map = Map::new(1);
    let mr = fixture.watch(map, 0..1, 7);
    let before = fixture.page.load();
    Request::new(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY)
        .object(UVERBS_ATTR_DESTROY_MR_HANDLE, mr.handle().into())
        .call(&*fixture.context, fixture.context.driver_id())
        .expect("MR_DESTROY");
    mem::forget(mr);
    map.unmap(0..1);
    fixture.expect_quiet_since(before, "after MR_DESTROY");
}

// SPDX-License-Identifier: GPL-2.0
//! Regions that are not watched.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::ptr;
use uverbs_mmu_notify::{MrArgs, Request, sys::uapi::*, wc_status_str};
use uverbs_mmu_notify_tests::*;

/// What the tests rely on that count exactly: where a map was, nothing is mapped but by
/// its address. A stack of a new thread or process would be.
#[test]
fn hole_stays() {
    let map = Map::new(64);
    map.unmap(0..64);
    let hole = map.at(0)..map.at(64);
    for pages in 1..=64 {
        let (len, protection) = (pages * PAGE, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: A new mapping, at an address of the kernel's choice.
        let addr = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE) };
        let start = addr.expect("mmap").cast::<u8>();
        assert!(
            start.wrapping_byte_add(len) <= hole.start || start >= hole.end,
            "{pages} pages at {start:?}, in the hole {hole:?}"
        );
    }
}

/// G7: changes under a region of `ibv_reg_mr` are not reported.
#[test]
fn plain_regions_are_not_watched() {
    let fixture = Fixture::new();
    let map = Map::new(2);
    let _mr = fixture.watch(map, 1..2, 7);
    let before = fixture.page.load();
    let plain = reg_plain(&fixture.pd, &MrArgs::new(map.at(0), PAGE));

    map.unmap(0..1);
    plain.destroy().expect("ibv_dereg_mr");
    fixture.expect_quiet(before, "a plain region");
    map.unmap(1..2);
    fixture.expect(&[Record::new(map, 1..2, 7, before + 1, UNMAPPED)]);
}

/// Interface: RDMA works through a region registered by ioctl, also on a kernel without the
/// option.
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

/// Interface: QUERY_MR returns length and IOVA of such a region.
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

// SPDX-License-Identifier: GPL-2.0
//! The extended commands, by write() and by INVOKE_WRITE.

use rustix::io::Errno;
use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};
use uverbs_mmu_notify::{Context, NotifyQueue, sys::uapi::*};
use uverbs_mmu_notify_tests::*;

const FORMS: [Form; 2] = [Form::Write, Form::Invoke];

fn create(form: Form, context: &Context) -> io::Result<NotifyQueue> {
    let response: ib_uverbs_ex_create_mmu_notify_resp = call_command(
        form,
        context,
        IB_USER_VERBS_EX_CMD_CREATE_MMU_NOTIFY,
        &ib_uverbs_ex_create_mmu_notify::default(),
    )?;
    assert_eq!(response.response_length as usize, size_of_val(&response));
    // SAFETY: The call has just made this FD for us.
    let queue = NotifyQueue::from(unsafe { OwnedFd::from_raw_fd(response.notify_fd) });
    queue.set_nonblocking(true)?;
    Ok(queue)
}

/// To register `pages` of `map`.
fn reg_input(
    fixture: &Fixture,
    queue: &NotifyQueue,
    map: Map,
    pages: std::ops::Range<usize>,
) -> ib_uverbs_ex_reg_mr_notify {
    let args = fixture.args(map, pages, 7);
    ib_uverbs_ex_reg_mr_notify {
        pd_handle: fixture.pd.handle(),
        start: args.addr,
        length: args.length,
        hca_va: args.addr,
        cookie: 7,
        access_flags: args.access,
        notify_fd: queue.as_fd().as_raw_fd(),
        ..Default::default()
    }
}

fn reg_mr(
    form: Form,
    fixture: &Fixture,
    input: &ib_uverbs_ex_reg_mr_notify,
) -> io::Result<ib_uverbs_ex_reg_mr_notify_resp> {
    let command = IB_USER_VERBS_EX_CMD_REG_MR_NOTIFY;
    let response: ib_uverbs_ex_reg_mr_notify_resp =
        call_command(form, &fixture.context, command, input)?;
    assert_eq!(response.response_length as usize, size_of_val(&response));
    Ok(response)
}

fn dereg_mr(form: Form, fixture: &Fixture, mr_handle: u32) -> io::Result<u32> {
    let input = ib_uverbs_ex_dereg_mr_notify {
        mr_handle,
        ..Default::default()
    };
    let command = IB_USER_VERBS_EX_CMD_DEREG_MR_NOTIFY;
    let response: ib_uverbs_ex_dereg_mr_notify_resp =
        call_command(form, &fixture.context, command, &input)?;
    assert_eq!(response.response_length as usize, size_of_val(&response));
    Ok(response.events_reported)
}

/// G1: G5: the three commands: RDMA works, changes are reported, counts are exact.
#[test]
fn whole_life() {
    for form in FORMS {
        let fixture = Fixture::new();
        let peer = Peer::new(&fixture.pd);
        let queue = create(form, &fixture.context).expect("create");
        let page = queue.generation_page().expect("map the counter page");
        let map = Map::new(3);
        let mr = reg_mr(form, &fixture, &reg_input(&fixture, &queue, map, 0..3)).expect("register");
        assert_eq!(peer.write(map.at(0), mr.rkey, 0x22), 0, "RDMA");
        assert_eq!(map.load(0), 0x22, "the byte written by RDMA");

        for generation in 1..3 {
            let pages = generation as usize..generation as usize + 1;
            map.unmap(pages.clone());
            assert_eq!(page.load(), generation, "generation");
            expect_records(&queue, &[Record::new(map, pages, 7, generation, UNMAPPED)]);
        }
        map.unmap(0..1);
        assert_eq!(
            dereg_mr(form, &fixture, mr.mr_handle).expect("deregister"),
            2,
            "events reported, {form:?}"
        );
        expect_records(&queue, &[]);

        // No command has kept the file.
        let pages = counter_pages();
        drop((page, queue));
        assert_eq!(counter_pages(), pages - 1, "queues, {form:?}");
    }
}

/// Interface: objects made by one form can be used and destroyed by the other.
#[test]
fn forms_mix() {
    for form in FORMS {
        let fixture = Fixture::new();
        let map = Map::new(2);
        let input = reg_input(&fixture, &fixture.queue, map, 0..1);
        let by_write = reg_mr(form, &fixture, &input).expect("register by write");
        let queue = create(form, &fixture.context).expect("create");
        let args = uverbs_mmu_notify::MrArgs::new(map.at(1), PAGE).watched(&queue, 8);
        let by_ioctl = reg(&fixture.pd, &args);

        map.unmap(0..2);
        fixture.expect(&[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
        expect_records(&queue, &[Record::new(map, 1..2, 8, 1, UNMAPPED)]);
        assert_eq!(destroy_handle(&fixture.context, by_write.mr_handle, 99), 1);
        assert_eq!(dereg_mr(form, &fixture, by_ioctl.handle()).unwrap(), 1);
        mem::forget(by_ioctl);
    }
}

/// Interface: the count of a plain region is 0.
#[test]
fn plain_region_reports_zero() {
    for form in FORMS {
        let fixture = Fixture::new();
        let args = uverbs_mmu_notify::MrArgs::new(Map::new(1).at(0), PAGE);
        let mr = reg(&fixture.pd, &args);
        assert_eq!(dereg_mr(form, &fixture, mr.handle()).unwrap(), 0);
        mem::forget(mr);
    }
}

/// Interface: errors. They leave nothing watched, and nothing is reported.
#[test]
fn refusals() {
    for form in FORMS {
        let (fixture, other) = (Fixture::new(), Fixture::new());
        let map = Map::new(1);
        let good = reg_input(&fixture, &fixture.queue, map, 0..1);
        let refused = |input: ib_uverbs_ex_reg_mr_notify, errno, what| {
            expect_errno(reg_mr(form, &fixture, &input), errno, what);
        };
        let comp_mask = 1;
        refused(
            ib_uverbs_ex_reg_mr_notify { comp_mask, ..good },
            Errno::OPNOTSUPP,
            "comp_mask of REG",
        );
        refused(
            ib_uverbs_ex_reg_mr_notify {
                access_flags: IB_UVERBS_ACCESS_ON_DEMAND,
                ..good
            },
            Errno::OPNOTSUPP,
            "on-demand paging",
        );
        refused(
            ib_uverbs_ex_reg_mr_notify { length: 0, ..good },
            Errno::INVAL,
            "length of zero",
        );
        refused(
            ib_uverbs_ex_reg_mr_notify {
                length: u64::MAX,
                ..good
            },
            Errno::INVAL,
            "wrap around",
        );
        refused(
            ib_uverbs_ex_reg_mr_notify {
                hca_va: good.start + 1,
                ..good
            },
            Errno::INVAL,
            "other offset in the page",
        );
        refused(
            ib_uverbs_ex_reg_mr_notify {
                notify_fd: other.queue.as_fd().as_raw_fd(),
                ..good
            },
            Errno::BADF,
            "FD of another context",
        );
        refused(
            ib_uverbs_ex_reg_mr_notify {
                notify_fd: -1,
                ..good
            },
            Errno::BADF,
            "no FD",
        );

        let create = |input: &ib_uverbs_ex_create_mmu_notify| {
            let command = IB_USER_VERBS_EX_CMD_CREATE_MMU_NOTIFY;
            call_command::<_, ib_uverbs_ex_create_mmu_notify_resp>(
                form,
                &fixture.context,
                command,
                input,
            )
        };
        let reserved = ib_uverbs_ex_create_mmu_notify {
            reserved: 1,
            ..Default::default()
        };
        expect_errno(create(&reserved), Errno::INVAL, "reserved of CREATE");
        let unknown = ib_uverbs_ex_create_mmu_notify {
            comp_mask,
            ..Default::default()
        };
        expect_errno(create(&unknown), Errno::OPNOTSUPP, "comp_mask of CREATE");

        let mr = reg_mr(form, &fixture, &good).expect("register");
        let command = IB_USER_VERBS_EX_CMD_DEREG_MR_NOTIFY;
        let input = ib_uverbs_ex_dereg_mr_notify {
            comp_mask,
            mr_handle: mr.mr_handle,
        };
        let result = call_command::<_, ib_uverbs_ex_dereg_mr_notify_resp>(
            form,
            &fixture.context,
            command,
            &input,
        );
        expect_errno(result, Errno::OPNOTSUPP, "comp_mask of DEREG");
        map.unmap(0..1);
        fixture.expect(&[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
        assert_eq!(dereg_mr(form, &fixture, mr.mr_handle).unwrap(), 1);
        let result = dereg_mr(form, &fixture, mr.mr_handle);
        expect_errno(result, Errno::NOENT, "DEREG of no region");
    }
}

/// Interface: requests and responses of another length.
#[test]
fn lengths() {
    for form in FORMS {
        let fixture = Fixture::new();
        let map = Map::new(2);
        let other = reg_input(&fixture, &fixture.queue, map, 1..2);
        let other = reg_mr(form, &fixture, &other).expect("register");
        let destroy = ib_uverbs_ex_dereg_mr_notify {
            mr_handle: other.mr_handle,
            ..Default::default()
        };
        let commands = [
            (
                IB_USER_VERBS_EX_CMD_CREATE_MMU_NOTIFY,
                bytes(&ib_uverbs_ex_create_mmu_notify::default()),
                size_of::<ib_uverbs_ex_create_mmu_notify_resp>(),
            ),
            (
                IB_USER_VERBS_EX_CMD_REG_MR_NOTIFY,
                bytes(&reg_input(&fixture, &fixture.queue, map, 0..1)),
                size_of::<ib_uverbs_ex_reg_mr_notify_resp>(),
            ),
            (
                IB_USER_VERBS_EX_CMD_DEREG_MR_NOTIFY,
                bytes(&destroy),
                size_of::<ib_uverbs_ex_dereg_mr_notify_resp>(),
            ),
        ];
        let call = |command, input: &[u8], room| {
            let mut response = [0xff_u8; 64];
            let at = response.as_mut_ptr();
            send_command(form, &fixture.context, command, input, at, room)?;
            Ok(response)
        };
        let (queues, watches) = (counter_pages(), Watches::new());
        for (command, good, full) in &commands {
            let (command, full) = (*command, *full);
            let errno = |result, errno, what| {
                expect_errno(result, errno, &format!("{what}, {command:#x} by {form:?}"));
            };
            // INVOKE_WRITE wants four bytes at least.
            let short = &good[..good.len() - 8];
            let refused = match (form, short.len()) {
                (Form::Invoke, 0) => Errno::INVAL,
                _ => Errno::NOSPC,
            };
            errno(call(command, short, full), refused, "short request");
            errno(
                call(command, good, full - 8),
                Errno::NOSPC,
                "short response",
            );
            errno(call(command, good, 0), Errno::NOSPC, "no response");
            let longer = [&good[..], &[0, 0, 0, 1, 0, 0, 0, 0]].concat();
            errno(
                call(command, &longer, full),
                Errno::OPNOTSUPP,
                "unknown members",
            );
        }
        assert_eq!(counter_pages(), queues, "queues");
        watches.expect_stopped(0);
        expect_regions(1);

        // Of a later version: what is unknown is zero both ways.
        for (command, good, full) in &commands {
            let longer = [&good[..], &[0; 8]].concat();
            let response = call(*command, &longer, full + 8);
            let response = response.expect("longer request and response");
            assert!(response[*full..full + 8].iter().all(|&byte| byte == 0));
            assert_eq!(response[full + 8], 0xff, "beyond the response");
        }
        // Of REG the one that starts, of DEREG the one that stops.
        watches.expect_stopped(1);
    }
}

/// Interface: CREATE without room for its response creates no FD.
#[test]
fn create_without_response() {
    for form in FORMS {
        let fixture = Fixture::new();
        let pages = counter_pages();
        let command = IB_USER_VERBS_EX_CMD_CREATE_MMU_NOTIFY;
        let input = bytes(&ib_uverbs_ex_create_mmu_notify::default());
        let full = size_of::<ib_uverbs_ex_create_mmu_notify_resp>();
        let mut response = [0_u8; 64];
        for room in [0, full - 8] {
            let response = response.as_mut_ptr();
            let result = send_command(form, &fixture.context, command, &input, response, room);
            expect_errno(result, Errno::NOSPC, "CREATE");
        }
        assert_eq!(counter_pages(), pages, "queues, after CREATE failed");
    }
}

/// G8: CREATE leaves nothing, whichever of its allocations fails.
#[test]
fn create_without_memory() {
    for form in FORMS {
        let fixture = Fixture::new();
        let pages = counter_pages();
        let fail = FailAllocation::new();
        let run = || create(form, &fixture.context);
        let count = || {
            let (made, count) = fail.count(run);
            drop(made.expect("CREATE"));
            count
        };
        count(); // now the allocator has objects of each kind
        let last = count();
        // The last that it cannot go on without are the queue and its waiters.
        let mut failures = 0;
        for nth in (1..=last).rev() {
            if failures == 2 {
                break;
            }
            if let (made @ Err(_), _) = fail.at(nth, run) {
                expect_errno(made, Errno::NOMEM, "CREATE");
                assert_eq!(counter_pages(), pages, "queues, after allocation {nth}");
                failures += 1;
            }
        }
        assert_eq!(failures, 2, "commands that failed");
    }
}

/// G1: events have the addresses of the process, not those of the device.
#[test]
fn another_iova() {
    for form in FORMS {
        let fixture = Fixture::new();
        let map = Map::new(2);
        let mut input = reg_input(&fixture, &fixture.queue, map, 0..2);
        input.hca_va = 1 << 40;
        let mr = reg_mr(form, &fixture, &input).expect("register");
        map.unmap(0..1);
        fixture.expect(&[Record::new(map, 0..1, 7, 1, UNMAPPED)]);
        assert_eq!(dereg_mr(form, &fixture, mr.mr_handle).unwrap(), 1);
    }
}

/// G3: G8: a registration that fails in the driver reports nothing and leaves nothing.
#[test]
fn memory_that_cannot_be_pinned() {
    for form in FORMS {
        let watches = Watches::new();
        let fixture = Fixture::new();
        let map = Map::new(2);
        map.unmap(1..2);
        let input = reg_input(&fixture, &fixture.queue, map, 0..2);
        expect_errno(reg_mr(form, &fixture, &input), Errno::FAULT, "REG");
        watches.expect_stopped(1);
        expect_no_regions();
        map.unmap(0..1);
        fixture.expect_quiet(0, "the registration that failed");
    }
}

/// G3: a response that faults undoes the command. Nothing is reported, even if the region
/// was born stale.
#[test]
fn response_faults() {
    for form in FORMS {
        let fixture = Fixture::new();
        let map = Map::untouched(5);
        map.unmap(4..5);
        let room = size_of::<ib_uverbs_ex_reg_mr_notify_resp>();
        for (page, overlap) in [0, 8, 16].into_iter().enumerate() {
            assert_eq!(map.load(page), 0, "the zero page");
            let input = bytes(&reg_input(&fixture, &fixture.queue, map, page..page + 1));
            let response = map.at(4).wrapping_sub(overlap);
            let command = IB_USER_VERBS_EX_CMD_REG_MR_NOTIFY;
            let result = send_command(form, &fixture.context, command, &input, response, room);
            expect_errno(result, Errno::FAULT, "REG");
        }
        expect_no_regions();
        map.dont_need(0..1);
        fixture.expect_quiet(0, "registrations that failed");

        let command = IB_USER_VERBS_EX_CMD_CREATE_MMU_NOTIFY;
        let input = bytes(&ib_uverbs_ex_create_mmu_notify::default());
        let room = size_of::<ib_uverbs_ex_create_mmu_notify_resp>();
        let pages = counter_pages();
        let result = send_command(form, &fixture.context, command, &input, map.at(4), room);
        expect_errno(result, Errno::FAULT, "CREATE");
        assert_eq!(counter_pages(), pages, "queues, after CREATE failed");

        // The region is gone nevertheless.
        let input = reg_input(&fixture, &fixture.queue, map, 0..1);
        let mr = reg_mr(form, &fixture, &input).expect("register");
        let input = bytes(&ib_uverbs_ex_dereg_mr_notify {
            mr_handle: mr.mr_handle,
            ..Default::default()
        });
        let command = IB_USER_VERBS_EX_CMD_DEREG_MR_NOTIFY;
        let room = size_of::<ib_uverbs_ex_dereg_mr_notify_resp>();
        let result = send_command(form, &fixture.context, command, &input, map.at(4), room);
        expect_errno(result, Errno::FAULT, "DEREG");
        expect_no_regions();
    }
}

/// Interface: another address space cannot use the commands. write() by a forked child,
/// which has credentials of its own, always fails.
#[test]
fn another_address_space() {
    for (form, errno) in FORMS.into_iter().zip([Errno::ACCESS, Errno::PERM]) {
        let fixture = Fixture::new();
        let map = Map::new(1);
        let child = in_child(|| {
            let input = reg_input(&fixture, &fixture.queue, map, 0..1);
            expect_errno(reg_mr(form, &fixture, &input), errno, "REG");
            0
        });
        assert_eq!(child, Exit::Code(0), "{form:?}");
        fixture.expect_quiet(0, "what was refused");
    }
}

/// G3: the command REG_MR_NOTIFY is missing where the driver cannot register memory.
#[test]
fn reg_mr_notify_without_the_method() {
    let device = OwnDevice::new();
    let queue = device.alloc_queue();
    let map = Map::new(1);
    let input = ib_uverbs_ex_reg_mr_notify {
        pd_handle: device.alloc_pd(),
        start: map.at(0) as u64,
        length: PAGE as u64,
        hca_va: map.at(0) as u64,
        cookie: 7,
        access_flags: IB_UVERBS_ACCESS_LOCAL_WRITE,
        notify_fd: queue.as_raw_fd(),
        ..Default::default()
    };
    let command = IB_USER_VERBS_EX_CMD_REG_MR_NOTIFY;
    // write() treats a missing command as a non-extended one. Its length is in words of four bytes,
    // so verify_hdr() returns EINVAL (uverbs_main.c).
    for (form, errno) in [
        (Form::Write, Errno::INVAL),
        (Form::Invoke, Errno::OPNOTSUPP),
    ] {
        let result: io::Result<ib_uverbs_ex_reg_mr_notify_resp> =
            call_command(form, &device, command, &input);
        expect_errno(result, errno, &format!("REG_MR_NOTIFY, {form:?}"));
    }
    assert_eq!(device.regions(), 0, "regions");
}

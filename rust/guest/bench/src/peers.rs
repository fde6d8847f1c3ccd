// SPDX-License-Identifier: GPL-2.0
//! What else a user has: userfaultfd and on-demand paging.

use crate::{
    hooks,
    job::Link,
    measure::{BATCH, count, each, sample, samples},
    row::Rows,
};
use anyhow::{Context, Result, ensure};
use linux_raw_sys::{general::*, ioctl::*};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::MemfdFlags,
    io::{Errno, read},
    ioctl::{Updater, ioctl},
    mm::{MapFlags, MremapFlags, UserfaultfdFlags, mremap_fixed, userfaultfd},
};
use std::{
    ops::Range,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard},
    thread::{self, JoinHandle},
};
use uverbs_mmu_notify::{MrArgs, sys::verbs::*};
use uverbs_mmu_notify_tests::*;

const PAGES: usize = 16;

pub fn run(rows: &mut Rows) -> Result<()> {
    userfault(rows)?;
    on_demand(rows)?;
    hooks::run(rows)
}

/// A userfaultfd for changes of the mapping, and its reader. What makes a change waits
/// until the reader has read of it. The reader holds the lock from before it reads until
/// all is marked, so the next owner of the lock finds it marked.
pub struct Monitor<T> {
    fd: Arc<OwnedFd>,
    state: Arc<Mutex<T>>,
    reader: Option<JoinHandle<()>>,
    stop: Arc<OwnedFd>,
}

impl<T: Send + 'static> Monitor<T> {
    /// Calls `changed` for each range of which a change is read.
    pub fn new(state: T, changed: fn(&mut T, Range<u64>)) -> Result<Self> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: It is for maps, which no reference points into.
        let fd = Arc::new(unsafe { userfaultfd(flags) }.context("userfaultfd")?);
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: (UFFD_FEATURE_EVENT_UNMAP
                | UFFD_FEATURE_EVENT_REMAP
                | UFFD_FEATURE_EVENT_REMOVE)
                .into(),
            ioctls: 0,
        };
        // SAFETY: The argument is that of the call.
        unsafe { ioctl(&fd, Updater::<UFFDIO_API, _>::new(&mut api)) }.context("UFFDIO_API")?;
        let state = Arc::new(Mutex::new(state));
        let stop = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
        let stop = Arc::new(stop);
        let reader = {
            let (fd, state, stop) = (fd.clone(), state.clone(), stop.clone());
            thread::spawn(move || {
                loop {
                    let mut fds = [
                        PollFd::new(&fd, PollFlags::IN),
                        PollFd::new(&stop, PollFlags::IN),
                    ];
                    poll(&mut fds, None).expect("poll");
                    if !fds[1].revents().is_empty() {
                        return;
                    }
                    let mut state = state.lock().expect("no thread panics");
                    while let Some(range) = next_change(&fd) {
                        changed(&mut state, range);
                    }
                }
            })
        };
        Ok(Self {
            fd,
            state,
            reader: Some(reader),
            stop,
        })
    }

    /// From now on, changes of this range are read.
    pub fn register(&self, range: &Range<u64>) -> Result<(), Errno> {
        let mut argument = uffdio_register {
            range: uffdio_range {
                start: range.start,
                len: range.end - range.start,
            },
            // The mode that costs least: nothing is ever protected.
            mode: UFFDIO_REGISTER_MODE_WP.into(),
            ioctls: 0,
        };
        // SAFETY: The argument is that of the call.
        unsafe { ioctl(&self.fd, Updater::<UFFDIO_REGISTER, _>::new(&mut argument)) }
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.state.lock().expect("the reader does not panic")
    }
}

impl<T> Drop for Monitor<T> {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &1_u64.to_ne_bytes()).expect("stop the reader");
        let joined = self
            .reader
            .take()
            .is_some_and(|reader| reader.join().is_ok());
        assert!(joined, "the reader of the userfaultfd panicked");
    }
}

fn next_change(fd: &OwnedFd) -> Option<Range<u64>> {
    let mut message = [0_u8; size_of::<uffd_msg>()];
    match read(fd, &mut message) {
        Ok(len) => assert_eq!(len, message.len(), "bytes read from the userfaultfd"),
        Err(Errno::AGAIN) => return None,
        Err(error) => panic!("read of the userfaultfd: {error}"),
    }
    // SAFETY: The kernel wrote a message, all of whose members are numbers.
    let message = unsafe { message.as_ptr().cast::<uffd_msg>().read_unaligned() };
    // SAFETY: All members of the union are numbers.
    let (remap, remove) = unsafe { (message.arg.remap, message.arg.remove) };
    Some(match u32::from(message.event) {
        UFFD_EVENT_REMAP => remap.from..remap.from + remap.len,
        UFFD_EVENT_UNMAP | UFFD_EVENT_REMOVE => remove.start..remove.end,
        event => panic!("event {event} of the userfaultfd"),
    })
}

fn userfault(rows: &mut Rows) -> Result<()> {
    let monitor = Monitor::new(0, |seen, _| *seen += 1)?;
    let bytes = |map: Map| map.at(0) as u64..map.at(PAGES) as u64;
    let mut changes = |name: &str, change: &dyn Fn(Map)| -> Result<()> {
        let [plain, monitored] = [false, true].map(|monitored| {
            sample(|| {
                let maps: Vec<_> = (0..BATCH).map(|_| Map::new(PAGES)).collect();
                let before = *monitor.lock();
                if monitored {
                    let ranges = maps.iter().map(|&map| bytes(map));
                    ranges.for_each(|range| monitor.register(&range).expect("UFFDIO_REGISTER"));
                }
                let count = each(BATCH, |n| change(maps[n]));
                let seen = *monitor.lock() - before;
                // A move also unmaps.
                assert!(monitored == (seen >= BATCH), "{seen} changes were read");
                count
            })
        });
        let params = [("peer", "userfaultfd".into())];
        rows.added(&format!("{name} of 64 KiB"), &params, monitored, plain);
        Ok(())
    };
    changes("munmap", &|map| map.unmap(0..PAGES))?;
    changes("MADV_DONTNEED", &|map| map.dont_need(0..PAGES))?;
    changes("mremap", &|map| {
        let to = map.void(0).wrapping_byte_add(1 << 40);
        // SAFETY: Nothing is mapped so far above maps, and no reference points into them.
        unsafe {
            mremap_fixed(
                map.void(0),
                PAGES * PAGE,
                PAGES * PAGE,
                MremapFlags::MAYMOVE,
                to,
            )
        }
        .expect("mremap");
    })?;
    let register = sample(|| {
        let maps: Vec<_> = (0..BATCH).map(|_| Map::new(PAGES)).collect();
        let count = each(BATCH, |n| {
            monitor.register(&bytes(maps[n])).expect("UFFDIO_REGISTER");
        });
        maps.iter().for_each(|map| map.unmap(0..PAGES));
        count
    });
    let params = [("peer", "userfaultfd".into())];
    rows.add("registration with the monitor", &params, register);
    Ok(())
}

/// A change of the mapping under an MR with on-demand paging, and the next access by the
/// device, which faults.
fn on_demand(rows: &mut Rows) -> Result<()> {
    let fixture = Fixture::new();
    let plain = |map: Map| MrArgs::new(map.at(0), PAGES * PAGE);
    let on_demand = |map: Map| MrArgs {
        access: plain(map).access | IBV_ACCESS_ON_DEMAND,
        ..plain(map)
    };
    let mut result = [[0.0; 2]; 2];
    let link = Link::new(&fixture.pd)?;
    // Its pages stay, so what it takes to free some is not counted.
    let file = memfd(PAGES, MemfdFlags::empty());
    for (result, args) in result
        .iter_mut()
        .zip([&plain as &dyn Fn(Map) -> MrArgs, &on_demand])
    {
        let map = Map::of_file(&file, PAGES, MapFlags::SHARED);
        (0..PAGES).for_each(|page| map.store(page, 1));
        let mr = reg_plain(&fixture.pd, &args(map));
        let mut bad = 0;
        *result = samples(15, || {
            let purged = count(|| map.dont_need(0..PAGES));
            (0..PAGES).for_each(|page| map.store(page, 1));
            let used = count(|| {
                let done = link.send(map.at(0) as u64, mr.lkey());
                bad += u32::from(done.is_err());
            });
            [purged, used]
        });
        ensure!(bad == 0, "a transfer failed");
        drop(mr);
        map.unmap(0..PAGES);
    }
    let params = [("peer", "on-demand paging".into())];
    let [plain, paged] = result;
    rows.added("MADV_DONTNEED of 64 KiB", &params, paged[0], plain[0]);
    rows.added("transfer after a change", &params, paged[1], plain[1]);
    Ok(())
}

// SPDX-License-Identifier: GPL-2.0
//! The whole job: transfers over RDMA from buffers whose mapping changes, with several
//! ways to have their registrations.

use crate::{
    measure::{median, now},
    peers::Monitor,
    row::{Param, Rows},
};
use anyhow::{Context, Result, ensure};
use std::{cell::Cell, collections::HashMap, io, mem::size_of, ops::Range, ptr, sync::Arc, thread};
use uverbs_mmu_notify::{
    Event, Mr, MrArgs, Pd, PlainMr, QpPair,
    cache::{Backend, Cache, Verbs},
    sys::verbs::*,
};
use uverbs_mmu_notify_tests::*;

/// The pages of a buffer: 64 KiB.
const PAGES: usize = 16;
const BUFFERS: usize = 16;
const TRANSFERS: usize = 512;
/// What is transferred of a buffer. Emulated transport costs so much that registration
/// would not be seen beside that of all of it.
const BYTES: u32 = 256;

/// A connected pair of queue pairs, and memory at the other end.
pub struct Link {
    pair: QpPair,
    remote: Map,
    mr: PlainMr,
}

impl Link {
    pub fn new(pd: &Arc<Pd>) -> Result<Self> {
        let remote = Map::new(1);
        Ok(Self {
            pair: QpPair::connect(pd).context("connecting the queue pairs")?,
            remote,
            mr: reg_plain(pd, &MrArgs::new(remote.at(0), PAGE)),
        })
    }

    /// RDMA WRITE from `addr` to the other end. While it waits it lets the kernel's
    /// threads run, which a spinning thread would keep from their only CPU.
    pub fn send(&self, addr: u64, lkey: u32) -> io::Result<()> {
        let mut sge = ibv_sge {
            addr,
            length: BYTES,
            lkey,
        };
        let mut wr = ibv_send_wr {
            sg_list: &mut sge,
            num_sge: 1,
            opcode: IBV_WR_RDMA_WRITE,
            ..Default::default()
        };
        wr.wr.rdma.remote_addr = self.remote.at(0) as u64;
        wr.wr.rdma.rkey = self.mr.rkey();
        let (qp, mut bad, mut wc) = (self.pair.as_ptr(), ptr::null_mut(), ibv_wc::default());
        // SAFETY: The QP, its context and its CQ are valid. The device touches registered
        // memory only.
        unsafe {
            let (ops, cq) = ((*(*qp).context).ops, (*qp).send_cq);
            let (post, poll) = (ops.post_send, ops.poll_cq);
            let (Some(post), Some(poll)) = (post, poll) else {
                return Err(io::ErrorKind::Unsupported.into());
            };
            match post(qp, &mut wr, &mut bad) {
                0 => (),
                error => return Err(io::Error::from_raw_os_error(error)),
            }
            loop {
                match poll(cq, 1, &mut wc) {
                    0 => thread::yield_now(),
                    1 if wc.status == IBV_WC_SUCCESS => return Ok(()),
                    _ => return Err(io::Error::other("the transfer failed")),
                }
            }
        }
    }

    /// The number that was sent last.
    fn received(&self) -> u64 {
        // SAFETY: It is mapped and aligned, and there is no reference to it.
        unsafe { self.remote.at(0).cast::<u64>().read_volatile() }
    }
}

/// A way to have the key of a buffer for a transfer.
trait Keys {
    fn with_key<R>(&self, range: Range<u64>, run: impl FnOnce(u32) -> R) -> io::Result<R>;
}

/// One MR for all: the transfer itself, whose data is that of a buffer of its own.
struct Bare(Mr);

impl Keys for Bare {
    fn with_key<R>(&self, _: Range<u64>, run: impl FnOnce(u32) -> R) -> io::Result<R> {
        Ok(run(self.0.lkey()))
    }
}

/// Registers for each transfer.
struct NoCache(Arc<Pd>);

impl Keys for NoCache {
    fn with_key<R>(&self, range: Range<u64>, run: impl FnOnce(u32) -> R) -> io::Result<R> {
        let mut mr = register(&self.0, &range)?;
        let result = run(mr.lkey());
        mr.destroy()?;
        Ok(result)
    }
}

fn register(pd: &Arc<Pd>, range: &Range<u64>) -> io::Result<Mr> {
    let addr = ptr::with_exposed_provenance(range.start as usize);
    try_reg(pd, &MrArgs::new(addr, (range.end - range.start) as usize))
}

/// A cache. It deregisters what is stale after a miss.
struct Cached<B: Backend<Mr = Mr>> {
    cache: Cache<Counted<B>>,
    last: Cell<u64>,
}

impl<B: Backend<Mr = Mr>> Cached<B> {
    fn new(backend: B) -> Self {
        Self {
            cache: Cache::new(Counted {
                backend,
                drained: Cell::new(0),
                registered: Cell::new(0),
            }),
            last: Cell::new(0),
        }
    }
}

impl<B: Backend<Mr = Mr>> Keys for Cached<B> {
    fn with_key<R>(&self, range: Range<u64>, run: impl FnOnce(u32) -> R) -> io::Result<R> {
        let entry = self.cache.get(range)?;
        let result = run(entry.mr().lkey());
        let cookie = entry.cookie();
        drop(entry);
        if cookie > self.last.replace(cookie.max(self.last.get())) {
            self.cache.reap()?;
        }
        Ok(result)
    }
}

/// Counts the instructions of drains, and registrations.
struct Counted<B> {
    backend: B,
    drained: Cell<u64>,
    registered: Cell<u64>,
}

impl<B: Backend<Mr = Mr>> Backend for Counted<B> {
    type Mr = Mr;

    #[inline(always)]
    fn generation(&self) -> u64 {
        self.backend.generation()
    }

    fn read(&self, events: &mut [Event]) -> io::Result<usize> {
        let start = now();
        let result = self.backend.read(events);
        self.drained.set(self.drained.get() + (now() - start));
        result
    }

    fn register(&self, range: &Range<u64>, cookie: u64) -> io::Result<Mr> {
        self.registered.set(self.registered.get() + 1);
        self.backend.register(range, cookie)
    }

    fn deregister(&self, mr: &mut Mr) -> io::Result<u32> {
        self.backend.deregister(mr)
    }
}

/// Nothing is ever noticed.
struct Unmonitored(Arc<Pd>);

impl Backend for Unmonitored {
    type Mr = Mr;

    fn generation(&self) -> u64 {
        0
    }

    fn read(&self, _: &mut [Event]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn register(&self, range: &Range<u64>, _: u64) -> io::Result<Mr> {
        register(&self.0, range)
    }

    fn deregister(&self, mr: &mut Mr) -> io::Result<u32> {
        mr.destroy()
    }
}

/// What the reader of a userfaultfd shares with the cache.
#[derive(Default)]
struct Watched {
    generation: u64,
    /// By cookie.
    ranges: HashMap<u64, Range<u64>>,
    pending: Vec<Event>,
    /// The cookie by the handle of the MR, and how many events of it were read.
    of_mr: HashMap<u32, u64>,
    read: HashMap<u64, u32>,
}

impl Watched {
    fn changed(&mut self, range: Range<u64>) {
        for (&cookie, watched) in &self.ranges {
            if watched.start < range.end && range.start < watched.end {
                self.generation += 1;
                self.pending.push(Event {
                    cookie,
                    generation: self.generation,
                    ..Default::default()
                });
            }
        }
    }
}

struct Userfaultfd {
    pd: Arc<Pd>,
    monitor: Monitor<Watched>,
}

impl Backend for Userfaultfd {
    type Mr = Mr;

    fn generation(&self) -> u64 {
        self.monitor.lock().generation
    }

    fn read(&self, events: &mut [Event]) -> io::Result<usize> {
        let mut watched = self.monitor.lock();
        let count = watched.pending.len().min(events.len());
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let read: Vec<_> = watched.pending.drain(..count).collect();
        for (to, event) in events.iter_mut().zip(read) {
            *to = event;
            *watched.read.entry(event.cookie).or_default() += 1;
        }
        Ok(count)
    }

    fn register(&self, range: &Range<u64>, cookie: u64) -> io::Result<Mr> {
        // Before the pages are pinned.
        self.monitor.lock().ranges.insert(cookie, range.clone());
        self.monitor.register(range)?;
        let mr = register(&self.pd, range)?;
        self.monitor.lock().of_mr.insert(mr.handle(), cookie);
        Ok(mr)
    }

    fn deregister(&self, mr: &mut Mr) -> io::Result<u32> {
        let handle = mr.handle();
        mr.destroy()?;
        let mut watched = self.monitor.lock();
        let cookie = watched.of_mr.remove(&handle).expect("it was registered");
        watched.ranges.remove(&cookie);
        watched.pending.retain(|event| event.cookie != cookie);
        Ok(watched.read.remove(&cookie).unwrap_or(0))
    }
}

/// What happens to a buffer's mapping, and after how many transfers of it.
#[derive(Clone, Copy)]
struct Trace {
    name: &'static str,
    uses: usize,
    /// Maps the next buffer where the last one was.
    same_address: bool,
}

const TRACES: [Trace; 3] = [
    Trace {
        name: "reuse-heavy",
        uses: 64,
        same_address: false,
    },
    Trace {
        name: "churn-heavy",
        uses: 8,
        same_address: false,
    },
    Trace {
        name: "same address",
        uses: 8,
        same_address: true,
    },
];

/// What a job took.
struct Done {
    instructions: f64,
    wrong: usize,
}

/// Buffers are used in turn, and each is replaced after some transfers, one of them at a
/// time.
fn run_trace(trace: Trace, link: &Link, own: Option<Map>, keys: &impl Keys) -> Result<Done> {
    let new = || Map::new(PAGES);
    let mut buffers: Vec<_> = (0..BUFFERS)
        .map(|n| (new(), n * trace.uses / BUFFERS))
        .collect();
    let mut wrong = 0;
    let start = now();
    for transfer in 0..TRANSFERS {
        let (buffer, used) = &mut buffers[transfer % BUFFERS];
        if *used == trace.uses {
            buffer.unmap(0..PAGES);
            match trace.same_address {
                true => {
                    buffer.map_over(0..PAGES);
                    (0..PAGES).for_each(|page| buffer.store(page, 0x11));
                }
                false => *buffer = new(),
            }
            *used = 0;
        }
        *used += 1;
        let range = buffer.at(0) as u64..buffer.at(PAGES) as u64;
        let number = transfer as u64 + 1;
        let from = own.unwrap_or(*buffer);
        for map in [*buffer, from] {
            // SAFETY: It is mapped and aligned, and there is no reference to it.
            unsafe { map.at(0).cast::<u64>().write_volatile(number) };
        }
        let sent = keys.with_key(range, |lkey| link.send(from.at(0) as u64, lkey));
        sent.context("registering a buffer")?.context("sending")?;
        wrong += usize::from(link.received() != number);
    }
    let instructions = (now() - start) as f64 / TRANSFERS as f64;
    buffers.iter().for_each(|buffer| buffer.0.unmap(0..PAGES));
    Ok(Done {
        instructions,
        wrong,
    })
}

/// The median of some runs, each with new keys, and the last of these.
fn repeat<K: Keys>(
    trace: Trace,
    link: &Link,
    own: Option<Map>,
    new: impl Fn() -> Result<K>,
) -> Result<(Done, K)> {
    // What is done only once is done then.
    run_trace(trace, link, own, &new()?)?;
    let mut runs = Vec::new();
    loop {
        let keys = new()?;
        let done = run_trace(trace, link, own, &keys)?;
        let wrong = done.wrong;
        runs.push(done.instructions);
        if runs.len() == 3 {
            let instructions = median(runs.into_iter());
            return Ok((
                Done {
                    instructions,
                    wrong,
                },
                keys,
            ));
        }
    }
}

pub fn run(rows: &mut Rows) -> Result<()> {
    const { assert!(BYTES as usize >= size_of::<u64>()) };
    for trace in TRACES {
        job(rows, trace)?;
    }
    Ok(())
}

fn job(rows: &mut Rows, trace: Trace) -> Result<()> {
    let fixture = Fixture::new();
    let (pd, link) = (&fixture.pd, Link::new(&fixture.pd)?);
    let own = Map::new(1);
    let bare = || Ok(Bare(reg(pd, &MrArgs::new(own.at(0), PAGE))));
    let (bare, _) = repeat(trace, &link, Some(own), bare)?;
    ensure!(bare.wrong == 0, "{} transfers were wrong", bare.wrong);

    let (none, _) = repeat(trace, &link, None, || Ok(NoCache(pd.clone())))?;
    let unmonitored = || Ok(Cached::new(Unmonitored(pd.clone())));
    let stale = repeat(trace, &link, None, unmonitored)?;
    let uffd = repeat(trace, &link, None, || {
        Ok(Cached::new(Userfaultfd {
            pd: pd.clone(),
            monitor: Monitor::new(Watched::default(), Watched::changed)?,
        }))
    })?;
    // SAFETY: Maps only, to which there are no references.
    let verbs = || Ok(Cached::new(unsafe { Verbs::new(pd) }?));
    let ours = repeat(trace, &link, None, verbs)?;
    ensure!(
        (stale.0.wrong != 0) == trace.same_address,
        "{}: {} transfers are wrong without a monitor",
        trace.name,
        stale.0.wrong
    );

    let params =
        |how: &str| -> [(&str, Param); 2] { [("trace", trace.name.into()), ("with", how.into())] };
    let mut show = |how: &str, done: &Done, registered: Option<u64>| {
        let params = params(how);
        rows.added(
            "job, each transfer",
            &params,
            done.instructions,
            bare.instructions,
        );
        rows.other("job, wrong data", &params, "transfers", done.wrong as f64);
        let registered = registered.map_or(TRANSFERS, |count| count as usize) as f64;
        rows.other("job, registrations", &params, "", registered);
    };
    let registered = |count: &Cell<u64>| Some(count.get());
    show("no cache", &none, None);
    show(
        "a cache, no monitor",
        &stale.0,
        registered(&stale.1.cache.backend().registered),
    );
    show(
        "userfaultfd",
        &uffd.0,
        registered(&uffd.1.cache.backend().registered),
    );
    show(
        "ours",
        &ours.0,
        registered(&ours.1.cache.backend().registered),
    );

    let drained = ours.1.cache.backend().drained.get() as f64 / TRANSFERS as f64;
    let over = |done: &Done| done.instructions - bare.instructions;
    let of = [("trace", trace.name.into())];
    let share = drained / over(&ours.0) * 100.0;
    rows.other("job, drains of what ours adds", &of, "%", share);
    let share = drained / ours.0.instructions * 100.0;
    rows.other("job, drains of all", &of, "%", share);
    let times = |peer: &Done| over(peer) / over(&ours.0);
    rows.other(
        "job, no cache adds more than ours",
        &of,
        "times",
        times(&none),
    );
    rows.other(
        "job, userfaultfd adds more than ours",
        &of,
        "times",
        times(&uffd.0),
    );
    Ok(())
}

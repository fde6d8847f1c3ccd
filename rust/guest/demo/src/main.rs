// SPDX-License-Identifier: GPL-2.0
//! Shows in three steps how a cached RDMA registration goes stale, how the
//! kernel tells of it, and that this costs nothing while nothing changes.
//! Whatever the text says is checked.

mod mapping;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use mapping::Mapping;
use perf_event::{Builder, Counter, events::Tracepoint};
use std::{cell::RefCell, collections::HashMap, fs, io, ops::Range, process::ExitCode, sync::Arc};
use uverbs_mmu_notify::{
    Context, Event, Location, Mr, MrArgs, Pd, PlainMr, QpPair,
    cache::{Backend, Cache, Verbs},
    sys::{uapi::*, verbs::IBV_WC_SUCCESS},
    wc_status_str,
};

const FIRST: &str = "first data";
const SECOND: &str = "more data!";
const LOOKUPS: u32 = 1_000_000;

/// Shows how the kernel tells of changes under RDMA memory regions.
///
/// Needs a kernel with CONFIG_INFINIBAND_USER_MMU_NOTIFY, the right to count
/// system calls, and tracefs. Exits 0 only if all that it says is true.
#[derive(Parser)]
struct Args {
    /// RDMA device; by default the first soft-RoCE one
    #[arg(long)]
    device: Option<String>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("mmu-notify-demo: FAILED: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let (name, context) = open(args.device.as_deref())?;
    let peer = Peer::new(&context)?;
    println!("An application caches the registration of a buffer, then changes the mapping.");
    println!("Peer and application talk over two connected RC queue pairs on {name}.");

    println!("\n1. Without notification");
    without_notification(&peer).context("step 1")?;
    println!("\n2. With notification");
    let supported = context.mmu_notify_supported()?;
    ensure!(supported, "step 2: this kernel cannot watch memory regions");
    // SAFETY: `Mapping` reaches all memory that is registered by raw pointers.
    let cache = Cache::new(Witness::new(unsafe { Verbs::new(&peer.pd) }?));
    let mut buffer = Mapping::new()?;
    with_notification(&peer, &cache, &mut buffer).context("step 2")?;
    println!("\n3. What a cache hit costs");
    fast_path(&cache, &mut buffer).context("step 3")?;
    println!("\nAll of this was checked while it happened.");
    Ok(())
}

fn without_notification(peer: &Peer) -> Result<()> {
    let mut buffer = Mapping::new()?;
    let args = MrArgs::new(buffer.addr(), buffer.len());
    // SAFETY: `Mapping` reaches its memory by raw pointers only.
    let mr = unsafe { PlainMr::reg(&peer.pd, &args) }?;
    say(
        "the application registers its buffer and caches the key",
        "",
    );
    let cache = HashMap::from([(buffer.addr(), mr)]);
    let cached = |buffer: &Mapping| Location::new(buffer.addr(), cache[&buffer.addr()].rkey());

    peer.write(FIRST, cached(&buffer))?;
    say(
        "RDMA WRITE by the peer, with the cached key: completion",
        "success",
    );
    expect(&buffer.get(FIRST.len()), FIRST.as_bytes())?;
    say_bytes("the application sees", &buffer.get(FIRST.len()));

    buffer.unmap()?;
    buffer.map()?;
    say("munmap, then mmap at the same address", "");
    peer.write(SECOND, cached(&buffer))?;
    say(
        "RDMA WRITE by the peer, with the cached key: completion",
        "success",
    );
    expect(&buffer.get(SECOND.len()), &[0; SECOND.len()])?;
    say_bytes("the application sees", &buffer.get(SECOND.len()));
    let gone = peer.read(SECOND.len(), cached(&buffer))?;
    expect(&gone, SECOND.as_bytes())?;
    say_bytes("the old page got it", &gone);
    println!("   => silent data corruption: all calls succeeded, the data is lost");
    Ok(())
}

fn with_notification(peer: &Peer, cache: &Cache<Witness>, buffer: &mut Mapping) -> Result<()> {
    let range = buffer.range();
    let entry = cache.get(range.clone())?;
    say(
        "the application registers its buffer, watched, cookie",
        entry.cookie(),
    );
    peer.write(FIRST, Location::new(buffer.addr(), entry.mr().rkey()))?;
    say(
        "RDMA WRITE by the peer, with the cached key: completion",
        "success",
    );
    expect(&buffer.get(FIRST.len()), FIRST.as_bytes())?;
    say_bytes("the application sees", &buffer.get(FIRST.len()));

    let before = cache.backend().generation();
    buffer.unmap()?;
    let after = cache.backend().generation();
    ensure!(after != before, "munmap left the generation at {before}");
    say(
        "munmap; on its return the generation is",
        format!("{before} -> {after}"),
    );
    buffer.map()?;

    let found = cache.lookup(&range)?;
    ensure!(found.is_none(), "the cache still has the stale entry");
    let events = cache.backend().take_events();
    let [event] = events[..] else {
        anyhow::bail!("expected one event, got {events:x?}");
    };
    ensure!(event.cookie == entry.cookie(), "wrong cookie: {event:x?}");
    ensure!((event.start..event.end) == range, "wrong range: {event:x?}");
    ensure!(event.generation == after, "wrong generation: {event:x?}");
    let unmapped = event.reasons & IB_UVERBS_MMU_NOTIFY_UNMAPPED != 0;
    ensure!(unmapped, "wrong reason: {event:x?}");
    say("the cache reads an event: unmapped, cookie", event.cookie);
    say("   range", format!("{:#x}-{:#x}", event.start, event.end));
    say("the cache drops the entry and deregisters; the kernel", "");
    drop(entry);
    let reaped = cache.reap()?;
    ensure!((reaped.regions, reaped.events) == (1, 1), "got {reaped:?}");
    say(
        "   says how many of its events were delivered",
        reaped.events,
    );

    let entry = cache.get(range.clone())?;
    say("the cache registers it again, cookie", entry.cookie());
    peer.write(SECOND, Location::new(buffer.addr(), entry.mr().rkey()))?;
    say(
        "RDMA WRITE by the peer, with the cached key: completion",
        "success",
    );
    expect(&buffer.get(SECOND.len()), SECOND.as_bytes())?;
    say_bytes("the application sees", &buffer.get(SECOND.len()));
    println!("   => the data arrived");
    Ok(())
}

fn fast_path(cache: &Cache<Witness>, buffer: &mut Mapping) -> Result<()> {
    let range = buffer.range();
    let mut counter = SyscallCounter::new()?;
    let calls = counter.count(|| {
        for _ in 0..1000 {
            let _ = rustix::process::getppid();
        }
    })?;
    ensure!(calls == 1000, "1000 getppid() were counted as {calls}");
    say("the kernel counts system calls; 1000 getppid() are", calls);

    let mut hits = 0;
    let calls = counter.count(|| {
        for _ in 0..LOOKUPS {
            hits += u32::from(matches!(cache.lookup(&range), Ok(Some(_))));
        }
    })?;
    ensure!(hits == LOOKUPS, "{hits} of {LOOKUPS} lookups were hits");
    ensure!(calls == 0, "{LOOKUPS} lookups made {calls} system calls");
    say(format!("{hits} cache hits, in system calls"), calls);

    buffer.unmap()?;
    let mut found = Ok(None);
    let calls = counter.count(|| found = cache.lookup(&range))?;
    ensure!(found?.is_none(), "the cache still has the stale entry");
    let events = cache.backend().take_events().len();
    ensure!((events, calls) == (1, 2), "{events} events, {calls} calls");
    say(
        "the lookup after a munmap, read() until EAGAIN: calls",
        calls,
    );
    Ok(())
}

fn say(text: impl AsRef<str>, value: impl ToString) {
    let line = format!("   {:<56}{}", text.as_ref(), value.to_string());
    println!("{}", line.trim_end());
}

fn say_bytes(text: &str, bytes: &[u8]) {
    let hex: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let text_of = |byte: &u8| {
        if byte.is_ascii_graphic() || *byte == b' ' {
            *byte as char
        } else {
            '.'
        }
    };
    let ascii: String = bytes.iter().map(text_of).collect();
    println!("   {text:<24}{}  \"{ascii}\"", hex.join(" "));
}

fn expect(got: &[u8], wanted: &[u8]) -> Result<()> {
    ensure!(
        got == wanted,
        "expected the bytes {wanted:02x?}, got {got:02x?}"
    );
    Ok(())
}

fn open(name: Option<&str>) -> Result<(String, Arc<Context>)> {
    if let Some(name) = name {
        let context = Context::open(name).with_context(|| format!("opening {name}"))?;
        return Ok((name.to_owned(), context));
    }
    for name in Context::devices().context("listing RDMA devices")? {
        let context = Context::open(&name).with_context(|| format!("opening {name}"))?;
        if context.driver_id() == RDMA_DRIVER_RXE {
            return Ok((name, context));
        }
    }
    anyhow::bail!("no soft-RoCE device; make one with `rdma link add rxe0 type rxe netdev ...`")
}

/// The other end of the connection, with a buffer of its own.
struct Peer {
    qp: QpPair,
    mr: PlainMr,
    buffer: RefCell<Mapping>,
    pd: Arc<Pd>,
}

impl Peer {
    fn new(context: &Arc<Context>) -> Result<Self> {
        let pd = Pd::alloc(context)?;
        let qp = QpPair::connect(&pd).context("connecting the queue pairs")?;
        let buffer = Mapping::new()?;
        let args = MrArgs::new(buffer.addr(), buffer.len());
        // SAFETY: `Mapping` reaches its memory by raw pointers only.
        let mr = unsafe { PlainMr::reg(&pd, &args) }?;
        let buffer = RefCell::new(buffer);
        Ok(Self { qp, mr, buffer, pd })
    }

    /// RDMA WRITE of `text` to `remote`.
    fn write(&self, text: &str, remote: Location) -> Result<()> {
        let mut buffer = self.buffer.borrow_mut();
        buffer.put(text.as_bytes());
        let local = Location::new(buffer.addr(), self.mr.lkey());
        let status = self.qp.write(local, remote, text.len() as u32)?;
        ensure!(
            status == IBV_WC_SUCCESS,
            "RDMA WRITE: {}",
            wc_status_str(status)
        );
        Ok(())
    }

    /// RDMA READ of `len` bytes from `remote`.
    fn read(&self, len: usize, remote: Location) -> Result<Vec<u8>> {
        let mut buffer = self.buffer.borrow_mut();
        buffer.put(&vec![0; len]);
        let local = Location::new(buffer.addr(), self.mr.lkey());
        let status = self.qp.read(local, remote, len as u32)?;
        ensure!(
            status == IBV_WC_SUCCESS,
            "RDMA READ: {}",
            wc_status_str(status)
        );
        Ok(buffer.get(len))
    }
}

/// The kernel, with a record of the events that the cache read from it.
struct Witness {
    verbs: Verbs,
    events: RefCell<Vec<Event>>,
}

impl Witness {
    fn new(verbs: Verbs) -> Self {
        let events = RefCell::default();
        Self { verbs, events }
    }

    fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.borrow_mut())
    }
}

impl Backend for Witness {
    type Mr = Mr;

    fn generation(&self) -> u64 {
        self.verbs.generation()
    }

    fn read(&self, events: &mut [Event]) -> io::Result<usize> {
        let count = self.verbs.read(events)?;
        self.events.borrow_mut().extend(&events[..count]);
        Ok(count)
    }

    fn register(&self, range: &Range<u64>, cookie: u64) -> io::Result<Mr> {
        self.verbs.register(range, cookie)
    }

    fn deregister(&self, mr: &mut Mr) -> io::Result<u32> {
        self.verbs.deregister(mr)
    }
}

/// The kernel's own count of the system calls of this thread.
struct SyscallCounter(Counter);

impl SyscallCounter {
    fn new() -> Result<Self> {
        let path = "/sys/kernel/tracing/events/raw_syscalls/sys_enter/id";
        let id = fs::read_to_string(path).with_context(|| format!("{path} (is tracefs there?)"))?;
        let event = Tracepoint::with_id(id.trim().parse()?);
        let counter = Builder::new(event).include_kernel().build();
        Ok(Self(counter.context("counting system calls")?))
    }

    fn count(&mut self, f: impl FnOnce()) -> Result<u64> {
        self.0.reset()?;
        self.0.enable()?;
        f();
        self.0.disable()?;
        // The call that ends the counting is the last one counted.
        let calls = self.0.read()?.checked_sub(1);
        calls.context("the kernel counted nothing at all")
    }
}

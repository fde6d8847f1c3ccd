// SPDX-License-Identifier: GPL-2.0
//! What depends on how many watches the process has: hits, changes elsewhere,
//! registrations, memory.

use crate::{
    measure::{BATCH, Pair, SAMPLES, each, pairs, sample},
    row::{Param, Rows},
};
use anyhow::{Context, Result};
use rustix::{
    fs::MemfdFlags,
    io::{read, write},
    mm::{MapFlags, MprotectFlags},
    mount::{MountFlags, mount},
};
use std::{fs, os::unix::net::UnixStream, path::Path, sync::Arc};
use uverbs_mmu_notify::{MrArgs, NotifyQueue, Pd};
use uverbs_mmu_notify_tests::*;

/// The pages of what is changed: 64 KiB.
const PAGES: usize = 16;

const CHANGES: [&str; 5] = ["munmap", "mprotect", "fork", "COW fault", "MADV_DONTNEED"];
const DONTNEED: usize = 4;
type Changes = [f64; CHANGES.len()];

/// What each of the changes takes, of memory that is not registered. Pages of a file stay,
/// so what it takes to free them is not in it, which depends on who has freed pages before.
fn changes() -> Changes {
    let file = memfd(PAGES, MemfdFlags::empty());
    let maps = || {
        let maps = (0..BATCH).map(|_| Map::of_file(&file, PAGES, MapFlags::SHARED));
        let maps: Vec<_> = maps.collect();
        for map in &maps {
            (0..PAGES).for_each(|page| map.store(page, 1));
        }
        maps
    };
    let unmap = |maps: Vec<Map>| maps.iter().for_each(|map| map.unmap(0..PAGES));
    [
        sample(|| {
            let maps = maps();
            each(BATCH, |n| maps[n].unmap(0..PAGES))
        }),
        sample(|| {
            let maps = maps();
            let count = each(BATCH, |n| maps[n].protect(0..PAGES, MprotectFlags::READ));
            unmap(maps);
            count
        }),
        // With the end of the child.
        sample(|| each(4, |_| assert_eq!(in_child(|| 0), Exit::Code(0)))),
        sample(|| {
            let map = Map::untouched(BATCH);
            for page in 0..BATCH {
                map.load(page);
            }
            let count = each(BATCH, |page| map.store(page, 1));
            map.unmap(0..BATCH);
            count
        }),
        sample(|| {
            let maps = maps();
            let count = each(BATCH, |n| maps[n].dont_need(0..PAGES));
            unmap(maps);
            count
        }),
    ]
}

/// A process that never opens an RDMA device.
struct Bystander(UnixStream, Option<Child>);

impl Bystander {
    fn new() -> Self {
        let (orders, its) = UnixStream::pair().expect("make a pair of sockets");
        let child = Child::fork(|| {
            while read(&its, &mut [0; 1]).is_ok_and(|len| len == 1) {
                for value in changes() {
                    write(&its, &value.to_ne_bytes()).expect("answer");
                }
            }
            0
        });
        Self(orders, Some(child))
    }

    fn changes(&self) -> Changes {
        write(&self.0, &[0]).expect("give an order");
        [(); CHANGES.len()].map(|()| {
            let mut value = [0; 8];
            let len = read(&self.0, &mut value).expect("read the answer");
            assert_eq!(len, value.len(), "the bystander has ended");
            f64::from_ne_bytes(value)
        })
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.1.take().expect("it lives").kill();
    }
}

/// Watches of pages of their own.
struct Elsewhere<'a> {
    fixture: &'a Fixture,
    /// How many there are.
    count: usize,
}

impl Elsewhere<'_> {
    /// A fork would copy what is pinned, so it is not for children.
    fn grow(&mut self, count: usize) {
        let pages = count - self.count;
        if pages != 0 {
            let map = Map::new(pages);
            map.advise(0..pages, libc::MADV_DONTFORK).expect("madvise");
            for page in 0..pages {
                let cookie = (self.count + page) as u64;
                // They live as long as the process. A list of them would make it larger.
                std::mem::forget(self.fixture.watch(map, page..page + 1, cookie));
            }
            self.count = count;
        }
    }
}

/// The slab and vmalloc memory that is charged to a cgroup of this process's own.
struct Charged(String);

impl Charged {
    fn new() -> Result<Self> {
        let mut root = Path::new("/sys/fs/cgroup");
        if !root.join("cgroup.controllers").exists() {
            root = Path::new("/mnt");
            mount("none", root, "cgroup2", MountFlags::empty(), None).context("mount cgroup2")?;
        }
        let group = root.join("mmu-notify-bench");
        fs::write(root.join("cgroup.subtree_control"), "+memory").context("enable memcg")?;
        if !group.exists() {
            fs::create_dir(&group).context("make a cgroup")?;
        }
        fs::write(group.join("cgroup.procs"), "0").context("move to a cgroup")?;
        Ok(Self(group.join("memory.stat").display().to_string()))
    }

    fn bytes(&self) -> f64 {
        let text = fs::read_to_string(&self.0).expect("read memory.stat");
        let value = |name: &str| -> f64 {
            let mut lines = text.lines();
            let found = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            found.and_then(|value| value.parse().ok()).unwrap_or(0.0)
        };
        value("slab") + value("vmalloc")
    }
}

fn compare(rows: &mut Rows, process: &str, now: Changes, before: Changes) {
    for (n, change) in CHANGES.iter().enumerate() {
        let params = [("change", (*change).into()), ("process", process.into())];
        rows.added("bystander", &params, now[n], before[n]);
    }
}

/// Needs a process that has opened nothing yet.
pub fn run(rows: &mut Rows, most: usize) -> Result<()> {
    let bystander = Bystander::new();
    let of_bystander = bystander.changes();
    let pd = open();
    let before = changes();
    let context = pd.context().clone();
    let queue = NotifyQueue::alloc(&context)?;
    queue.set_nonblocking(true)?;
    let page = queue.generation_page()?;
    let fixture = Fixture {
        context,
        pd,
        queue,
        page,
    };
    let mut now = changes();
    compare(rows, "an FD, no watch", now, before);

    let mut elsewhere = Elsewhere {
        fixture: &fixture,
        count: 0,
    };
    let (mut hits, mut registrations) = (Vec::new(), Vec::new());
    for count in [0, 100, 1000, 10_000, 100_000] {
        if count > most {
            rows.skip(&format!("{count} watches elsewhere: --watches is {most}"));
            continue;
        }
        elsewhere.grow(count);
        if matches!(count, 100 | 10_000 | 100_000) {
            now = changes();
            compare(rows, &format!("{count} watches elsewhere"), now, before);
        }
        if count != 1000 {
            // Of what a bystander pays the steadiest, which changes no tree of mappings.
            let bystander = now[DONTNEED] - before[DONTNEED];
            hits.push((count, hit(rows, &fixture, count, bystander)));
        }
        if count != 10_000 {
            registrations.push((count, registration(rows, &fixture, count)));
        }
    }
    growth(rows, "growth of a hit", &hits);
    growth(rows, "growth of a registration and its end", &registrations);
    // Nothing that another process does is to be seen here.
    compare(rows, "no FD", bystander.changes(), of_bystander);
    Ok(())
}

/// What is charged. Each watch has an object of the slab, which a cgroup is charged for
/// together with others, so it takes many to see one.
pub fn memory(rows: &mut Rows, most: usize) -> Result<()> {
    const QUEUES: usize = 100;
    let charged = Charged::new()?;
    let fixture = Fixture::new();
    let mut queues = Vec::with_capacity(QUEUES);
    let before = charged.bytes();
    for _ in 0..QUEUES {
        queues.push(NotifyQueue::alloc(&fixture.context)?);
    }
    let each = (charged.bytes() - before) / QUEUES as f64;
    let params = [("queues", QUEUES.into())];
    rows.other("memory, charged for each queue", &params, "bytes", each);

    let mut elsewhere = Elsewhere {
        fixture: &fixture,
        count: 0,
    };
    for count in [1000, 10_000, 100_000]
        .into_iter()
        .filter(|count| *count <= most)
    {
        let (before, had) = (charged.bytes(), elsewhere.count);
        elsewhere.grow(count);
        let each = (charged.bytes() - before) / (count - had) as f64;
        let params = [("watches", count.into())];
        rows.other("memory, charged for each watch", &params, "bytes", each);
    }
    Ok(())
}

/// From 100 watches elsewhere to the most.
fn growth(rows: &mut Rows, name: &str, figures: &[(usize, f64)]) {
    let of = |wanted: usize| figures.iter().find(|figure| figure.0 == wanted);
    let (Some(few), Some(many)) = (of(100), of(100_000)) else {
        return rows.skip(&format!("{name}: there are no figures for it"));
    };
    let params = [("from", few.0.into()), ("to", many.0.into())];
    rows.other(name, &params, "%", (many.1 / few.1 - 1.0) * 100.0);
}

/// munmap() of 64 KiB that are registered; watched with a queue.
fn unmap(queue: Option<&Fixture>, pd: &Arc<Pd>) -> f64 {
    let maps: Vec<_> = (0..BATCH).map(|_| Map::new(PAGES)).collect();
    let register = |map: &Map| {
        let args = MrArgs::new(map.at(0), PAGES * PAGE);
        let watched = queue.map(|fixture| args.watched(&fixture.queue, u64::MAX));
        reg(pd, &watched.unwrap_or(args))
    };
    let mrs: Vec<_> = maps.iter().map(register).collect();
    let count = each(BATCH, |n| maps[n].unmap(0..PAGES));
    if let Some(fixture) = queue {
        assert_eq!(read_all(&fixture.queue).len(), BATCH, "events");
    }
    drop(mrs);
    count
}

/// Returns what is added altogether, to what it takes in a process without an FD.
fn hit(rows: &mut Rows, fixture: &Fixture, elsewhere: usize, bystander: f64) -> f64 {
    let [pair] = pairs(SAMPLES, |watched| {
        [unmap(watched.then_some(fixture), &fixture.pd)]
    });
    let params: [(_, Param); _] = [("elsewhere", elsewhere.into())];
    rows.pair("hit, munmap of 64 KiB", &params, pair);
    let with_fd = Pair {
        plain: pair.plain - bystander,
        more: pair.more + bystander,
    };
    rows.pair("hit, munmap of 64 KiB, with the FD", &params, with_fd);
    with_fd.more
}

/// Registrations of several sizes, and their ends. Returns what watching adds to both, of
/// 64 KiB.
fn registration(rows: &mut Rows, fixture: &Fixture, elsewhere: usize) -> f64 {
    let mut of_64k = 0.0;
    for (pages, size, batch) in [
        (1, "4 KiB", BATCH),
        (16, "64 KiB", BATCH),
        (256, "1 MiB", 4),
        (4096, "16 MiB", 1),
    ] {
        let map = Map::new(pages);
        let [began, ended] = pairs(SAMPLES, |watched| {
            let args = MrArgs::new(map.at(0), pages * PAGE);
            let args = match watched {
                true => args.watched(&fixture.queue, u64::MAX),
                false => args,
            };
            let mut mrs = Vec::with_capacity(batch);
            let began = each(batch, |_| mrs.push(reg(&fixture.pd, &args)));
            [began, each(batch, |n| drop(mrs[n].destroy()))]
        });
        map.unmap(0..pages);
        let params = [("size", size.into()), ("elsewhere", elsewhere.into())];
        rows.pair("REG_MR", &params, began);
        rows.pair("MR_DESTROY", &params, ended);
        if pages == PAGES {
            let both = Pair {
                plain: began.plain + ended.plain,
                more: began.more + ended.more,
            };
            rows.pair("REG_MR and MR_DESTROY", &params, both);
            of_64k = both.more;
        }
    }
    of_64k
}

// SPDX-License-Identifier: GPL-2.0
//! Measures how often a region is born stale: how many of 100 registrations of
//! memory of each kind have an event when they return.

use rustix::{fs::MemfdFlags, mm::MapFlags};
use std::{env, fs, os::fd::OwnedFd, process::Command};
use uverbs_mmu_notify::{MrArgs, sys::verbs::*};
use uverbs_mmu_notify_tests::*;

const TRIES: usize = 100;
const PAGES: usize = 16;
const HUGE: usize = 512;

/// Memory of a kind that has not been registered yet.
struct Memory {
    map: Map,
    pages: usize,
    /// What to unmap, if not `map`.
    whole: Option<(Map, usize)>,
    child: Option<Child>,
    keep: Keep,
}

/// What has to live until after the registration.
type Keep = Option<Box<dyn std::any::Any>>;

impl Memory {
    fn new(map: Map, pages: usize) -> Self {
        Self {
            map,
            pages,
            whole: Some((map, pages)),
            child: None,
            keep: None,
        }
    }

    /// Of the process itself: not unmapped.
    fn lent(addr: *mut u8, keep: impl std::any::Any) -> Self {
        let first = (addr as usize).next_multiple_of(PAGE);
        let map = Map::existing(std::ptr::with_exposed_provenance_mut(first));
        Self {
            whole: None,
            keep: Some(Box::new(keep)),
            ..Self::new(map, PAGES)
        }
    }

    fn written(self) -> Self {
        (0..self.pages).for_each(|page| self.map.store(page, 0x11));
        self
    }

    fn read(self) -> Self {
        (0..self.pages).for_each(|page| {
            self.map.load(page);
        });
        self
    }

    fn with_child(self) -> Self {
        let child = Some(Child::idle());
        Self { child, ..self }
    }

    fn after_child(self) -> Self {
        assert_eq!(in_child(|| 0), Exit::Code(0), "the child");
        self
    }
}

fn anonymous() -> Memory {
    Memory::new(Map::untouched(PAGES), PAGES)
}

fn malloc(zeroed: bool) -> Memory {
    // Less than what malloc() maps by itself, so from its heap.
    let len = (PAGES + 1) * PAGE;
    let mut buffer: Vec<u8> = Vec::with_capacity(len);
    if zeroed {
        buffer.resize(len, 1);
    }
    Memory::lent(buffer.as_mut_ptr(), buffer)
}

fn huge_page(advice: i32) -> Memory {
    let whole = Map::untouched(2 * HUGE);
    let first = (whole.at(0) as usize).wrapping_neg() / PAGE % HUGE;
    let map = Map::existing(whole.void(first));
    map.advise(0..HUGE, advice).expect("madvise");
    Memory {
        whole: Some((whole, 2 * HUGE)),
        ..Memory::new(map, HUGE)
    }
}

fn hugetlb() -> Memory {
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB;
    Memory::new(Map::anonymous(HUGE, flags), HUGE)
}

fn of_file(file: OwnedFd, flags: MapFlags) -> Memory {
    let map = Map::of_file(&file, PAGES, flags);
    Memory {
        keep: Some(Box::new(file)),
        ..Memory::new(map, PAGES)
    }
}

fn in_memory(flags: MapFlags) -> Memory {
    of_file(memfd(PAGES, MemfdFlags::empty()), flags)
}

/// A file with a page cache of its own, written and cached.
fn cached(flags: MapFlags) -> Memory {
    let path = "/mnt/born-stale";
    fs::write(path, vec![1; PAGES * PAGE]).expect("write a file");
    let file = fs::File::options().read(true).write(true).open(path);
    of_file(file.expect("open the file").into(), flags)
}

fn mount() {
    for command in ["mkfs.ext2 -q /dev/ram0", "mount /dev/ram0 /mnt"] {
        let words: Vec<_> = command.split(' ').collect();
        let status = Command::new(words[0]).args(&words[1..]).status();
        assert!(status.is_ok_and(|status| status.success()), "{command}");
    }
    fs::write("/proc/sys/vm/nr_hugepages", "8").expect("reserve huge pages");
}

fn stack() -> Memory {
    let mut buffer = [1_u8; (PAGES + 1) * PAGE];
    // The frame is gone when this is registered, but the stack is not.
    Memory::lent(std::hint::black_box(&mut buffer).as_mut_ptr(), ())
}

static mut DATA: [u8; (PAGES + 1) * PAGE] = [1; (PAGES + 1) * PAGE];

fn data() -> Memory {
    Memory::lent((&raw mut DATA).cast(), ())
}

/// A kind of memory: its name, and how to make some.
type Kind = (&'static str, fn() -> Memory);

const KINDS: &[Kind] = &[
    ("anonymous, untouched", anonymous),
    ("anonymous, written", || anonymous().written()),
    ("anonymous, read (zero page)", || anonymous().read()),
    ("anonymous, shared, written", || {
        Memory::new(Map::anonymous(PAGES, MapFlags::SHARED), PAGES).written()
    }),
    ("malloc, untouched, maybe used before", || malloc(false)),
    ("malloc, written", || malloc(true)),
    ("stack", || stack().written()),
    (".data, as the last try left it", data),
    ("written, child alive", || {
        anonymous().written().with_child()
    }),
    ("written, child has exited", || {
        anonymous().written().after_child()
    }),
    ("read, child has exited", || {
        anonymous().read().after_child()
    }),
    ("written by us after a child has exited", || {
        anonymous().written().after_child().written()
    }),
    ("huge page, untouched", || huge_page(libc::MADV_HUGEPAGE)),
    ("huge page, written", || {
        huge_page(libc::MADV_HUGEPAGE).written()
    }),
    ("huge page, read (huge zero page)", || {
        huge_page(libc::MADV_HUGEPAGE).read()
    }),
    ("huge page, written, child alive", || {
        huge_page(libc::MADV_HUGEPAGE).written().with_child()
    }),
    ("hugetlb, untouched", hugetlb),
    ("hugetlb, written", || hugetlb().written()),
    ("hugetlb, written, child has exited", || {
        hugetlb().written().after_child()
    }),
    ("memfd, shared, untouched", || in_memory(MapFlags::SHARED)),
    ("memfd, shared, written", || {
        in_memory(MapFlags::SHARED).written()
    }),
    ("memfd, private, read", || {
        in_memory(MapFlags::PRIVATE).read()
    }),
    ("memfd, private, written", || {
        in_memory(MapFlags::PRIVATE).written()
    }),
    ("file, private, untouched", || cached(MapFlags::PRIVATE)),
    ("file, private, read", || cached(MapFlags::PRIVATE).read()),
    ("file, private, written", || {
        cached(MapFlags::PRIVATE).written()
    }),
    ("file, shared, read", || cached(MapFlags::SHARED).read()),
];

/// How many of the tries were born stale, and how many of these were again at
/// the next registration; or the error.
fn measure(fixture: &Fixture, make: fn() -> Memory, access: u32) -> String {
    let (mut stale, mut again) = (0, 0);
    for _ in 0..TRIES {
        let memory = make();
        let args = MrArgs {
            access,
            ..fixture.args(memory.map, 0..memory.pages, 1)
        };
        for count in [&mut stale, &mut again] {
            let before = fixture.page.load();
            match try_reg(&fixture.pd, &args) {
                Ok(mr) => drop(mr),
                Err(e) => return e.to_string(),
            }
            if fixture.page.load() == before {
                break;
            }
            *count += 1;
        }
        memory.child.map(Child::kill);
        if let Some((map, pages)) = memory.whole {
            map.unmap(0..pages);
        }
        drop(memory.keep);
    }
    format!("{stale} ({again})")
}

fn main() {
    const READ: u32 = IBV_ACCESS_REMOTE_READ;
    const WRITE: u32 = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
    mount();
    let fixture = Fixture::new();
    let only = env::args().nth(1).unwrap_or_default();
    println!("Born stale of {TRIES} (and again when registered once more), by access:");
    println!("{:45} {:>12} {:>12}", "memory", "write", "read");
    for (name, make) in KINDS.iter().filter(|(name, _)| name.contains(&only)) {
        let [write, read] = [WRITE, READ].map(|access| measure(&fixture, *make, access));
        println!("{name:45} {write:>12} {read:>12}");
    }
}

// SPDX-License-Identifier: GPL-2.0
//! The random numbers, and their guidance by KCOV.
//!
//! What a step does depends on the numbers that it takes. If it makes the kernel go where no
//! step went before, they are kept. With guidance every other step begins with kept numbers,
//! one of which is changed, or whose last ones are left out.

use crate::report::shared;
use linux_raw_sys::ioctl::{KCOV_ENABLE, KCOV_INIT_TRACE};
use rand::{
    RngExt, SeedableRng, TryRng, rand_core::utils::fill_bytes_via_next_word, rngs::SmallRng,
};
use std::{
    convert::Infallible,
    fs::OpenOptions,
    os::fd::AsRawFd,
    slice,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
};

/// Numbers of a step that are kept.
const LONGEST: usize = 128;
const INPUTS: usize = 1 << 13;
const NUMBERS: usize = 1 << 20;
/// Words of the set of edges.
const EDGES: usize = 1 << 20;

/// What the episodes share. Only one of their threads uses it at a time.
pub struct Guide {
    /// A set of hashes: a place of the kernel, and the one before.
    edges: [AtomicU64; EDGES],
    reached: AtomicU64,
    inputs: [[AtomicU64; LONGEST]; INPUTS],
    lengths: [AtomicUsize; INPUTS],
    kept: AtomicUsize,
    /// All numbers of this episode.
    numbers: [AtomicU64; NUMBERS],
    taken: AtomicUsize,
}

impl Guide {
    pub fn new() -> &'static Self {
        // SAFETY: Atomics may be zero.
        unsafe { shared() }
    }

    /// A new episode begins.
    pub fn clear(&self) {
        self.taken.store(0, Relaxed);
    }

    /// The numbers that repeat the episode.
    pub fn numbers(&self) -> Vec<u8> {
        let numbers = &self.numbers[..self.taken.load(Relaxed).min(NUMBERS)];
        numbers
            .iter()
            .flat_map(|n| n.load(Relaxed).to_ne_bytes())
            .collect()
    }

    /// Prints what KCOV has counted, if there is KCOV.
    pub fn print(&self) {
        let (reached, kept) = (self.reached.load(Relaxed), self.kept.load(Relaxed));
        if reached > 0 {
            println!("{reached} edges of the kernel's code reached, by {kept} steps");
        }
    }

    /// Adds places to the set. Whether there is a new edge.
    fn reach(&self, places: &[AtomicU64]) -> bool {
        let mut before = 0_u64;
        let mut new = 0;
        for place in places {
            let place = place.load(Relaxed);
            let hash = (before.rotate_left(32) ^ place).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let bit = (hash >> 32) as usize % (64 * EDGES);
            let old = self.edges[bit / 64].fetch_or(1 << (bit % 64), Relaxed);
            new += u64::from(old & 1 << (bit % 64) == 0);
            before = place;
        }
        self.reached.fetch_add(new, Relaxed);
        new > 0
    }

    fn keep(&self, numbers: &[u64]) {
        let at = self.kept.load(Relaxed);
        if at == INPUTS || numbers.is_empty() {
            return;
        }
        let length = numbers.len().min(LONGEST);
        for (slot, number) in self.inputs[at].iter().zip(numbers) {
            slot.store(*number, Relaxed);
        }
        self.lengths[at].store(length, Relaxed);
        self.kept.store(at + 1, Relaxed);
    }

    /// Some kept numbers, changed.
    fn choose(&self, random: &mut SmallRng) -> Vec<u64> {
        let kept = self.kept.load(Relaxed);
        if kept == 0 {
            return Vec::new();
        }
        let at = random.random_range(0..kept);
        let slots = &self.inputs[at][..self.lengths[at].load(Relaxed)];
        let mut numbers: Vec<_> = slots.iter().map(|slot| slot.load(Relaxed)).collect();
        let at = random.random_range(0..numbers.len());
        match random.random_ratio(1, 4) {
            true => numbers.truncate(at),
            false => numbers[at] = random.random(),
        }
        numbers
    }
}

/// What KCOV recorded of this thread: the number of places, then these.
struct Kcov(&'static [AtomicU64]);

impl Kcov {
    const PLACES: usize = 1 << 16;

    /// None if the kernel has no KCOV.
    fn start() -> Option<Self> {
        let path = "/sys/kernel/debug/kcov";
        let file = OpenOptions::new().read(true).write(true).open(path).ok()?;
        // SAFETY: It accesses no memory of this process.
        let ret = unsafe { libc::ioctl(file.as_raw_fd(), KCOV_INIT_TRACE.into(), Self::PLACES) };
        assert_eq!(ret, 0, "KCOV_INIT_TRACE");
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let (len, fd) = (8 * Self::PLACES, file.as_raw_fd());
        // SAFETY: A new mapping.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        assert_ne!(addr, libc::MAP_FAILED, "mmap of KCOV");
        // SAFETY: From now on the kernel writes to the mapping only.
        let ret = unsafe { libc::ioctl(fd, KCOV_ENABLE.into(), 0_u64) };
        assert_eq!(ret, 0, "KCOV_ENABLE");
        // SAFETY: The mapping has so many words, all of which are accessed as atomics. It is never
        // unmapped, and holds the file.
        Some(Self(unsafe {
            slice::from_raw_parts(addr.cast(), Self::PLACES)
        }))
    }

    fn clear(&self) {
        self.0[0].store(0, Relaxed);
    }

    fn places(&self) -> &[AtomicU64] {
        &self.0[1..=self.0[0].load(Relaxed) as usize]
    }
}

/// Random numbers, some of which are given.
pub struct Choices {
    random: SmallRng,
    guide: &'static Guide,
    kcov: Option<Kcov>,
    guided: bool,
    given: std::vec::IntoIter<u64>,
    /// Those of this step.
    step: Vec<u64>,
}

impl Choices {
    /// The numbers of an episode, which begin with the `given` ones. Call it as root.
    pub fn new(seed: u64, guide: &'static Guide, guided: bool, given: Vec<u64>) -> Self {
        let kcov = Kcov::start();
        assert!(
            kcov.is_some() || !guided,
            "the kernel has no KCOV: the debug kernel has"
        );
        Self {
            random: SmallRng::seed_from_u64(seed),
            guide,
            kcov,
            guided,
            given: given.into_iter(),
            step: Vec::new(),
        }
    }

    /// This is a forked child, of which KCOV does not know.
    pub fn enter_child(&mut self) {
        if self.kcov.is_some() {
            self.kcov = Some(Kcov::start().expect("KCOV in the child"));
        }
    }

    pub fn begin_step(&mut self) {
        self.step.clear();
        if self.guided && self.random.random() {
            self.given = self.guide.choose(&mut self.random).into_iter();
        }
        if let Some(kcov) = &self.kcov {
            kcov.clear();
        }
    }

    pub fn end_step(&mut self) {
        if let Some(kcov) = &self.kcov
            && self.guide.reach(kcov.places())
        {
            self.guide.keep(&self.step);
        }
        if self.guided {
            self.given = Vec::new().into_iter();
        }
    }
}

impl TryRng for Choices {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        // The lower bits of its numbers are no worse.
        self.try_next_u64().map(|number| number as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let number = self.given.next().unwrap_or_else(|| self.random.random());
        self.step.push(number);
        let at = self.guide.taken.fetch_add(1, Relaxed);
        if let Some(slot) = self.guide.numbers.get(at) {
            slot.store(number, Relaxed);
        }
        Ok(number)
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        fill_bytes_via_next_word(bytes, || self.try_next_u64())
    }
}

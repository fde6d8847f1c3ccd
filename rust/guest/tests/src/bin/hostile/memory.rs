// SPDX-License-Identifier: GPL-2.0
//! What the kernel may write to, and system calls with any arguments.

use crate::guide::Choices;
use libc::c_long;
use rand::RngExt;
use rustix::mm::MprotectFlags;
use std::{io, ops::Range, ptr, slice};
use uverbs_mmu_notify_tests::*;

/// What a system call returned, or the errno.
pub type Answer = Result<u64, i32>;

/// Makes a system call.
pub fn sys(number: c_long, args: &[u64]) -> Answer {
    let arg = |n: usize| args.get(n).copied().unwrap_or(0);
    // SAFETY: The kernel checks addresses. The memory that it may change is that of a `Map` or
    // of a `Room`, to which there are no references meanwhile.
    let ret = unsafe { libc::syscall(number, arg(0), arg(1), arg(2), arg(3), arg(4), arg(5)) };
    match ret {
        -1 => Err(io::Error::last_os_error().raw_os_error().expect("an errno")),
        ret => Ok(ret as u64),
    }
}

const POISON: u8 = 0xa5;

/// A page for requests and buffers, filled with poison before each call. Behind it are a page
/// that cannot be accessed, one that cannot be written, and a hole.
pub struct Room {
    map: Map,
    before: Vec<u8>,
    after: Vec<u8>,
    allowed: Vec<Range<usize>>,
    next: usize,
}

impl Room {
    /// Requests are in front of this, unless they are at the end.
    const BUFFERS: usize = 512;
    const SLOT: usize = 64;

    pub fn new() -> Self {
        let map = Map::new(4);
        map.protect(1..2, MprotectFlags::empty());
        map.protect(2..3, MprotectFlags::READ);
        map.unmap(3..4);
        Self {
            map,
            before: vec![POISON; PAGE],
            after: Vec::new(),
            allowed: Vec::new(),
            next: 0,
        }
    }

    pub fn addr(&self, offset: usize) -> u64 {
        self.map.at(0) as u64 + offset as u64
    }

    /// Whether all of `len` bytes at `addr` can be written.
    pub fn holds(&self, addr: u64, len: u64) -> bool {
        addr.checked_sub(self.addr(0))
            .and_then(|offset| offset.checked_add(len))
            .is_some_and(|end| end <= PAGE as u64)
    }

    /// Begins a new call.
    pub fn clear(&mut self) {
        self.before.fill(POISON);
        self.after.clear();
        self.allowed.clear();
        self.next = Self::BUFFERS;
    }

    /// Space for `len` bytes that no other buffer of this call has.
    pub fn buffer(&mut self, len: usize) -> usize {
        let at = self.next;
        self.next += len.next_multiple_of(Self::SLOT).max(Self::SLOT);
        assert!(self.next < PAGE - Self::BUFFERS, "too many buffers");
        at
    }

    /// Puts `bytes` there, as much as there is room.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        let len = bytes.len().min(PAGE - at);
        self.before[at..at + len].copy_from_slice(&bytes[..len]);
    }

    /// The kernel may write there.
    pub fn allow(&mut self, addr: u64, len: u64) {
        let offset = |addr: u64| addr.saturating_sub(self.addr(0)).min(PAGE as u64) as usize;
        let range = offset(addr)..offset(addr.saturating_add(len));
        if !range.is_empty() {
            self.allowed.push(range);
        }
    }

    /// Makes a system call.
    pub fn run(&mut self, number: c_long, args: &[u64]) -> Answer {
        self.run_with(|| sys(number, args))
    }

    /// Makes a call, of any kind.
    pub fn run_with(&mut self, call: impl FnOnce() -> Answer) -> Answer {
        // SAFETY: Nobody else uses the page.
        unsafe { ptr::copy_nonoverlapping(self.before.as_ptr(), self.map.at(0), PAGE) };
        let answer = call();
        // SAFETY: As above, and the kernel is done.
        let page = unsafe { slice::from_raw_parts(self.map.at(0), PAGE) };
        self.after.extend_from_slice(page);
        answer
    }

    /// The offset of a byte that has changed although it may not.
    pub fn stray(&self) -> Option<usize> {
        if self.after.is_empty() || self.before == self.after {
            return None;
        }
        let changed = |at: &usize| self.before[*at] != self.after[*at];
        let allowed = |at: &usize| self.allowed.iter().any(|range| range.contains(at));
        (0..PAGE).find(|at| changed(at) && !allowed(at))
    }

    /// Whether none of these bytes has been written.
    pub fn unchanged(&self, addr: u64, len: u64) -> bool {
        let start = (addr - self.addr(0)) as usize;
        let range = start..start + len as usize;
        self.before[range.clone()] == self.after[range]
    }

    /// What is there after the call.
    pub fn bytes(&self, addr: u64, len: usize) -> &[u8] {
        let at = (addr - self.addr(0)) as usize;
        &self.after[at..at + len]
    }

    pub fn u16(&self, addr: u64) -> u16 {
        u16::from_ne_bytes(self.bytes(addr, 2).try_into().expect("two bytes"))
    }

    pub fn u32(&self, addr: u64) -> u32 {
        u32::from_ne_bytes(self.bytes(addr, 4).try_into().expect("four bytes"))
    }

    pub fn u64(&self, addr: u64) -> u64 {
        u64::from_ne_bytes(self.bytes(addr, 8).try_into().expect("eight bytes"))
    }

    /// An address that is odd in some way.
    pub fn odd_pointer(&self, random: &mut Choices) -> u64 {
        let at = |offset: usize| self.addr(offset);
        let some = random.random_range(0..PAGE);
        match random.random_range(0..12) {
            0 => 0,
            1 => 0xffff_8880_0000_0000 + some as u64,
            2 => 0xffff_ffff_8100_0000,
            3 => 1 << 63,
            4 => u64::MAX - some as u64 % 64,
            5 => at(PAGE + some),
            6 => at(2 * PAGE + some),
            7 => at(3 * PAGE + some),
            8 => 0x7fff_ffff_ffff - some as u64 % 64,
            9 => at(PAGE - 1 - some % 40),
            10 => at(0),
            _ => at(Self::BUFFERS + some % 1024),
        }
    }

    /// The page that cannot be written must be as it was.
    pub fn check_read_only(&self) {
        // SAFETY: It is mapped, and nobody writes to it.
        let page = unsafe { slice::from_raw_parts(self.map.at(2), PAGE) };
        let expected = [0x11].iter().chain([0; PAGE - 1].iter());
        assert!(
            page.iter().eq(expected),
            "a page without write access has changed"
        );
    }
}

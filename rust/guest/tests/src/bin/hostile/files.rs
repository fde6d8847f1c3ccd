// SPDX-License-Identifier: GPL-2.0
//! System calls on the FD, and on the mapping of its page.

use crate::{
    memory::{Answer, sys},
    report::Op,
    world::{Page, World, ensure},
};
use io_uring::{opcode, squeue, types::Fd};
use libc::*;
use rand::RngExt;
use std::os::fd::AsRawFd;
use uverbs_mmu_notify::Event;
use uverbs_mmu_notify_tests::*;

/// libc does not have it.
const F_SETSIG: i32 = 10;
const RECORD: usize = size_of::<Event>();
const PAGE_LEN: u64 = PAGE as u64;

/// A read, with its pieces.
#[derive(Debug)]
struct Reading {
    fd: i64,
    pieces: Vec<(u64, u64)>,
    offset: u64,
    flags: u64,
    queue_is_ours: bool,
}

impl World {
    /// An FD for a call that is not the fault of the FD, mostly.
    fn some_queue(&mut self) -> i64 {
        match !self.exact() && self.one_in(2) {
            true => self.random.random_range(self.racing.clone()),
            false => self.queue_fd(None),
        }
    }

    fn ours(&self, fd: i64) -> bool {
        let queue = self.queues.iter().find(|queue| queue.number == fd);
        queue.is_none_or(|queue| queue.ours)
    }

    /// Often there is something to read.
    fn prepare_read(&mut self) {
        for _ in 0..self.random.random_range(0..3) {
            self.change();
        }
        self.room.clear();
    }

    /// Pieces of a buffer, of any length, in the room. Few of them are odd.
    fn pieces(&mut self, count: usize) -> Vec<(u64, u64)> {
        let mut pieces = Vec::new();
        for _ in 0..count {
            let len = match self.random.random_range(0..4) {
                0 => RECORD,
                1 => RECORD * self.random.random_range(1..8),
                _ => self.random.random_range(0..4 * RECORD),
            };
            let at = self.room.buffer(len);
            pieces.push((self.room.addr(at), len as u64));
        }
        if self.one_in(4) {
            let at = self.random.random_range(0..count);
            match self.random.random() {
                true => pieces[at].0 = self.room.odd_pointer(&mut self.random),
                false => pieces[at].1 = self.odd_number(),
            }
            // Which bytes are whose must be known.
            let end = |piece: &(u64, u64)| piece.0.saturating_add(piece.1);
            let odd = pieces[at];
            let overlaps = |piece: &&(u64, u64)| odd.0 < end(piece) && piece.0 < end(&odd);
            if pieces.iter().filter(overlaps).count() > 1 {
                return vec![odd];
            }
        }
        pieces
    }

    /// read(), readv(), pread() and preadv2().
    pub fn read(&mut self) {
        self.prepare_read();
        let fd = self.some_queue();
        let number = self.pick(&[
            SYS_read,
            SYS_read,
            SYS_readv,
            SYS_pread64,
            SYS_preadv2,
            SYS_preadv2,
        ]);
        let vector = number == SYS_readv || number == SYS_preadv2;
        let count = if vector {
            self.random.random_range(1..5)
        } else {
            1
        };
        let flags = match number == SYS_preadv2 {
            true => self.pick(&[
                0,
                RWF_NOWAIT,
                RWF_NOWAIT,
                RWF_HIPRI,
                RWF_APPEND,
                0x40,
                0x80,
                1 << 30,
            ]),
            false => 0,
        };
        let reading = Reading {
            fd,
            pieces: self.pieces(count),
            offset: if self.one_in(4) {
                self.odd_number()
            } else {
                u64::MAX
            },
            flags: flags as u64,
            queue_is_ours: self.ours(fd),
        };
        let (addr, len) = reading.pieces[0];
        let fd = fd as u64;
        let mut nothing = false;
        let answer = if vector {
            let at = self.room.buffer(16 * reading.pieces.len());
            let words = reading.pieces.iter().flat_map(|&(addr, len)| [addr, len]);
            let bytes: Vec<_> = words.flat_map(u64::to_ne_bytes).collect();
            self.room.put(at, &bytes);
            let vector = self.room.addr(at);
            let count = match self.one_in(16) {
                true => self.odd_number(),
                false => reading.pieces.len() as u64,
            };
            // import_iovec() takes 32 bits of the count. The VFS itself answers if none of
            // these pieces has a byte.
            let taken = reading.pieces.get(..count as u32 as usize);
            nothing = taken.is_some_and(|pieces| pieces.iter().all(|&(_, len)| len == 0));
            self.allow_pieces(&reading);
            let args = [
                fd,
                vector,
                count,
                reading.offset,
                reading.offset,
                reading.flags,
            ];
            self.room.run(number, &args)
        } else {
            self.allow_pieces(&reading);
            self.room.run(number, &[fd, addr, len, reading.offset])
        };
        self.enter(Op::Read, answer, &reading);
        if !(nothing && answer == Ok(0)) {
            self.after_read(&reading, answer);
        }
    }

    fn allow_pieces(&mut self, reading: &Reading) {
        for &(addr, len) in &reading.pieces {
            self.room.allow(addr, len);
        }
    }

    fn after_read(&mut self, reading: &Reading, answer: Answer) {
        let Ok(read) = answer else { return };
        ensure!(
            reading.queue_is_ours,
            reading,
            "accepted a reader of another address space"
        );
        let mut bytes = Vec::new();
        let mut left = read;
        let whole = reading
            .pieces
            .iter()
            .all(|&(addr, len)| self.room.holds(addr, len));
        for &(addr, len) in &reading.pieces {
            let used = left.min(len);
            ensure!(
                self.room.holds(addr, used) || used == 0,
                reading,
                "accepted a bad buffer"
            );
            // Part of an event may be in front of a bad piece.
            ensure!(
                !whole || self.room.unchanged(addr + used, len - used),
                reading,
                "wrote beyond"
            );
            if used > 0 {
                bytes.extend(self.room.bytes(addr, used as usize));
            }
            left -= used;
        }
        ensure!(left == 0, reading, "read {read} bytes");
        self.delivered(reading.fd, &bytes, reading);
    }

    /// A request of io_uring that does not wait.
    pub fn uring(&mut self) {
        self.prepare_read();
        let fd = self.some_queue();
        let reading = Reading {
            fd,
            pieces: self.pieces(1),
            offset: self.pick(&[0, u64::MAX, 1]),
            flags: 0,
            queue_is_ours: self.ours(fd),
        };
        let Some(mut ring) = self.ring.take() else {
            return;
        };
        let (addr, len) = reading.pieces[0];
        let kind = self.random.random_range(0..8);
        let target = Fd(fd as i32);
        let buffer = addr as *mut u8;
        let flags = if self.one_in(16) { 1 << 30 } else { 0 };
        let entry = match kind {
            0 => opcode::Write::new(target, buffer, len as u32).build(),
            1 => opcode::Fsync::new(target).build(),
            2 => opcode::Ftruncate::new(target, len).build(),
            3 => opcode::Splice::new(target, -1, target, -1, len as u32 | 1).build(),
            _ => opcode::Read::new(target, buffer, len as u32)
                .offset(reading.offset)
                .rw_flags(RWF_NOWAIT | flags)
                .build(),
        };
        let entry = if self.one_in(4) {
            entry.flags(squeue::Flags::ASYNC)
        } else {
            entry
        };
        self.allow_pieces(&reading);
        // SAFETY: The buffer is in the room, which lives on, or anywhere, which the kernel checks.
        unsafe { ring.submission().push(&entry) }.expect("room in the ring");
        let answer = self.room.run_with(|| {
            ring.submit_and_wait(1).expect("submit");
            let result = ring
                .completion()
                .next()
                .expect("it waited for one")
                .result();
            if result < 0 {
                Err(-result)
            } else {
                Ok(result as u64)
            }
        });
        self.ring = Some(ring);
        self.enter(Op::Uring, answer, &reading);
        if kind > 3 {
            self.after_read(&reading, answer);
        } else {
            // A racing FD may be the device, and io_uring does not call write() for no bytes.
            let nothing =
                kind == 0 && len as u32 == 0 && answer == Ok(0) && self.racing.contains(&fd);
            ensure!(
                answer.is_err() || nothing,
                reading,
                "request {kind} succeeded"
            );
        }
    }

    /// poll(), and epoll.
    pub fn poll(&mut self) {
        self.room.clear();
        let fd = self.some_queue();
        let epoll = self.others.last().expect("an epoll").as_raw_fd() as u64;
        let events = self.odd_number() as u16;
        let answer = match self.random.random_range(0..3) {
            0 => {
                let at = self.room.buffer(8);
                let set = [(fd as i32).to_ne_bytes(), (u32::from(events)).to_ne_bytes()].concat();
                self.room.put(at, &set);
                let addr = self.room.addr(at);
                self.room.allow(addr + 6, 2);
                let answer = self.room.run(SYS_poll, &[addr, 1, 0]);
                let seen = self.room.u16(addr + 6);
                let asked = events | (POLLERR | POLLHUP | POLLNVAL) as u16;
                ensure!(seen & !asked == 0, (fd, events), "poll() says {seen:#x}");
                let closed = seen & POLLERR as u16 != 0 && self.exact();
                ensure!(!closed, (fd, events), "the queue is closed");
                answer
            }
            1 => {
                let at = self.odd_pointer_or(8);
                self.room.allow(at, 8);
                self.room.run(SYS_poll, &[at, 1, 0])
            }
            _ => {
                let at = self.room.buffer(16);
                let event = [u32::from(events) | EPOLLET as u32 & 1 << 31, 7, 7, 0];
                let bytes: Vec<_> = event.iter().flat_map(|word| word.to_ne_bytes()).collect();
                self.room.put(at, &bytes);
                let ctl = self.pick(&[EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL]);
                let args = [epoll, ctl as u64, fd as u64, self.room.addr(at)];
                self.room.run(SYS_epoll_ctl, &args)
            }
        };
        self.enter(Op::Poll, answer, &fd);
    }

    fn odd_pointer_or(&mut self, len: usize) -> u64 {
        match self.random.random() {
            true => self.room.odd_pointer(&mut self.random),
            false => {
                let at = self.room.buffer(len);
                self.room.addr(at)
            }
        }
    }

    /// mmap() of the FD.
    pub fn mmap(&mut self) {
        self.room.clear();
        let fd = self.some_queue();
        let spare = self.spare.at(self.random.random_range(0..4)) as u64;
        let mut args = [
            0,
            PAGE_LEN,
            PROT_READ as u64,
            MAP_SHARED as u64,
            fd as u64,
            0,
        ];
        if !self.one_in(4) {
            for _ in 0..self.random.random_range(1..3) {
                match self.random.random_range(0..6) {
                    0 => {
                        args[0] = spare;
                        args[3] |= MAP_FIXED as u64;
                    }
                    1 => {
                        args[1] = self.pick(&[0, 1, PAGE_LEN + 1, 2 * PAGE_LEN, 1 << 30, u64::MAX])
                    }
                    2 => args[2] = self.random.random_range(0..8),
                    3 => {
                        let more = [
                            MAP_PRIVATE,
                            MAP_SHARED,
                            MAP_SHARED_VALIDATE,
                            MAP_SHARED | MAP_POPULATE,
                            MAP_SHARED | MAP_LOCKED,
                            MAP_SHARED | MAP_HUGETLB,
                            MAP_SHARED | MAP_GROWSDOWN,
                            MAP_SHARED_VALIDATE | MAP_SYNC,
                            MAP_SHARED_VALIDATE | 1 << 30,
                            0,
                            MAP_SHARED | MAP_NORESERVE,
                            MAP_PRIVATE | MAP_ANONYMOUS,
                        ];
                        args[3] = self.pick(&more) as u64 | args[3] & MAP_FIXED as u64;
                    }
                    4 => {
                        args[5] = self.pick(&[
                            1,
                            PAGE_LEN,
                            2 * PAGE_LEN,
                            1 << 40,
                            1 << 63,
                            u64::MAX - 4095,
                        ])
                    }
                    _ => args[0] = self.pick(&[1, PAGE_LEN, spare, 1 << 62]),
                }
            }
        }
        let answer = self.room.run(SYS_mmap, &args);
        self.enter(Op::Mmap, answer, &args);
        let Ok(addr) = answer else { return };
        let anonymous = args[3] & MAP_ANONYMOUS as u64 != 0;
        if !anonymous {
            let right = (1..=PAGE_LEN).contains(&args[1])
                && args[2] & !(PROT_READ as u64) == 0
                && matches!(args[3] as i32 & MAP_TYPE, MAP_SHARED | MAP_SHARED_VALIDATE)
                && args[5] == 0;
            ensure!(right, args, "accepted");
            let page = Page(addr);
            if args[2] == PROT_READ as u64 && self.exact() {
                page.check();
                let queue = self.queues.iter().find(|queue| queue.number == fd);
                let generation = queue.map(|queue| queue.page.load());
                ensure!(
                    generation == Some(page.load()),
                    args,
                    "generation {}",
                    page.load()
                );
            }
        } else {
            let len = args[1].next_multiple_of(PAGE_LEN);
            sys(SYS_munmap, &[addr, len]).expect("munmap");
        }
        if args[3] & MAP_FIXED as u64 != 0 {
            self.spare.map_over(0..8);
        }
    }

    /// What changes the mapping of the page, or writes to it.
    pub fn page(&mut self) {
        self.room.clear();
        let fd = self.queue_fd(None);
        let args = [
            0,
            PAGE_LEN,
            PROT_READ as u64,
            MAP_SHARED as u64,
            fd as u64,
            0,
        ];
        let Ok(addr) = sys(SYS_mmap, &args) else {
            return;
        };
        let page = Page(addr);
        let before = page.load();
        // It may go elsewhere.
        std::mem::forget(page);
        let (target, kind) = (self.spare.at(6) as u64, self.random.random_range(0..16));
        let mut must_fail = false;
        let mut moved = addr;
        let answer = match kind {
            0 | 1 => {
                let protection = self.random.random_range(0..8);
                must_fail = protection & (PROT_WRITE | PROT_EXEC) as u64 != 0;
                sys(SYS_mprotect, &[addr, PAGE_LEN, protection])
            }
            2..5 => {
                let len = self.pick(&[0, 1, PAGE_LEN, 2 * PAGE_LEN, 1 << 40]);
                let flags = self.pick(&[
                    0,
                    MREMAP_MAYMOVE,
                    MREMAP_MAYMOVE | MREMAP_FIXED,
                    MREMAP_MAYMOVE | MREMAP_DONTUNMAP,
                    8,
                ]);
                // A longer one would unmap what is behind.
                let old = self.pick(&[0, PAGE_LEN]);
                must_fail = len > PAGE_LEN || old == 0 || flags & MREMAP_DONTUNMAP != 0;
                let answer = sys(SYS_mremap, &[addr, old, len, flags as u64, target]);
                moved = answer.unwrap_or(addr);
                answer
            }
            5..8 => {
                // Not those that poison the page, which is the kernel's.
                let advice = self.random.random_range(0..30);
                sys(SYS_madvise, &[addr, PAGE_LEN, advice])
            }
            8 => sys(SYS_munmap, &[addr + self.pick(&[1, 8]), PAGE_LEN]),
            9 => sys(SYS_msync, &[addr, PAGE_LEN, self.random.random_range(0..8)]),
            10 => sys(SYS_mlock, &[addr, PAGE_LEN]),
            11 => sys(
                SYS_mlock2,
                &[addr, PAGE_LEN, self.random.random_range(0..4)],
            ),
            12 => sys(
                SYS_remap_file_pages,
                &[addr, PAGE_LEN, 0, self.random.random_range(0..2), 0],
            ),
            13 => {
                // read() of another file into it.
                must_fail = true;
                let zero = self.others[3].as_raw_fd() as u64;
                sys(SYS_pread64, &[zero, addr, 8, 0])
            }
            14 => {
                must_fail = true;
                self.write_to_memory(addr)
            }
            _ => {
                let vec = self.room.buffer(8);
                self.room.allow(self.room.addr(vec), 8);
                self.room
                    .run(SYS_mincore, &[addr, PAGE_LEN, self.room.addr(vec)])
            }
        };
        let call = (kind, args);
        self.enter(Op::Page, answer, &call);
        ensure!(!must_fail || answer.is_err(), call, "succeeded");
        let read = PROT_READ as u64;
        let readable = sys(SYS_mprotect, &[moved, PAGE_LEN, read]);
        ensure!(
            readable.is_ok(),
            call,
            "{answer:?}, then mprotect(): {readable:?}"
        );
        let page = Page(moved);
        page.check();
        ensure!(
            page.load() == before || !self.exact(),
            call,
            "the generation is {}",
            page.load()
        );
        drop(page);
        self.spare.map_over(0..8);
    }

    /// By /proc/self/mem, which may write to memory without write access if that is private.
    fn write_to_memory(&mut self, addr: u64) -> Answer {
        let path = b"/proc/self/mem\0";
        let fd = sys(SYS_open, &[path.as_ptr() as u64, O_RDWR as u64])?;
        let at = self.room.buffer(8);
        let answer = self
            .room
            .run(SYS_pwrite64, &[fd, self.room.addr(at), 8, addr]);
        sys(SYS_close, &[fd]).expect("close");
        answer
    }

    /// fcntl().
    pub fn fcntl(&mut self) {
        self.room.clear();
        let fd = self.some_queue();
        // F_SETLKW would wait.
        let command = match self.random.random_range(0..3) {
            0 => self.random.random_range(0..17),
            1 => self.random.random_range(1024..1044),
            _ => self.pick(&[F_GETFL, F_GETFD, F_SETFL, F_GETLK, F_DUPFD, F_DUPFD_CLOEXEC]) as u64,
        };
        let command = if command == F_SETLKW as u64 {
            F_SETLK as u64
        } else {
            command
        };
        let argument = match command as i32 {
            // A queue that blocks may be read.
            F_SETFL => self.odd_number() | O_NONBLOCK as u64,
            F_SETFD => FD_CLOEXEC as u64,
            // Signals that nobody asked for end the program.
            F_SETOWN | F_SETSIG => 0,
            F_DUPFD | F_DUPFD_CLOEXEC => self.pick(&[0, 100, 1 << 20, u64::MAX]),
            _ => self.odd_pointer_or(64),
        };
        self.room.allow(argument, 64);
        let call = [fd as u64, command, argument];
        let answer = self.room.run(SYS_fcntl, &call);
        self.enter(Op::Fcntl, answer, &call);
        match (command as i32, answer) {
            (F_DUPFD | F_DUPFD_CLOEXEC, Ok(copy)) => {
                sys(SYS_close, &[copy]).expect("close");
            }
            (F_SETFL, Ok(_)) if self.exact() => {
                sys(SYS_fcntl, &[fd as u64, F_SETFL as u64, O_NONBLOCK as u64]).expect("F_SETFL");
            }
            _ => (),
        }
    }

    /// ioctl() of the FD, and what all files have.
    pub fn control(&mut self) {
        self.room.clear();
        let fd = self.some_queue() as u64;
        let pointer = self.odd_pointer_or(256);
        let random = self.random.random_range(0..1 << 32);
        // Of a file that another thread may replace meanwhile it cannot be taken back.
        let nonblock = if self.exact() { FIONBIO } else { FIONREAD };
        let request = self.pick(&[
            nonblock,
            FIONREAD,
            FIOCLEX,
            FIOASYNC,
            TCGETS,
            0xc018_1b01,
            random,
        ]);
        let kind = self.random.random_range(0..4);
        let (number, args) = match kind {
            0 => (SYS_ioctl, [fd, request, pointer]),
            1 => (SYS_fstat, [fd, pointer, 0]),
            2 => (
                SYS_flock,
                [
                    fd,
                    (LOCK_NB | self.pick(&[LOCK_SH, LOCK_EX, LOCK_UN, 3])) as u64,
                    0,
                ],
            ),
            _ => (SYS_fgetxattr, [fd, pointer, pointer]),
        };
        self.room.allow(pointer, 256);
        let answer = self.room.run(number, &args);
        self.enter(Op::Control, answer, &(number, args));
        if number == SYS_ioctl && request == FIONBIO && answer.is_ok() {
            sys(SYS_fcntl, &[fd, F_SETFL as u64, O_NONBLOCK as u64]).expect("F_SETFL");
        }
    }

    /// What the file does not have.
    pub fn refused(&mut self) {
        self.room.clear();
        let fd = self.queue_fd(None) as u64;
        let pointer = self.odd_pointer_or(64);
        let (number, len) = (self.odd_number(), self.pick(&[1, 40, PAGE_LEN, u64::MAX]));
        let [read_end, write_end] = [0, 1].map(|n| self.others[n].as_raw_fd() as u64);
        let file = self.others[3].as_raw_fd() as u64;
        let (call, args) = match self.random.random_range(0..18) {
            0 => (SYS_write, [fd, pointer, len, 0, 0, 0]),
            1 => (SYS_pwrite64, [fd, pointer, len, number, 0, 0]),
            2 => (SYS_writev, [fd, pointer, 1, 0, 0, 0]),
            3 => (
                SYS_lseek,
                [fd, number, self.random.random_range(0..6), 0, 0, 0],
            ),
            4 => (SYS_splice, [fd, 0, write_end, 0, len, 0]),
            5 => (SYS_splice, [read_end, 0, fd, 0, len, 2]),
            6 => (SYS_sendfile, [write_end, fd, 0, len, 0, 0]),
            7 => (SYS_sendfile, [fd, file, 0, len, 0, 0]),
            8 => (SYS_copy_file_range, [fd, 0, file, 0, len, 0]),
            9 => (SYS_ftruncate, [fd, number, 0, 0, 0, 0]),
            10 => (
                SYS_fallocate,
                [fd, self.random.random_range(0..4), 0, 1, 0, 0],
            ),
            11 => (SYS_fsync, [fd, 0, 0, 0, 0, 0]),
            12 => (SYS_readahead, [fd, 0, len, 0, 0, 0]),
            13 => (SYS_getdents64, [fd, pointer, 64, 0, 0, 0]),
            14 => (SYS_fchdir, [fd, 0, 0, 0, 0, 0]),
            15 => (SYS_tee, [fd, write_end, len, 0, 0, 0]),
            16 => (SYS_recvfrom, [fd, pointer, 40, 0, 0, 0]),
            _ => (SYS_preadv2, [fd, pointer, u64::MAX, 0, 0, 0]),
        };
        let answer = self.room.run(call, &args);
        self.enter(Op::Refused, answer, &(call, args));
        ensure!(answer.is_err(), (call, args), "succeeded");
    }

    /// dup() and its kin, and close().
    pub fn close(&mut self) {
        self.room.clear();
        let fd = self.some_queue() as u64;
        let unused = 300;
        let (number, args) = match self.random.random_range(0..5) {
            0 => (SYS_dup, [fd, 0, 0]),
            1 => (SYS_dup3, [fd, unused, self.pick(&[0, O_CLOEXEC as u64, 1])]),
            2 => (SYS_dup2, [fd, self.pick(&[unused, u64::MAX, 1 << 20]), 0]),
            3 => (SYS_close, [unused, 0, 0]),
            _ => {
                self.close_one();
                (SYS_dup, [fd, 0, 0])
            }
        };
        let answer = self.room.run(number, &args);
        self.enter(Op::Close, answer, &(number, args));
        if let (true, Ok(copy)) = (number != SYS_close, answer) {
            sys(SYS_close, &[copy]).expect("close");
        }
    }

    /// A child has no mapping of the page, and cannot read.
    pub fn fork(&mut self) {
        let queue = self.random.random_range(0..self.queues.len());
        let queue = &self.queues[queue];
        let fd = queue.number as u64;
        let room = self.room.addr(0);
        let child = in_child(|| {
            let answer = sys(SYS_read, &[fd, room, RECORD as u64]);
            if answer != Err(EPERM) && answer != Err(EIO) {
                return 1;
            }
            queue.page.load();
            2
        });
        self.room.clear();
        self.enter(Op::Fork, Ok(0), &fd);
        ensure!(
            child == Exit::Signal(SIGSEGV),
            fd,
            "the child ended with {child:?}"
        );
    }

    /// The contexts are closed: nothing more comes from a queue.
    pub fn after_disconnect(&mut self) {
        let generations: Vec<_> = self.queues.iter().map(|queue| queue.page.load()).collect();
        self.disconnect();
        for (queue, before) in self.queues.iter().zip(generations) {
            let after = queue.page.load();
            let advanced = !self.exact() || after == before + 1;
            assert!(
                advanced,
                "generation {after} after {before} and the end of the context"
            );
            let expected = if queue.ours { EIO } else { EPERM };
            let args = [queue.number as u64, self.room.addr(0), PAGE_LEN];
            assert_eq!(
                sys(SYS_read, &args),
                Err(expected),
                "read() of {}",
                queue.number
            );
        }
    }
}

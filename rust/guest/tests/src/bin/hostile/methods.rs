// SPDX-License-Identifier: GPL-2.0
//! The methods of the ioctl(), and the commands by INVOKE_WRITE and by write().

use crate::{
    memory::Room,
    report::Op,
    world::{Asked, World, ensure},
};
use rand::RngExt;
use std::mem::offset_of;
use uverbs_mmu_notify::sys::uapi::*;
use uverbs_mmu_notify_tests::*;

const HEADER: u64 = size_of::<ib_uverbs_ioctl_hdr>() as u64;
const ATTR: u64 = size_of::<ib_uverbs_attr>() as u64;
const VERBS_IOCTL: u64 = 0xc018_1b01;
const MANDATORY: u16 = UVERBS_ATTR_F_MANDATORY as u16;
const VALID_OUTPUT: u16 = UVERBS_ATTR_F_VALID_OUTPUT as u16;

#[derive(Clone, Copy, Debug)]
struct Attr {
    id: u16,
    len: u16,
    flags: u16,
    reserved: u16,
    data: u64,
}

/// A call of a method, as it is sent.
#[derive(Clone, Debug)]
struct Call {
    side: usize,
    fd: i64,
    request: u64,
    /// Where the header is in the room.
    at: usize,
    length: u16,
    object: u16,
    method: u16,
    count: u16,
    reserved: u64,
    driver: u32,
    reserved2: u32,
    attrs: Vec<Attr>,
    command: Option<Command>,
}

/// What a method does with an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    New,
    Given,
    /// It writes so many bytes.
    Output(u64),
    /// It does not know it.
    Nothing,
}

impl Call {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [self.length, self.object, self.method, self.count] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(self.reserved.to_ne_bytes());
        bytes.extend(self.driver.to_ne_bytes());
        bytes.extend(self.reserved2.to_ne_bytes());
        for attr in &self.attrs {
            for word in [attr.id, attr.len, attr.flags, attr.reserved] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(attr.data.to_ne_bytes());
        }
        bytes
    }

    fn op(&self) -> Op {
        const fn key(object: u32, method: u32) -> (u16, u16) {
            (object as u16, method as u16)
        }
        const ALLOC: (u16, u16) = key(UVERBS_OBJECT_MMU_NOTIFY, UVERBS_METHOD_MMU_NOTIFY_ALLOC);
        const REG: (u16, u16) = key(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR);
        const DESTROY: (u16, u16) = key(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY);
        const INVOKE: (u16, u16) = key(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INVOKE_WRITE);
        match (self.object, self.method) {
            ALLOC => Op::Alloc,
            REG => Op::Reg,
            DESTROY => Op::Destroy,
            INVOKE => Op::Invoke,
            _ => Op::OtherMethod,
        }
    }

    fn use_of(&self, attr: &Attr) -> Use {
        let room = u64::from(attr.len);
        match (self.op(), u32::from(attr.id)) {
            (Op::Alloc, UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE) => Use::New,
            (Op::Reg, UVERBS_ATTR_REG_MR_HANDLE) => Use::New,
            (Op::Reg, UVERBS_ATTR_REG_MR_RESP_LKEY | UVERBS_ATTR_REG_MR_RESP_RKEY) => {
                Use::Output(4)
            }
            (Op::Reg, UVERBS_ATTR_UHW_OUT) => Use::Output(0),
            (Op::Reg, id) if id <= UVERBS_ATTR_REG_MR_NOTIFY_COOKIE => Use::Given,
            (Op::Destroy, UVERBS_ATTR_DESTROY_MR_HANDLE) => Use::Given,
            (Op::Destroy, UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED) => Use::Output(4),
            (Op::Invoke, UVERBS_ATTR_WRITE_CMD | UVERBS_ATTR_CORE_IN) => Use::Given,
            (Op::Invoke, UVERBS_ATTR_CORE_OUT) => Use::Output(room),
            (Op::Invoke, UVERBS_ATTR_UHW_OUT) => Use::Output(0),
            // QUERY_MR and others also write.
            (Op::OtherMethod, _) => Use::Output(room),
            _ => Use::Nothing,
        }
    }

    /// The attribute that the method takes, and its place in the room.
    fn attr(&self, id: u32) -> Option<(&Attr, u64)> {
        let at = self
            .attrs
            .iter()
            .position(|attr| u32::from(attr.id) == id)?;
        Some((&self.attrs[at], self.at as u64 + HEADER + at as u64 * ATTR))
    }

    /// Whether an output begins in the request.
    fn overwrites_itself(&self, room: &Room) -> bool {
        let start = room.addr(self.at);
        let end = start + HEADER + self.attrs.len() as u64 * ATTR;
        self.attrs
            .iter()
            .any(|attr| attr.data < end && attr.data.saturating_add(attr.len.into()) > start)
    }

    /// What it asks to register.
    fn asked(&self) -> Asked {
        let data = |id| self.attr(id).map(|(attr, _)| attr.data);
        let number = |id| data(id).unwrap_or(0);
        let access = self.attr(UVERBS_ATTR_REG_MR_ACCESS_FLAGS);
        let fd = data(UVERBS_ATTR_REG_MR_NOTIFY_FD);
        let cookie = data(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE);
        ensure!(
            fd.is_some() == cookie.is_some(),
            self,
            "accepted one of FD and cookie"
        );
        Asked {
            pd: number(UVERBS_ATTR_REG_MR_PD_HANDLE),
            addr: number(UVERBS_ATTR_REG_MR_ADDR),
            length: number(UVERBS_ATTR_REG_MR_LENGTH),
            iova: number(UVERBS_ATTR_REG_MR_IOVA),
            access: access.map_or(0, |(attr, _)| match attr.len {
                4 => attr.data & u64::from(u32::MAX),
                _ => attr.data,
            }),
            notify: fd.map(|fd| (fd as i64, cookie.unwrap_or(0))),
        }
    }
}

/// One of the three commands.
#[derive(Clone, Debug)]
struct Command {
    number: u32,
    comp_mask: u32,
    /// `reserved` of CREATE, `pd_handle` of REG, `mr_handle` of DEREG.
    word: u32,
    asked: Asked,
    /// Bytes too few, or what follows.
    missing: usize,
    extra: Vec<u8>,
    /// The room for the response, and where that is.
    out: u64,
    response: u64,
}

const CREATE: u32 = IB_USER_VERBS_EX_CMD_CREATE_MMU_NOTIFY | IB_USER_VERBS_CMD_FLAG_EXTENDED;
const REG: u32 = IB_USER_VERBS_EX_CMD_REG_MR_NOTIFY | IB_USER_VERBS_CMD_FLAG_EXTENDED;
const DEREG: u32 = IB_USER_VERBS_EX_CMD_DEREG_MR_NOTIFY | IB_USER_VERBS_CMD_FLAG_EXTENDED;

impl Command {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.comp_mask.to_ne_bytes());
        bytes.extend(self.word.to_ne_bytes());
        if self.number == REG {
            let Asked {
                addr,
                length,
                iova,
                access,
                notify,
                ..
            } = self.asked;
            let (fd, cookie) = notify.unwrap_or((-1, 0));
            for word in [addr, length, iova, cookie] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend((access as u32).to_ne_bytes());
            bytes.extend((fd as u32).to_ne_bytes());
        }
        bytes.truncate(bytes.len() - self.missing);
        bytes.extend(&self.extra);
        bytes
    }

    fn response_len(number: u32) -> u64 {
        (match number {
            CREATE => size_of::<ib_uverbs_ex_create_mmu_notify_resp>(),
            REG => size_of::<ib_uverbs_ex_reg_mr_notify_resp>(),
            _ => size_of::<ib_uverbs_ex_dereg_mr_notify_resp>(),
        }) as u64
    }
}

/// A write().
#[derive(Debug)]
struct Written {
    fd: i64,
    count: u64,
    in_words: u16,
    out_words: u16,
    provider_in: u16,
    provider_out: u16,
    reserved: u32,
    command: Command,
}

impl Written {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.command.number.to_ne_bytes());
        bytes.extend(self.in_words.to_ne_bytes());
        bytes.extend(self.out_words.to_ne_bytes());
        bytes.extend(self.command.response.to_ne_bytes());
        bytes.extend(self.provider_in.to_ne_bytes());
        bytes.extend(self.provider_out.to_ne_bytes());
        bytes.extend(self.reserved.to_ne_bytes());
        bytes.extend(self.command.bytes());
        bytes
    }
}

impl World {
    /// A method of the ioctl().
    pub fn method(&mut self) {
        self.room.clear();
        let mut call = match self.random.random_range(0..10) {
            0 => self.alloc(),
            1..5 => self.reg(),
            5..8 => self.destroy(),
            _ => self.invoke(),
        };
        if !self.one_in(3) {
            let (mut attrs, mut headers) = (0, 0);
            for _ in 0..self.random.random_range(1..4) {
                *if self.one_in(4) {
                    &mut headers
                } else {
                    &mut attrs
                } += 1;
            }
            (0..attrs).for_each(|_| self.mutate_attr(&mut call));
            seal(&mut call);
            (0..headers).for_each(|_| self.mutate_header(&mut call));
        }
        tame(&mut call, &self.room);
        self.send(&call);
    }

    fn call(&mut self, object: u32, method: u32, attrs: Vec<Attr>) -> Call {
        let side = self.side();
        Call {
            side,
            fd: self.sides[side].fd,
            request: VERBS_IOCTL,
            at: 0,
            length: 0,
            object: object as u16,
            method: method as u16,
            count: 0,
            reserved: 0,
            driver: self.sides[side].driver,
            reserved2: 0,
            attrs,
            command: None,
        }
    }

    fn output(&mut self, id: u32, len: usize) -> Attr {
        let at = self.room.buffer(len);
        attr(id, len as u16, self.room.addr(at))
    }

    fn alloc(&mut self) -> Call {
        let handle = attr(UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE, 0, 0);
        sealed(self.call(
            UVERBS_OBJECT_MMU_NOTIFY,
            UVERBS_METHOD_MMU_NOTIFY_ALLOC,
            vec![handle],
        ))
    }

    fn reg(&mut self) -> Call {
        let mut call = self.call(UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR, Vec::new());
        let asked = self.some_region(call.side);
        call.attrs = vec![
            attr(UVERBS_ATTR_REG_MR_HANDLE, 0, 0),
            attr(UVERBS_ATTR_REG_MR_PD_HANDLE, 0, asked.pd),
            attr(UVERBS_ATTR_REG_MR_IOVA, 8, asked.iova),
            attr(UVERBS_ATTR_REG_MR_ADDR, 8, asked.addr),
            attr(UVERBS_ATTR_REG_MR_LENGTH, 8, asked.length),
            attr(UVERBS_ATTR_REG_MR_ACCESS_FLAGS, 8, asked.access),
            self.output(UVERBS_ATTR_REG_MR_RESP_LKEY, 4),
            self.output(UVERBS_ATTR_REG_MR_RESP_RKEY, 4),
        ];
        if let Some((fd, cookie)) = asked.notify {
            call.attrs
                .push(attr(UVERBS_ATTR_REG_MR_NOTIFY_FD, 0, fd as u64));
            call.attrs
                .push(attr(UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, 8, cookie));
        }
        if self.one_in(8) {
            call.attrs.push(self.output(UVERBS_ATTR_UHW_OUT, 16));
        }
        sealed(call)
    }

    fn destroy(&mut self) -> Call {
        let mut call = self.call(UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY, Vec::new());
        let handle = self.live_handle(call.side).unwrap_or(0);
        call.attrs
            .push(attr(UVERBS_ATTR_DESTROY_MR_HANDLE, 0, handle));
        if !self.one_in(8) {
            let count = self.output(UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED, 4);
            call.attrs.push(count);
        }
        sealed(call)
    }

    fn invoke(&mut self) -> Call {
        let mut call = self.call(UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INVOKE_WRITE, Vec::new());
        let mut command = self.command(call.side);
        if self.one_in(3) {
            self.mutate_command(&mut command, call.side);
        }
        let bytes = command.bytes();
        let data = if bytes.len() <= 8 {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(&bytes);
            u64::from_ne_bytes(word)
        } else {
            let at = self.room.buffer(bytes.len());
            self.room.put(at, &bytes);
            self.room.addr(at)
        };
        call.attrs = vec![
            attr(UVERBS_ATTR_WRITE_CMD, 8, command.number.into()),
            attr(UVERBS_ATTR_CORE_IN, bytes.len() as u16, data),
            attr(UVERBS_ATTR_CORE_OUT, command.out as u16, command.response),
        ];
        call.command = Some(command);
        sealed(call)
    }

    fn mutate_attr(&mut self, call: &mut Call) {
        if call.attrs.is_empty() || self.one_in(12) {
            let id = self.odd_number() as u16;
            let mut attr = attr(
                id.into(),
                self.random.random_range(0..16),
                self.odd_number(),
            );
            attr.flags = self.random.random_range(0..2);
            call.attrs.push(attr);
            return;
        }
        let at = self.random.random_range(0..call.attrs.len());
        let uses = call.use_of(&call.attrs[at]);
        let old = call.attrs[at];
        // Inputs that the model reads from the call stay where it finds them.
        let of_command = call.op() == Op::Invoke && !matches!(uses, Use::Output(_));
        match self.random.random_range(0..12) {
            0 => call.attrs[at].id = self.random.random_range(0..16),
            1 => call.attrs[at].id |= 1 << self.random.random_range(0..16),
            2 if !of_command => {
                call.attrs[at].len = self.pick(&[0, 1, 4, 7, 8, 9, 16, 4096, u16::MAX])
            }
            3 => call.attrs[at].flags ^= 1 << self.random.random_range(0..16),
            4 => call.attrs[at].reserved = 1 << self.random.random_range(0..16),
            5 => drop(call.attrs.remove(at)),
            6 => call.attrs.push(old),
            7 => {
                let other = self.random.random_range(0..call.attrs.len());
                call.attrs.swap(at, other);
            }
            _ if of_command => call.attrs[at].flags = 0,
            _ => call.attrs[at].data = self.odd_data(call, uses, u32::from(old.id), old.data),
        }
    }

    fn odd_data(&mut self, call: &Call, uses: Use, id: u32, old: u64) -> u64 {
        match (call.op(), uses) {
            (_, Use::Output(_)) => self.room.odd_pointer(&mut self.random),
            (Op::Destroy, Use::Given) => self.odd_handle(call.side),
            (Op::Reg, Use::Given) => match id {
                UVERBS_ATTR_REG_MR_PD_HANDLE => self.odd_handle(call.side),
                UVERBS_ATTR_REG_MR_NOTIFY_FD => self.odd_fd() as u64,
                UVERBS_ATTR_REG_MR_ADDR => self.odd_addr(),
                UVERBS_ATTR_REG_MR_ACCESS_FLAGS => self.odd_access(old),
                _ => self.odd_number(),
            },
            _ if old == 0 => self.odd_number(),
            _ => old ^ (1 << self.random.random_range(0..64)),
        }
    }

    fn mutate_header(&mut self, call: &mut Call) {
        match self.random.random_range(0..11) {
            0 => call.length = self.odd_number() as u16,
            1 => call.length += ATTR as u16,
            2 => call.count = self.odd_number() as u16,
            3 => {
                let objects = [
                    UVERBS_OBJECT_DEVICE as u16,
                    UVERBS_OBJECT_MR as u16,
                    UVERBS_OBJECT_MMU_NOTIFY as u16,
                    UVERBS_OBJECT_MMU_NOTIFY as u16 + 1,
                    1 << 12,
                    u16::MAX,
                ];
                call.object = self.pick(&objects);
            }
            4 => call.method = self.pick(&[0, 1, 2, 3, 4, 5, 6, 7, 1 << 12, u16::MAX]),
            5 => call.reserved = 1 << self.random.random_range(0..64),
            6 => call.reserved2 = 1 << self.random.random_range(0..32),
            7 => call.driver = self.odd_number() as u32,
            8 => call.request ^= 1 << self.random.random_range(0..32),
            9 => call.fd = self.odd_fd(),
            _ => {
                let end = PAGE - call.bytes().len();
                call.at = end + self.pick(&[0, 0, 8, 16]);
            }
        }
        // For another context all numbers are odd. Racing FDs are of the first one.
        if self.racing.contains(&call.fd) {
            call.side = 0;
        }
        if call.fd == self.sides[1 - call.side].fd {
            call.side = 1 - call.side;
        }
    }

    fn send(&mut self, call: &Call) {
        let bytes = call.bytes();
        self.room.put(call.at, &bytes);
        let here = |at: u64| call.at as u64 + at;
        for (n, attr) in call.attrs.iter().enumerate() {
            let at = self.room.addr(here(HEADER + n as u64 * ATTR) as usize);
            match call.use_of(attr) {
                Use::New => self.room.allow(at + 8, 8),
                Use::Output(len) => {
                    self.room
                        .allow(at + offset_of!(ib_uverbs_attr, flags) as u64, 2);
                    self.room.allow(attr.data, len.min(attr.len.into()));
                    if call.op() == Op::OtherMethod {
                        self.room.allow(at + 8, 8);
                    }
                }
                Use::Given | Use::Nothing => (),
            }
        }
        let header = self.room.addr(call.at);
        let answer = self
            .room
            .run(libc::SYS_ioctl, &[call.fd as u64, call.request, header]);
        let op = call.op();
        self.enter(op, answer, call);
        self.check_attrs(call, answer.is_ok());
        if answer.is_ok() {
            let whole = u64::from(call.count) == call.attrs.len() as u64
                && call.at + bytes.len() <= PAGE
                && call.reserved == 0
                && call.reserved2 == 0;
            let racing = self.racing.contains(&call.fd);
            ensure!(
                whole && (racing || call.fd == self.sides[call.side].fd),
                call,
                "accepted"
            );
        }
        match op {
            Op::Alloc if answer.is_ok() => {
                let (_, at) = call
                    .attr(UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE)
                    .expect("a handle");
                let number = self.room.u64(self.room.addr(at as usize + 8));
                self.created(call.side, number, call);
            }
            Op::Reg if answer.is_ok() => self.after_reg(call),
            Op::Destroy => self.after_destroy(call, answer == Ok(0)),
            Op::Invoke => {
                let response = call.attr(UVERBS_ATTR_CORE_OUT);
                let command = call
                    .command
                    .clone()
                    .zip(response)
                    .map(|(command, (attr, _))| Command {
                        response: attr.data,
                        out: attr.len.into(),
                        ..command
                    });
                match (answer, command) {
                    (Ok(_), Some(command)) => {
                        // A long response may reach over the request, where it is marked.
                        let (_, attr) = response.expect("there is a command with it");
                        let mark = attr + offset_of!(ib_uverbs_attr, flags) as u64;
                        let mark = self.room.addr(mark as usize);
                        self.after_command(call.side, &command, Some(mark), call);
                    }
                    (Ok(_), None) => ensure!(false, call, "accepted no response"),
                    (Err(libc::EFAULT), Some(command)) => {
                        self.after_fault(call.side, &command, call)
                    }
                    (Err(_), _) => (),
                }
            }
            _ => (),
        }
    }

    /// Flags and handles are written as they are meant to be.
    fn check_attrs(&self, call: &Call, succeeded: bool) {
        if call.at + call.bytes().len() > PAGE || call.op() == Op::OtherMethod {
            return;
        }
        let overwritten = call.overwrites_itself(&self.room);
        for (n, attr) in call.attrs.iter().enumerate() {
            let at = self.room.addr(call.at) + HEADER + n as u64 * ATTR;
            let flags = self.room.u16(at + 4);
            let data = self.room.u64(at + 8);
            match call.use_of(attr) {
                _ if overwritten => (),
                Use::New => {
                    let written = data < 4096 || !succeeded && data == attr.data;
                    ensure!(written, call, "the handle is {data:#x}");
                }
                Use::Output(_) => {
                    let fits = (flags ^ attr.flags) & !VALID_OUTPUT == 0;
                    let flagged =
                        flags & VALID_OUTPUT != 0 || !succeeded || call.op() == Op::Invoke;
                    ensure!(
                        fits && flagged,
                        call,
                        "the flags of {attr:x?} are {flags:#x}"
                    );
                }
                Use::Given | Use::Nothing => (),
            }
        }
    }

    fn after_reg(&mut self, call: &Call) {
        let asked = call.asked();
        let handle = call.attr(UVERBS_ATTR_REG_MR_HANDLE);
        ensure!(handle.is_some(), call, "accepted no handle");
        let (_, at) = handle.expect("it was checked");
        let handle = self.room.u64(self.room.addr(at as usize + 8));
        let key = |id| {
            let (attr, _) = call.attr(id)?;
            let others = call.attrs.iter().filter(|other| {
                matches!(call.use_of(other), Use::Output(4)) && other.data.abs_diff(attr.data) < 4
            });
            (others.count() == 1).then(|| self.room.u32(attr.data))
        };
        let keys = (
            key(UVERBS_ATTR_REG_MR_RESP_LKEY),
            key(UVERBS_ATTR_REG_MR_RESP_RKEY),
        );
        // Not after `registered`, which may make room by destroying it.
        if self.exact() && self.one_in(4) {
            let found = self.query(call.side, handle);
            ensure!(found.is_some(), call, "QUERY_MR does not find it");
            let (lkey, rkey, length, iova) = found.expect("it was checked");
            let same = keys.0.is_none_or(|key| key == lkey)
                && keys.1.is_none_or(|key| key == rkey)
                && (length, iova) == (asked.length, asked.iova);
            ensure!(same, call, "{keys:x?}, but QUERY_MR says {found:x?}");
        }
        self.registered(call.side, handle, &asked, call);
    }

    fn after_destroy(&mut self, call: &Call, succeeded: bool) {
        let Some((attr, _)) = call.attr(UVERBS_ATTR_DESTROY_MR_HANDLE) else {
            ensure!(!succeeded, call, "accepted no handle");
            return;
        };
        let handle = attr.data;
        let count = call.attr(UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED);
        let written = |(count, _): (&Attr, u64)| self.room.u32(count.data);
        match succeeded {
            true => self.deregistered(call.side, handle, count.map(written), call),
            // It is gone if only the count could not be written.
            false if self.is_live(call.side, handle) => {
                if self.query(call.side, handle).is_none() {
                    let bad = count.is_some_and(|(count, _)| !self.room.holds(count.data, 4));
                    ensure!(bad, call, "it failed, but the region is gone");
                    self.deregistered(call.side, handle, None, call);
                }
            }
            false => (),
        }
    }

    // The commands

    fn command(&mut self, side: usize) -> Command {
        let number = self.pick(&[CREATE, REG, REG, REG, DEREG, DEREG]);
        let mut asked = self.some_region(side);
        if asked.notify.is_none() {
            asked.notify = Some((self.queue_fd(Some(side)), self.random.random()));
        }
        let word = match number {
            CREATE => 0,
            REG => asked.pd as u32,
            _ => self.live_handle(side).unwrap_or(0) as u32,
        };
        let longer = if self.one_in(8) { 8 } else { 0 };
        let out = Command::response_len(number) + longer;
        let response = self.room.buffer(out as usize);
        Command {
            number,
            comp_mask: 0,
            word,
            asked,
            missing: 0,
            extra: vec![0; longer as usize],
            out,
            response: self.room.addr(response),
        }
    }

    fn mutate_command(&mut self, command: &mut Command, side: usize) {
        match self.random.random_range(0..11) {
            0 => command.comp_mask = 1 << self.random.random_range(0..32),
            1 if command.number == CREATE => command.word = self.odd_number() as u32,
            1 | 2 if command.number != CREATE => command.word = self.odd_handle(side) as u32,
            3 => {
                command.missing = self.pick(&[4, 8]);
                command.extra.clear();
            }
            4 => {
                command.missing = 0;
                command.extra = vec![0; 8 * self.random.random_range(1..4)];
                let at = self.random.random_range(0..command.extra.len());
                command.extra[at] = self.pick(&[0, 1, 0x80]);
            }
            5 => command.out = 8 * self.random.random_range(0..8),
            6 => command.response = self.room.odd_pointer(&mut self.random),
            // Only numbers that no other command has.
            7 => command.number ^= 1 << self.random.random_range(8..31),
            8 => command.number = self.pick(&[CREATE, REG, DEREG]),
            9 => command.number &= !IB_USER_VERBS_CMD_FLAG_EXTENDED,
            _ => self.mutate(&mut command.asked),
        }
    }

    /// A command has succeeded.
    fn after_command(
        &mut self,
        side: usize,
        command: &Command,
        mark: Option<u64>,
        call: &dyn std::fmt::Debug,
    ) {
        let Command { response, out, .. } = *command;
        let full = Command::response_len(command.number);
        ensure!(
            [CREATE, REG, DEREG].contains(&command.number),
            call,
            "accepted the number"
        );
        ensure!(command.comp_mask == 0, call, "accepted comp_mask");
        let zero = command.extra.iter().all(|&byte| byte == 0);
        ensure!(
            zero && command.missing == 0,
            call,
            "accepted another length"
        );
        let fits = out >= full && self.room.holds(response, out);
        ensure!(fits, call, "accepted the response");
        let word = |n: u64| self.room.u32(response + 4 * n);
        let last = full / 4 - 1;
        let header = word(0) == 0 && u64::from(word(1)) == full && word(last) == 0;
        let marked = |n: u64| mark.is_some_and(|mark| (response + 4 * n).abs_diff(mark) < 4);
        let rest = (full / 4..out / 4).all(|n| word(n) == 0 || marked(n));
        ensure!(
            header && rest,
            call,
            "the response is {:x?}",
            self.room.bytes(response, out as usize)
        );
        let first = word(2).into();
        match command.number {
            CREATE => {
                ensure!(command.word == 0, call, "accepted reserved bits");
                self.created(side, first, call);
            }
            REG => {
                let keys = (word(3), word(4));
                let (fd, cookie) = command.asked.notify.unwrap_or((-1, 0));
                let asked = Asked {
                    pd: command.word.into(),
                    access: command.asked.access & u64::from(u32::MAX),
                    notify: Some((i64::from(fd as i32), cookie)),
                    ..command.asked.clone()
                };
                if self.exact() && self.one_in(4) {
                    let found = self.query(side, first);
                    let expected = Some((keys.0, keys.1, asked.length, asked.iova));
                    ensure!(found == expected, call, "QUERY_MR says {found:x?}");
                }
                self.registered(side, first, &asked, call);
            }
            _ => self.deregistered(side, command.word.into(), Some(first as u32), call),
        }
    }

    /// DEREG fails after the region is gone, if the response cannot be written.
    fn after_fault(&mut self, side: usize, command: &Command, call: &dyn std::fmt::Debug) {
        let handle = command.word.into();
        if command.number == DEREG
            && self.is_live(side, handle)
            && self.query(side, handle).is_none()
        {
            let bad = !self.room.holds(command.response, command.out);
            ensure!(bad, call, "it failed, but the region is gone");
            self.deregistered(side, handle, None, call);
        }
    }

    /// A command by write().
    pub fn write(&mut self) {
        self.room.clear();
        let side = self.side();
        let command = self.command(side);
        let mut written = Written {
            fd: self.sides[side].fd,
            count: 0,
            in_words: 0,
            out_words: 0,
            provider_in: 0,
            provider_out: 0,
            reserved: 0,
            command,
        };
        let mut at = 0;
        let odd = !self.one_in(3);
        let times = if odd {
            self.random.random_range(1..4)
        } else {
            0
        };
        let (commands, headers) = match self.random.random() {
            true => (times, 0),
            false => (0, times),
        };
        for _ in 0..commands {
            self.mutate_command(&mut written.command, side);
        }
        if written.command.out == 0 && self.random.random() {
            written.command.response = 0;
        }
        let len = written.bytes().len();
        written.count = len as u64;
        written.in_words = ((len - 24) / 8) as u16;
        written.out_words = (written.command.out / 8) as u16;
        for _ in 0..headers {
            match self.random.random_range(0..8) {
                0 => written.in_words = self.odd_number() as u16,
                1 => written.out_words = self.odd_number() as u16,
                2 => written.provider_in = self.odd_number() as u16,
                3 => written.provider_out = self.pick(&[1, 2, 8, 64]),
                4 => written.reserved = 1 << self.random.random_range(0..32),
                5 => written.count = self.pick(&[0, 7, 8, 23, 24, len as u64 - 8, len as u64 + 8]),
                6 => written.fd = self.queue_fd(None),
                _ => at = PAGE - len + self.pick(&[0, 8]),
            }
        }
        let bytes = written.bytes();
        self.room.put(at, &bytes);
        self.room
            .allow(written.command.response, 8 * u64::from(written.out_words));
        let buffer = self.room.addr(at);
        let args = [written.fd as u64, buffer, written.count];
        let answer = self.room.run(libc::SYS_write, &args);
        let known = [CREATE, REG, DEREG].contains(&written.command.number);
        self.enter(
            if known { Op::Write } else { Op::OtherCommand },
            answer,
            &written,
        );
        match answer {
            Ok(count) => {
                let words = [written.in_words, written.provider_in].map(usize::from);
                let core = 8 * words[0];
                let whole = count == written.count
                    && count as usize == 24 + core + 8 * words[1]
                    && 24 + core <= len
                    && at + 24 + core <= PAGE
                    && written.reserved == 0;
                ensure!(
                    whole && written.fd == self.sides[side].fd,
                    written,
                    "accepted"
                );
                // The rest of the input is the driver's, which ignores it.
                let mut command = sent(&written);
                let known = len - 24 - command.extra.len();
                ensure!(known <= core, written, "accepted a short request");
                command.extra.truncate(core - known);
                self.after_command(side, &command, None, &written);
            }
            Err(libc::EFAULT) => self.after_fault(side, &sent(&written), &written),
            Err(_) => (),
        }
    }
}

/// The command, with the room for the response that the header says.
fn sent(written: &Written) -> Command {
    Command {
        out: 8 * u64::from(written.out_words),
        ..written.command.clone()
    }
}

fn attr(id: u32, len: u16, data: u64) -> Attr {
    Attr {
        id: id as u16,
        len,
        flags: MANDATORY,
        reserved: 0,
        data,
    }
}

fn seal(call: &mut Call) {
    call.count = call.attrs.len() as u16;
    call.length = HEADER as u16 + call.count * ATTR as u16;
}

fn sealed(mut call: Call) -> Call {
    seal(&mut call);
    call
}

/// Leaves out what is not the subject, and what would hide what the kernel has written.
fn tame(call: &mut Call, room: &Room) {
    // On-demand paging without a watch.
    if call.attr(UVERBS_ATTR_REG_MR_NOTIFY_FD).is_none() {
        for attr in &mut call.attrs {
            if u32::from(attr.id) == UVERBS_ATTR_REG_MR_ACCESS_FLAGS {
                attr.data &= !u64::from(IB_UVERBS_ACCESS_ON_DEMAND);
            }
        }
    }
    // An output over the handle, which only a request at the end of the page has.
    if call.overwrites_itself(room) {
        call.at = 0;
    }
}

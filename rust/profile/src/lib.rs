// SPDX-License-Identifier: GPL-2.0
//! A plugin of QEMU that counts how often each instruction of the guest is executed.
//!
//! The guest starts a count by the marker [`START`] and ends it by [`STOP`], which
//! writes the file `OUT.N`, N counting from 0: a line for each address that was
//! executed, with the address, how often, and how often of it between the calls of the
//! functions at `lock` and at `unlock`. Arguments: `out=OUT,lock=ADDRESS,unlock=ADDRESS`,
//! hexadecimal. For a guest with one CPU. With `cover=RANGES` it does what [`cover`] says
//! instead.
//!
//! The interface is `qemu-plugin.h` of QEMU. Debian does not package it, so what is used
//! of it is declared here. A plugin says for which version of the interface it is built;
//! QEMU_PLUGIN_VERSION gives it at compile time: 1 for QEMU 7 and 8, 3 for later ones,
//! which do not take 1.

mod cover;

use std::{
    cell::Cell,
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    fs::File,
    io::{BufWriter, Write},
    slice,
    sync::Mutex,
};

/// `nopl 0x5eed0001(%rax,%rax,1)`: the count starts.
pub const START: [u8; 8] = [0x0f, 0x1f, 0x84, 0x00, 0x01, 0x00, 0xed, 0x5e];
/// `nopl 0x5eed0002(%rax,%rax,1)`: the count ends.
pub const STOP: [u8; 8] = [0x0f, 0x1f, 0x84, 0x00, 0x02, 0x00, 0xed, 0x5e];

const VERSION: c_int = match option_env!("QEMU_PLUGIN_VERSION") {
    None => 1,
    Some(version) => match version.as_bytes() {
        b"1" => 1,
        b"3" => 3,
        _ => panic!("QEMU_PLUGIN_VERSION must be 1 or 3"),
    },
};

/// What QEMU looks for.
#[unsafe(no_mangle)]
pub static qemu_plugin_version: c_int = VERSION;

type Insn = c_void;
type Translated = extern "C" fn(u64, *mut c_void);
type Executed = extern "C" fn(c_uint, *mut c_void);

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, callback: Translated);
    fn qemu_plugin_tb_n_insns(tb: *const c_void) -> usize;
    fn qemu_plugin_tb_get_insn(tb: *const c_void, index: usize) -> *mut Insn;
    fn qemu_plugin_insn_vaddr(insn: *const Insn) -> u64;
    fn qemu_plugin_insn_size(insn: *const Insn) -> usize;
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        insn: *mut Insn,
        callback: Executed,
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_register_atexit_cb(
        id: u64,
        callback: extern "C" fn(u64, *mut c_void),
        data: *mut c_void,
    );
    /// Version 1: `const void *(const insn *)`; 3: `size_t (const insn *, void *, size_t)`.
    fn qemu_plugin_insn_data();
}

/// How often an instruction was executed.
#[derive(Default)]
struct Count {
    all: Cell<u64>,
    locked: Cell<u64>,
}

/// Everything that a callback changes. The guest has one CPU, so QEMU runs one callback
/// at a time.
#[derive(Default)]
struct State {
    counting: Cell<bool>,
    locked: Cell<bool>,
}

// SAFETY: With one CPU there is one thread that executes the guest's code.
unsafe impl Sync for State {}

static STATE: State = State {
    counting: Cell::new(false),
    locked: Cell::new(false),
};

/// Counts by address. Never freed, as translated code refers to them.
#[derive(Default)]
struct Counts {
    by_address: HashMap<u64, &'static Count>,
    out: String,
    written: usize,
    lock: u64,
    unlock: u64,
}

// SAFETY: As for `State`.
unsafe impl Send for Counts {}

static COUNTS: Mutex<Option<Counts>> = Mutex::new(None);

fn with_counts<R>(f: impl FnOnce(&mut Counts) -> R) -> R {
    f(COUNTS
        .lock()
        .expect("no callback panics")
        .get_or_insert_default())
}

/// The first bytes of an instruction.
///
/// # Safety
///
/// `insn` must be the instruction that a translation callback looks at.
unsafe fn bytes(insn: *const Insn) -> [u8; 8] {
    let mut bytes = [0; 8];
    // SAFETY: `insn` is valid, and the function has this type in the version built for.
    unsafe {
        let function = qemu_plugin_insn_data as unsafe extern "C" fn();
        if VERSION == 1 {
            let get: unsafe extern "C" fn(*const Insn) -> *const u8 = std::mem::transmute(function);
            let size = qemu_plugin_insn_size(insn).min(bytes.len());
            bytes[..size].copy_from_slice(slice::from_raw_parts(get(insn), size));
        } else {
            let get: unsafe extern "C" fn(*const Insn, *mut u8, usize) -> usize =
                std::mem::transmute(function);
            get(insn, bytes.as_mut_ptr(), bytes.len());
        }
    }
    bytes
}

extern "C" fn executed(_: c_uint, data: *mut c_void) {
    if STATE.counting.get() {
        // SAFETY: `translated()` passed a count, which is never freed.
        let count = unsafe { &*data.cast_const().cast::<Count>() };
        count.all.set(count.all.get() + 1);
        if STATE.locked.get() {
            count.locked.set(count.locked.get() + 1);
        }
    }
}

extern "C" fn locked(_: c_uint, _: *mut c_void) {
    STATE.locked.set(true);
}

extern "C" fn unlocked(_: c_uint, _: *mut c_void) {
    STATE.locked.set(false);
}

extern "C" fn start(_: c_uint, _: *mut c_void) {
    with_counts(|counts| {
        for count in counts.by_address.values() {
            count.all.set(0);
            count.locked.set(0);
        }
    });
    STATE.counting.set(true);
}

extern "C" fn stop(_: c_uint, _: *mut c_void) {
    STATE.counting.set(false);
    with_counts(|counts| {
        let path = format!("{}.{}", counts.out, counts.written);
        counts.written += 1;
        let write = || {
            let mut file = BufWriter::new(File::create(&path)?);
            for (address, count) in &counts.by_address {
                if count.all.get() != 0 {
                    writeln!(
                        file,
                        "{address:x} {} {}",
                        count.all.get(),
                        count.locked.get()
                    )?;
                }
            }
            file.flush()
        };
        if let Err(error) = write() {
            eprintln!("profile plugin: {path}: {error}");
        }
    });
}

extern "C" fn translated(_: u64, tb: *mut c_void) {
    // SAFETY: QEMU passes a block that is valid during this call.
    for index in 0..unsafe { qemu_plugin_tb_n_insns(tb) } {
        // SAFETY: The block has an instruction of this index, valid as long as the block.
        let (insn, address, bytes) = unsafe {
            let insn = qemu_plugin_tb_get_insn(tb, index);
            (insn, qemu_plugin_insn_vaddr(insn), bytes(insn))
        };
        let call = |callback: Executed, data: *mut c_void| {
            // SAFETY: As above. The callbacks accept the data that goes with them. No
            // registers of the guest are accessed: flags 0.
            unsafe { qemu_plugin_register_vcpu_insn_exec_cb(insn, callback, 0, data) };
        };
        with_counts(|counts| match bytes {
            START => call(start, std::ptr::null_mut()),
            STOP => call(stop, std::ptr::null_mut()),
            _ => {
                // In the order of registration.
                if address == counts.unlock {
                    call(unlocked, std::ptr::null_mut());
                }
                let count = *counts
                    .by_address
                    .entry(address)
                    .or_insert_with(|| Box::leak(Box::default()));
                call(executed, std::ptr::from_ref(count).cast_mut().cast());
                if address == counts.lock {
                    call(locked, std::ptr::null_mut());
                }
            }
        });
    }
}

/// What QEMU calls when it loads the plugin.
///
/// # Safety
///
/// `argv` must be an array of `argc` strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let mut ranges = None;
    for index in 0..usize::try_from(argc).unwrap_or(0) {
        // SAFETY: The caller promises that the string is there.
        let argument = unsafe { CStr::from_ptr(*argv.add(index)) }.to_string_lossy();
        let Some((name, value)) = argument.split_once('=') else {
            continue;
        };
        with_counts(|counts| match name {
            "out" => counts.out = value.to_owned(),
            "cover" => ranges = Some(value.to_owned()),
            "lock" => counts.lock = u64::from_str_radix(value, 16).unwrap_or(0),
            "unlock" => counts.unlock = u64::from_str_radix(value, 16).unwrap_or(0),
            _ => eprintln!("profile plugin: what is {argument}?"),
        });
    }
    if let Some(ranges) = ranges {
        return with_counts(|counts| cover::install(id, &ranges, &counts.out));
    }
    // SAFETY: `id` is this plugin's.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    0
}

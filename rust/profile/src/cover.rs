// SPDX-License-Identifier: GPL-2.0
//! Records which instructions the guest executes at all, from its boot to its end, on any
//! number of CPUs.
//!
//! `RANGES` is a file of lines "START END", hexadecimal, the latter exclusive. Only
//! instructions in there are looked at. When QEMU ends, `OUT` gets a line with the address of
//! each that was executed.

use super::{
    Executed, qemu_plugin_insn_vaddr, qemu_plugin_register_atexit_cb,
    qemu_plugin_register_vcpu_insn_exec_cb, qemu_plugin_register_vcpu_tb_trans_cb,
    qemu_plugin_tb_get_insn, qemu_plugin_tb_n_insns,
};
use std::{
    collections::BTreeMap,
    error::Error,
    ffi::{c_int, c_uint, c_void},
    fs::{self, File},
    io::{BufWriter, Write},
    ptr,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

struct Cover {
    /// Ends by starts.
    ranges: BTreeMap<u64, u64>,
    out: String,
    /// Never freed, as translated code refers to them.
    executed: Mutex<BTreeMap<u64, &'static AtomicBool>>,
}

static COVER: OnceLock<Cover> = OnceLock::new();

extern "C" fn executed(_: c_uint, data: *mut c_void) {
    // SAFETY: `translated()` passed it, and it is never freed.
    unsafe { &*data.cast_const().cast::<AtomicBool>() }.store(true, Ordering::Relaxed);
}

extern "C" fn translated(_: u64, tb: *mut c_void) {
    let Some(cover) = COVER.get() else { return };
    // SAFETY: QEMU passes a block that is valid during this call.
    for index in 0..unsafe { qemu_plugin_tb_n_insns(tb) } {
        // SAFETY: The block has an instruction of this index, valid as long as the block.
        let (insn, address) = unsafe {
            let insn = qemu_plugin_tb_get_insn(tb, index);
            (insn, qemu_plugin_insn_vaddr(insn))
        };
        let range = cover.ranges.range(..=address).next_back();
        if range.is_none_or(|(_, end)| address >= *end) {
            continue;
        }
        let flag: &'static AtomicBool = cover
            .executed
            .lock()
            .expect("no callback panics")
            .entry(address)
            .or_insert_with(|| Box::leak(Box::default()));
        let callback: Executed = executed;
        // SAFETY: As above. The callback accepts the data that goes with it. No registers of
        // the guest are accessed: flags 0.
        unsafe {
            let data = ptr::from_ref(flag).cast_mut().cast();
            qemu_plugin_register_vcpu_insn_exec_cb(insn, callback, 0, data);
        }
    }
}

extern "C" fn write(_: u64, _: *mut c_void) {
    let Some(cover) = COVER.get() else { return };
    let write = || {
        let mut file = BufWriter::new(File::create(&cover.out)?);
        for (address, flag) in &*cover.executed.lock().expect("no callback panics") {
            if flag.load(Ordering::Relaxed) {
                writeln!(file, "{address:x}")?;
            }
        }
        file.flush()
    };
    if let Err(error) = write() {
        eprintln!("profile plugin: {}: {error}", cover.out);
    }
}

fn parse(ranges: &str) -> Result<BTreeMap<u64, u64>, Box<dyn Error>> {
    let address = |word| u64::from_str_radix(word, 16);
    let mut parsed = BTreeMap::new();
    for line in fs::read_to_string(ranges)?.lines() {
        let (start, end) = line.split_once(' ').ok_or("a word is missing")?;
        parsed.insert(address(start)?, address(end)?);
    }
    Ok(parsed)
}

/// Makes the plugin `id` write `out`. Nonzero is an error, which ends QEMU.
pub fn install(id: u64, ranges: &str, out: &str) -> c_int {
    let ranges = match parse(ranges) {
        Ok(ranges) => ranges,
        Err(error) => {
            eprintln!("profile plugin: {ranges}: {error}");
            return 1;
        }
    };
    let cover = Cover {
        ranges,
        out: out.to_owned(),
        executed: Mutex::default(),
    };
    if COVER.set(cover).is_err() {
        return 1;
    }
    // SAFETY: `id` is this plugin's.
    unsafe {
        qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
        qemu_plugin_register_atexit_cb(id, write, ptr::null_mut());
    }
    0
}

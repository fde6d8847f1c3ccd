// SPDX-License-Identifier: GPL-2.0
//! Libraries that hook system calls in userspace: UCX's ucm, and libfabric's memhooks.
//! Each in a process of its own, since nothing takes the hooks out again.

use crate::{
    measure::{BATCH, each, sample},
    row::Rows,
};
use anyhow::{Result, bail, ensure};
use rustix::io::{read, write};
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    mem::transmute_copy,
    os::unix::net::UnixStream,
    path::Path,
    ptr,
    sync::atomic::{AtomicUsize, Ordering},
};
use uverbs_mmu_notify_tests::*;

const PAGES: usize = 16;

pub fn run(rows: &mut Rows) -> Result<()> {
    for (name, path, hook) in [
        ("ucm of UCX", c"libucs.so.0", hook_by_ucm as Install),
        ("memhooks of libfabric", c"libfabric.so.1", hook_by_memhooks),
    ] {
        match in_process(hook, path) {
            Ok([plain, hooked, raw_plain, raw_hooked]) => {
                let params = [("peer", name.into()), ("call", "of libc".into())];
                rows.added("MADV_DONTNEED of 64 KiB", &params, hooked, plain);
                let params = [("peer", name.into()), ("call", "raw, not seen".into())];
                rows.added("MADV_DONTNEED of 64 KiB", &params, raw_hooked, raw_plain);
            }
            Err(error) => rows.skip(&format!("{name}: {error:#}")),
        }
    }
    Ok(())
}

/// Installs hooks; what it returns lives as long as the process.
type Install = fn(&Library, Map) -> Result<()>;

/// A loaded library.
struct Library(*mut c_void);

impl Library {
    /// Whether some process loads it without an error, or could but for other libraries.
    fn is_installed(path: &CStr) -> bool {
        let name = path.to_str().expect("it is ASCII");
        let folders = [
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib64",
            "/usr/lib",
            "/usr/local/lib",
        ];
        folders
            .iter()
            .any(|folder| Path::new(folder).join(name).exists())
    }

    fn load(path: &CStr) -> Result<Self> {
        // SAFETY: The library has no preconditions for being loaded.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if library.is_null() {
            // SAFETY: There is an error, and one thread.
            let error = unsafe { CStr::from_ptr(libc::dlerror()) };
            bail!("{}", error.to_string_lossy());
        }
        Ok(Self(library))
    }

    /// # Safety
    ///
    /// `F` is the type of the function.
    unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F> {
        // SAFETY: The library is loaded, and never unloaded.
        let found = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        ensure!(!found.is_null(), "no {}", name.to_string_lossy());
        assert_eq!(size_of::<F>(), size_of_val(&found), "a pointer");
        // SAFETY: By the contract.
        Ok(unsafe { transmute_copy(&found) })
    }
}

/// MADV_DONTNEED by libc, and as a raw system call, without hooks and with them. There are
/// no pages to free.
fn in_process(install: Install, path: &'static CStr) -> Result<[f64; 4]> {
    let (results, theirs) = UnixStream::pair()?;
    if !Library::is_installed(path) {
        bail!("there is no {}", path.to_string_lossy());
    }
    let child = Child::fork(|| {
        let map = Map::untouched(PAGES);
        let both = || {
            let by_libc = || drop(map.advise(0..PAGES, libc::MADV_DONTNEED));
            let raw = || map.dont_need(0..PAGES);
            [
                sample(|| each(BATCH, |_| by_libc())),
                sample(|| each(BATCH, |_| raw())),
            ]
        };
        let [plain, raw_plain] = both();
        let installed = Library::load(path).and_then(|library| install(&library, Map::new(PAGES)));
        if let Err(error) = installed {
            eprintln!("{}: {error:#}", path.to_string_lossy());
            return 1;
        }
        let [hooked, raw_hooked] = both();
        for value in [plain, hooked, raw_plain, raw_hooked] {
            write(&theirs, &value.to_ne_bytes()).expect("answer");
        }
        0
    });
    let exit = child.wait();
    ensure!(
        exit == Exit::Code(0),
        "the hooks could not be installed: {exit:?}"
    );
    let mut values = [0.0; 4];
    for value in &mut values {
        let mut bytes = [0; 8];
        let len = read(&results, &mut bytes)?;
        ensure!(len == bytes.len(), "the results are incomplete");
        *value = f64::from_ne_bytes(bytes);
    }
    Ok(values)
}

static SEEN: AtomicUsize = AtomicUsize::new(0);

/// Whether a munmap() by libc is seen, and a raw one is not.
fn expect_hooked() -> Result<()> {
    let map = Map::new(2 * PAGES);
    let seen = || SEEN.load(Ordering::Relaxed);
    let before = seen();
    // SAFETY: No reference points into a map.
    unsafe { libc::munmap(map.void(0), PAGES * PAGE) };
    ensure!(seen() > before, "munmap() of libc is not seen");
    let before = seen();
    map.unmap(PAGES..2 * PAGES);
    ensure!(seen() == before, "a raw munmap is seen");
    Ok(())
}

/// `ucm_set_event_handler()` of `ucm/api/ucm.h`. libucm cannot be loaded by itself.
fn hook_by_ucm(_: &Library, _: Map) -> Result<()> {
    const VM_UNMAPPED: c_int = 1 << 17;
    type Callback = extern "C" fn(c_int, *mut c_void, *mut c_void);
    type SetHandler = unsafe extern "C" fn(c_int, c_int, Callback, *mut c_void) -> c_char;
    extern "C" fn seen(_: c_int, _: *mut c_void, _: *mut c_void) {
        SEEN.fetch_add(1, Ordering::Relaxed);
    }
    let library = Library::load(c"libucm.so.0")?;
    // SAFETY: That is its type.
    let set: SetHandler = unsafe { library.function(c"ucm_set_event_handler") }?;
    // SAFETY: The callback may be called at any time.
    let status = unsafe { set(VM_UNMAPPED, 1000, seen, ptr::null_mut()) };
    ensure!(status == 0, "ucm_set_event_handler: {status}");
    expect_hooked()
}

/// The head of each object of `rdma/fabric.h`.
#[repr(C)]
struct Fid {
    class: usize,
    context: *mut c_void,
    ops: *mut c_void,
}

#[repr(C)]
struct FabricOps {
    size: usize,
    domain: unsafe extern "C" fn(*mut Fabric, *mut Info, *mut *mut Domain, *mut c_void) -> c_int,
}

#[repr(C)]
struct Fabric {
    fid: Fid,
    ops: *mut FabricOps,
}

#[repr(C)]
struct MrOps {
    size: usize,
    reg: unsafe extern "C" fn(
        *mut Domain,
        *const c_void,
        usize,
        u64,
        u64,
        u64,
        u64,
        *mut *mut Fid,
        *mut c_void,
    ) -> c_int,
}

#[repr(C)]
struct Domain {
    fid: Fid,
    ops: *mut c_void,
    mr: *mut MrOps,
}

/// `struct fi_info`.
#[repr(C)]
struct Info {
    next: *mut Info,
    caps: u64,
    mode: u64,
    addr_format: u32,
    lengths: [usize; 2],
    addresses: [*mut c_void; 2],
    handle: *mut c_void,
    attrs: [*mut c_void; 4],
    fabric_attr: *mut c_void,
}

/// A domain of the verbs provider, whose cache starts the monitor, and a registration.
fn hook_by_memhooks(library: &Library, map: Map) -> Result<()> {
    const VERSION: u32 = 1 << 16 | 17;
    const SEND: u64 = 1 << 11; // FI_SEND
    for (name, value) in [
        (c"FI_MR_CACHE_MONITOR", c"memhooks"),
        (c"FI_PROVIDER", c"verbs"),
    ] {
        // SAFETY: There is one thread.
        unsafe { libc::setenv(name.as_ptr(), value.as_ptr(), 1) };
    }
    type GetInfo = unsafe extern "C" fn(
        u32,
        *const c_char,
        *const c_char,
        u64,
        *const Info,
        *mut *mut Info,
    ) -> c_int;
    type OpenFabric = unsafe extern "C" fn(*mut c_void, *mut *mut Fabric, *mut c_void) -> c_int;
    let (mut info, mut fabric) = (ptr::null_mut(), ptr::null_mut());
    let (mut domain, mut mr) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: The types are those of the headers, and each object is there if the call
    // before has succeeded.
    let step = unsafe {
        let get_info: GetInfo = library.function(c"fi_getinfo")?;
        let open_fabric: OpenFabric = library.function(c"fi_fabric")?;
        let null = ptr::null();
        if get_info(VERSION, null, null, 0, ptr::null(), &mut info) != 0 {
            "fi_getinfo"
        } else if open_fabric((*info).fabric_attr, &mut fabric, ptr::null_mut()) != 0 {
            "fi_fabric"
        } else if ((*(*fabric).ops).domain)(fabric, info, &mut domain, ptr::null_mut()) != 0 {
            "fi_domain"
        } else if ((*(*domain).mr).reg)(
            domain,
            map.void(0),
            PAGES * PAGE,
            SEND,
            0,
            0,
            0,
            &mut mr,
            ptr::null_mut(),
        ) != 0
        {
            "fi_mr_reg"
        } else {
            return Ok(());
        }
    };
    bail!("{step} failed")
}

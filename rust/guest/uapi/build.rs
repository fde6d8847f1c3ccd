// SPDX-License-Identifier: GPL-2.0
//! Generates the kernel's interface from the series' own headers, and
//! libibverbs' from the system's.

use std::{env, path::Path, process::exit};

const HEADERS: &str = "UVERBS_MMU_NOTIFY_HEADERS";

fn generate(builder: bindgen::Builder, file: &str) {
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(file);
    let bindings = builder
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()))
        .prepend_enum_name(false)
        .derive_default(true)
        .generate_comments(false)
        .generate()
        .unwrap_or_else(|e| fail(&format!("{file}: {e}")));
    bindings
        .write_to_file(out)
        .unwrap_or_else(|e| fail(&format!("{file}: {e}")));
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={HEADERS}");
    println!("cargo::rustc-link-lib=ibverbs");

    let headers = env::var(HEADERS).unwrap_or_else(|_| {
        fail(&format!(
            "{HEADERS} is not set; run `make headers_install INSTALL_HDR_PATH=DIR` \
             in the patched kernel tree and set it to DIR/include"
        ))
    });
    if !Path::new(&headers)
        .join("rdma/ib_user_ioctl_cmds.h")
        .is_file()
    {
        fail(&format!(
            "{HEADERS}={headers} is not the include folder of a headers_install"
        ));
    }

    // rdma-core ships its own copy of these headers under the same include
    // guards, so the two cannot be read in one go.
    generate(
        bindgen::builder()
            .header_contents(
                "uapi.h",
                "#include <rdma/rdma_user_ioctl_cmds.h>\n\
                 #include <rdma/ib_user_ioctl_cmds.h>\n\
                 #include <rdma/ib_user_ioctl_verbs.h>\n\
                 #include <rdma/ib_user_verbs.h>\n",
            )
            .clang_arg(format!("-I{headers}"))
            .allowlist_file(".*/rdma/(rdma_user_ioctl_cmds|ib_user_.*)\\.h"),
        "uapi.rs",
    );
    generate(
        bindgen::builder()
            .header_contents("verbs.h", "#include <infiniband/verbs.h>\n")
            .allowlist_function("ibv_.*")
            .allowlist_type("ibv_.*")
            .allowlist_var("IBV_.*"),
        "verbs.rs",
    );
}

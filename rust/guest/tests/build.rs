// SPDX-License-Identifier: GPL-2.0
//! Compiles the C program of Documentation/uapi.md, as it is shown.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../Documentation/uapi.md");
    println!("cargo::rerun-if-changed={}", text.display());
    println!("cargo::rerun-if-env-changed=UVERBS_MMU_NOTIFY_HEADERS");
    let headers = env::var("UVERBS_MMU_NOTIFY_HEADERS").expect("UVERBS_MMU_NOTIFY_HEADERS");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("OUT_DIR"));

    let text = fs::read_to_string(text).expect("read uapi.md");
    let (_, program) = text.split_once("\n```c\n").expect("a program");
    let (program, _) = program.split_once("\n```\n").expect("its end");
    let source = out.join("sample.c");
    fs::write(&source, program).expect("write the program");
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-I", &headers, "-o"])
        .args([&out.join("sample"), &source])
        .arg("-libverbs")
        .status();
    assert!(status.expect("run cc").success(), "the program compiles");
}

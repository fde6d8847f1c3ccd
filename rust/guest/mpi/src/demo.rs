// SPDX-License-Identifier: GPL-2.0
//! The demo: Open MPI over UCX, both as the distribution has them, with the
//! distribution's libraries below and with ours.

use crate::{
    Setup,
    job::{Job, Libraries, Stack, Verdict},
};
use anyhow::Result;

const STACK: Stack = Stack::OpenMpiUcx;
const SIZE: &str = "1024";

pub fn run(setup: &Setup) -> Result<bool> {
    println!(
        "Two MPI ranks over soft-RoCE. One uses a buffer of 1 MiB, changes its mapping, fills"
    );
    println!(
        "the buffer again, and uses it again: sends from it, or receives into it. Both columns"
    );
    println!("use the distribution's Open MPI. Only UCX and libibverbs below it differ.\n");

    let both = [Libraries::Distribution, Libraries::Ours];
    let mut good = true;
    let jobs = |name: &str, program: &[&str]| -> Result<Vec<Job>> {
        both.iter()
            .map(|&libraries| Job::run(setup, STACK, libraries, name, program, &[]))
            .collect()
    };
    let rows = jobs("demo", &["stale.openmpi", "rows", "all", SIZE])?;
    for (job, libraries) in rows.iter().zip(both) {
        let loaded = job.check_libraries(setup, STACK, libraries);
        if loaded != Verdict::Right {
            println!("{} libraries: {loaded}", libraries.name());
            good = false;
        }
    }
    line("change of the mapping", "distribution's", "ours");
    for change in setup.changes()? {
        good &= compare(&rows, &change.name, &change.text);
    }
    let go = jobs("collect", &["collect"])?;
    good &= compare(
        &go,
        "garbage_collector",
        "Go program: the garbage collector",
    );
    for job in rows.iter().chain(&go) {
        if let Some(failure) = &job.failure {
            println!("A job failed: {failure}");
        }
    }
    let verdict = match good {
        true => "With our libraries all data is right.",
        false => "With our libraries NOT all data is right.",
    };
    println!("\n{verdict}");
    Ok(good)
}

/// Prints a line, and returns whether the last job, with our libraries, was right.
fn compare(jobs: &[Job], name: &str, text: &str) -> bool {
    let of = |job: &Job| {
        let all = ["send", "receive"].map(|way| job.verdict(&format!("{name} {way} {SIZE}KiB")));
        let unknown = |v: &&Verdict| matches!(v, Verdict::Unknown(_));
        all.iter()
            .find(unknown)
            .or_else(|| all.iter().find(|&v| *v != Verdict::Right))
            .cloned()
            .unwrap_or(Verdict::Right)
    };
    let [before, after] = [&jobs[0], &jobs[1]].map(of);
    line(text, &short(&before), &short(&after));
    after == Verdict::Right
}

fn short(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Wrong(_) => "WRONG".into(),
        other => other.to_string(),
    }
}

fn line(text: &str, before: &str, after: &str) {
    println!("{text:<52}{before:<16}{after}");
}

// SPDX-License-Identifier: GPL-2.0
//! Runs the MPI programs of ci/mpi over soft-RoCE, with the distribution's libraries and
//! with patched ones, and tells where data is wrong. Runs in the guest.

mod cost;
mod demo;
mod job;
mod suite;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use job::Stack;
use std::{path::PathBuf, process::Command, process::ExitCode};

/// Runs MPI jobs over soft-RoCE, with the distribution's libraries and the patched ones.
#[derive(Parser)]
struct Setup {
    /// Folder of the programs
    #[arg(long)]
    programs: PathBuf,
    /// Folder for the output of each job
    #[arg(long)]
    logs: PathBuf,
    /// Folders of the patched libraries, as in LD_LIBRARY_PATH
    #[arg(long)]
    ours: String,
    /// RDMA device
    #[arg(long, default_value = "rxe0", global = true)]
    device: String,
    /// Only these stacks
    #[arg(long, value_enum, global = true)]
    stack: Vec<Stack>,
    /// How long a job may take, in seconds, besides the random test
    #[arg(long, default_value_t = 300, global = true)]
    timeout: u64,
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// One page: what is wrong with the distribution's libraries, and right with ours
    Demo,
    /// All tests, as TAP
    Suite(suite::Args),
    /// The patched libraries only, with 64 KiB, as TAP; for a slow kernel
    Patched(suite::Args),
    /// On a kernel without the feature: ours do what the distribution's do, as TAP
    Unsupported,
    /// Random changes and transfers only, as TAP
    Soak(suite::Args),
    /// What a transfer costs; needs one CPU whose clock counts instructions
    Cost,
}

/// A change of a mapping that the programs know.
struct Change {
    name: String,
    text: String,
}

impl Setup {
    /// The stacks to test.
    fn stacks(&self) -> &[Stack] {
        match &self.stack[..] {
            [] => &Stack::ALL,
            some => some,
        }
    }

    /// The changes, as the program lists them.
    fn changes(&self) -> Result<Vec<Change>> {
        let output = Command::new(self.programs.join("stale.openmpi"))
            .arg("list")
            .output()
            .context("stale.openmpi")?;
        let changes: Vec<_> = String::from_utf8(output.stdout)?
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .map(|(name, text)| Change {
                name: name.into(),
                text: text.into(),
            })
            .collect();
        ensure!(!changes.is_empty(), "stale.openmpi lists no change");
        Ok(changes)
    }
}

fn main() -> ExitCode {
    let mut setup = Setup::parse();
    if let What::Suite(args) | What::Patched(args) | What::Soak(args) = &setup.command {
        setup.timeout += args.seconds;
    }
    let good = match &setup.command {
        What::Demo => demo::run(&setup),
        What::Suite(args) => suite::run(&setup, args),
        What::Patched(args) => suite::patched(&setup, args),
        What::Unsupported => suite::unsupported(&setup),
        What::Soak(args) => suite::soak(&setup, args),
        What::Cost => cost::run(&setup),
    };
    match good {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("mmu-notify-mpi: {e:#}");
            ExitCode::from(2)
        }
    }
}

// SPDX-License-Identifier: GPL-2.0
//! What watching costs, in instructions: `run` counts in the guest, `report` judges on
//! the host, and `compare` shows what changed between two reports.

mod budget;
mod hooks;
mod job;
mod measure;
mod mpi;
mod peers;
mod plot;
mod population;
mod queue;
mod report;
mod row;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};
use uverbs_mmu_notify_tests::{Child, Exit};

/// Counts what watching costs, and judges it.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Counts, in a guest with one CPU whose clock counts instructions
    Run {
        /// Where the rows go, a line of JSON each
        rows: PathBuf,
        /// Only these parts: queue, peers, job, memory, population, mpi
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// The most watches elsewhere in the process
        #[arg(long, default_value_t = 100_000)]
        watches: usize,
        /// The command that counts transfers of MPI
        #[arg(long)]
        mpi: String,
    },
    /// Prints the rows, and fails if one is over its budget
    Report {
        /// What `run` wrote
        rows: PathBuf,
        /// Where the report goes, as JSON
        #[arg(long)]
        json: PathBuf,
        /// The folder for plots, SVG and PNG
        #[arg(long)]
        plots: PathBuf,
        /// The rows are of a part only: a budget without a row is no failure
        #[arg(long)]
        partial: bool,
    },
    /// Prints what differs between two reports
    Compare {
        /// The report before
        before: PathBuf,
        /// The report after
        after: PathBuf,
        /// Leaves out what differs by less, in per cent
        #[arg(long, default_value_t = 1.0)]
        least: f64,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mmu-notify-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether all is within its budget.
fn run(command: Command) -> Result<bool> {
    match command {
        Command::Run {
            rows,
            only,
            watches,
            mpi,
        } => count(&rows, &only, watches, &mpi).map(|()| true),
        Command::Report {
            rows,
            json,
            plots,
            partial,
        } => report::report(&rows, &json, &plots, partial),
        Command::Compare {
            before,
            after,
            least,
        } => report::compare(&before, &after, least).map(|()| true),
    }
}

fn count(path: &Path, only: &[String], watches: usize, mpi: &str) -> Result<()> {
    measure::check_clock()?;
    let mut rows = row::Rows::create(path)?;
    type Part<'a> = (&'static str, &'a dyn Fn(&mut row::Rows) -> Result<()>);
    let parts: [Part<'_>; _] = [
        ("queue", &queue::run),
        ("peers", &peers::run),
        ("job", &job::run),
        ("memory", &|rows| population::memory(rows, watches)),
        ("population", &|rows| population::run(rows, watches)),
        ("mpi", &|rows| mpi::run(rows, mpi)),
    ];
    for name in only {
        let known = parts.iter().any(|(part, _)| part == name);
        ensure!(known, "--only: there is no part {name}");
    }
    // Each in a process of its own, which has not opened anything yet.
    for (name, run) in parts {
        if only.is_empty() || only.iter().any(|wanted| wanted == name) {
            let child = Child::fork(|| match run(&mut rows) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("{name}: {error:#}");
                    1
                }
            });
            let exit = child.wait();
            ensure!(exit == Exit::Code(0), "{name} failed: {exit:?}");
        }
    }
    rows.end();
    Ok(())
}

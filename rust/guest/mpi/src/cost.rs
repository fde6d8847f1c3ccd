// SPDX-License-Identifier: GPL-2.0
//! What a transfer costs: the lines of the program, each after the stack and what has the
//! registrations. `mmu-notify-bench` judges them.

use crate::{
    Setup,
    job::{Job, Libraries, Stack, Verdict, ZERO_COPY},
};
use anyhow::{Result, ensure};

const STACKS: [Stack; 2] = [Stack::OpenMpiUcx, Stack::OpenMpiOfi];

type Environment = &'static [(&'static str, &'static str)];

/// Without a cache each transfer registers its buffer.
const NO_CACHE: Environment = &[
    ("UCX_IB_REG_METHODS", "direct"),
    ("UCX_RCACHE_ENABLE", "n"),
    ("FI_MR_CACHE_MAX_COUNT", "0"),
];

const WAYS: [(&str, Libraries, Environment); 3] = [
    ("hooks", Libraries::Distribution, &[]),
    ("ours", Libraries::Ours, &[]),
    ("no-cache", Libraries::Ours, NO_CACHE),
];

pub fn run(setup: &Setup) -> Result<bool> {
    for stack in STACKS {
        for (way, libraries, environment) in WAYS {
            // A rank that waits has to give the only CPU away.
            let always = [("OMPI_MCA_mpi_yield_when_idle", "1")];
            let environment = [&ZERO_COPY[..], &always, environment].concat();
            let program = format!("stale.{}", stack.mpi());
            let name = format!("cost-{way}");
            let program = [program.as_str(), "cost"];
            let job = Job::run(setup, stack, libraries, &name, &program, &environment)?;
            let name = format!("{} {way}", stack.name());
            ensure!(job.failure.is_none(), "{name}: {:?}", job.failure);
            let loaded = job.check_libraries(setup, stack, libraries);
            ensure!(loaded == Verdict::Right, "{name}: {loaded}");
            let lines = job.output.lines();
            for line in lines.filter_map(|line| line.strip_prefix("cost ")) {
                println!("{name} {line}");
            }
        }
    }
    Ok(true)
}

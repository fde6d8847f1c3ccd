// SPDX-License-Identifier: GPL-2.0
//! Transfers of MPI from buffers whose mapping changes: with the hooks of the
//! distribution's libraries, with our libraries, and with these without their cache.

use crate::row::{Param, Rows};
use anyhow::{Context, Result, ensure};
use std::process::{Command, Stdio};

/// What a job printed of a trace.
struct Cost {
    stack: String,
    with: String,
    trace: String,
    instructions: f64,
    calls: f64,
    wrong: f64,
    transfers: f64,
}

impl Cost {
    fn parse(line: &str) -> Option<Self> {
        let words: [&str; 7] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let [stack, with, trace, instructions, calls, wrong, transfers] = words;
        Some(Self {
            stack: stack.replace("openmpi-", ""),
            with: with.replace('-', " "),
            trace: trace.to_owned(),
            instructions: instructions.parse().ok()?,
            calls: calls.parse().ok()?,
            wrong: wrong.parse().ok()?,
            transfers: transfers.parse().ok()?,
        })
    }
}

/// Runs a command, which is `mmu-notify-mpi cost` with options.
pub fn run(rows: &mut Rows, command: &str) -> Result<()> {
    let mut shell = Command::new("sh");
    let output = shell
        .args(["-c", command])
        .stderr(Stdio::inherit())
        .output();
    let output = output.context(command.to_owned())?;
    ensure!(output.status.success(), "{command}: {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let costs: Option<Vec<_>> = text.lines().map(Cost::parse).collect();
    let costs = costs.with_context(|| format!("not lines of figures: {text}"))?;

    for cost in &costs {
        let params: [(&str, Param); 3] = [
            ("stack", cost.stack.as_str().into()),
            ("trace", cost.trace.as_str().into()),
            ("with", cost.with.as_str().into()),
        ];
        rows.add("MPI, each transfer", &params, cost.instructions);
        rows.other("MPI, system calls", &params, "calls", cost.calls);
        let wrong = cost.wrong / cost.transfers * 100.0;
        rows.other("MPI, wrong data", &params, "% of transfers", wrong);
    }
    check(&costs)
}

/// Fails if the figures are not of what they are named after. Wrong data with ours is for
/// the budget.
fn check(costs: &[Cost]) -> Result<()> {
    for cost in costs.iter().filter(|cost| cost.with != "ours") {
        let name = format!("{}, {}, with {}", cost.stack, cost.trace, cost.with);
        let ours = costs
            .iter()
            .find(|ours| {
                (&ours.stack, &ours.trace, "ours") == (&cost.stack, &cost.trace, &ours.with)
            })
            .with_context(|| format!("{name}: nothing of ours to compare with"))?;
        // A hook does not see what is no call of libc.
        let blind = cost.with == "hooks" && cost.trace == "raw";
        ensure!(
            (cost.wrong > 0.0) == blind,
            "{name}: {} wrong transfers",
            cost.wrong
        );
        // Each rank registers and deregisters.
        let cached = cost.with == "hooks" || cost.calls > ours.calls + 2.0;
        ensure!(
            cached,
            "{name}: {} system calls, {} with a cache",
            cost.calls,
            ours.calls
        );
    }
    Ok(())
}

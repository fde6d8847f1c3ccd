// SPDX-License-Identifier: GPL-2.0
//! What a figure may be. A budget that is above its goal is the largest of two runs, plus
//! 5 %: the goal is not met yet, and the budget keeps what there is.

use crate::row::{Limit, Row};

/// The rows of this name that have all these parameters, as they are printed.
struct Budget {
    name: &'static str,
    params: &'static [(&'static str, &'static str)],
    goal: f64,
    budget: f64,
    at_least: bool,
}

const fn most(
    name: &'static str,
    params: &'static [(&'static str, &'static str)],
    goal: f64,
    budget: f64,
) -> Budget {
    Budget {
        name,
        params,
        goal,
        budget,
        at_least: false,
    }
}

const fn least(
    name: &'static str,
    params: &'static [(&'static str, &'static str)],
    goal: f64,
    budget: f64,
) -> Budget {
    Budget {
        at_least: true,
        ..most(name, params, goal, budget)
    }
}

/// Goal, then budget.
#[rustfmt::skip]
const BUDGETS: &[Budget] = &[
    most("lookup, generation", &[], 4.0, 5.25),
    most("lookup, generation and stale flag", &[], 4.0, 8.4),
    most("read() that returns EAGAIN", &[], 250.0, 420.0),
    most("hit, munmap of 64 KiB", &[("elsewhere", "0")], 350.0, 350.0),
    most("hit, munmap of 64 KiB", &[("elsewhere", "100")], 350.0, 350.0),
    most("hit, munmap of 64 KiB", &[("elsewhere", "10000")], 350.0, 493.0),
    most("hit, munmap of 64 KiB", &[("elsewhere", "100000")], 350.0, 596.0),
    most("hit, munmap of 64 KiB, with the FD", &[("elsewhere", "0")], 530.0, 530.0),
    most("hit, munmap of 64 KiB, with the FD", &[("elsewhere", "100")], 530.0, 530.0),
    most("hit, munmap of 64 KiB, with the FD", &[("elsewhere", "10000")], 530.0, 671.0),
    most("hit, munmap of 64 KiB, with the FD", &[("elsewhere", "100000")], 530.0, 776.0),
    most("merged hit, MADV_DONTNEED", &[], 300.0, 300.0),
    most("hit, munmap, for each watch", &[("overlapping", "10")], 250.0, 250.0),
    most("hit, munmap, for each watch", &[("overlapping", "100")], 250.0, 250.0),
    most("hit, munmap, for each watch", &[("overlapping", "1000")], 250.0, 250.0),
    most("growth of a hit", &[], 40.0, 54.3),
    most("growth of a hit by threads", &[], 0.0, 5.0),
    most("growth of a registration and its end", &[], 15.0, 15.0),
    // Nothing. In munmap() and fork() other work of mm differs by more from time to time.
    most("bystander", &[("process", "no FD"), ("change", "mprotect")], 0.0, 5.0),
    most("bystander", &[("process", "no FD"), ("change", "COW fault")], 0.0, 5.0),
    most("bystander", &[("process", "no FD"), ("change", "MADV_DONTNEED")], 0.0, 5.0),
    most("drain, for each event", &[("batch", "256"), ("buffer", "hot")], 45.0, 136.0),
    most("REG_MR and MR_DESTROY", &[("elsewhere", "0")], 900.0, 2117.0),
    // With 8 bytes of the cgroup's.
    most("memory, charged for each watch", &[("watches", "100000")], 192.0, 201.0),
    least("job, no cache adds more than ours", &[("trace", "churn-heavy")], 3.0, 3.0),
    least("job, userfaultfd adds more than ours", &[], 1.0, 1.0),
    most("job, wrong data", &[("with", "ours")], 0.0, 0.0),
    most("MPI, wrong data", &[("with", "ours")], 0.0, 0.0),
];

/// Gives the rows their limits. Returns the names of budgets that no row has.
pub fn apply(rows: &mut [Row]) -> Vec<String> {
    let mut unused = Vec::new();
    for budget in BUDGETS {
        let mut found = false;
        for row in rows.iter_mut().filter(|row| budget.matches(row)) {
            row.limit = Some(Limit {
                goal: budget.goal,
                budget: budget.budget,
                at_least: budget.at_least,
            });
            found = true;
        }
        if !found {
            unused.push(format!("{} {:?}", budget.name, budget.params));
        }
    }
    unused
}

impl Budget {
    fn matches(&self, row: &Row) -> bool {
        let has = |(name, value): &(&str, &str)| {
            row.params
                .get(*name)
                .is_some_and(|param| param.to_string() == *value)
        };
        self.name == row.name && self.params.iter().all(has)
    }
}

impl Limit {
    fn is_met(&self, value: f64, limit: f64) -> bool {
        match self.at_least {
            true => value >= limit,
            false => value <= limit,
        }
    }

    /// Whether the run fails.
    pub fn is_missed(&self, value: f64) -> bool {
        // One that is not a number meets nothing.
        !self.is_met(value, self.budget)
    }

    /// What to say of `value`.
    pub fn verdict(&self, value: f64) -> &'static str {
        match (self.is_missed(value), self.is_met(value, self.goal)) {
            (true, _) => "OVER BUDGET",
            (false, true) => "ok",
            (false, false) => "ok, not the goal",
        }
    }
}

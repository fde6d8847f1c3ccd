// SPDX-License-Identifier: GPL-2.0
//! The tests, printed as TAP. What the distribution's libraries do is logged; that each
//! stack is wrong somewhere with them is a test, or the others would prove nothing.

use crate::{
    Setup,
    job::{Job, Libraries, Stack, Verdict, ZERO_COPY},
};
use anyhow::Result;
use std::time::{SystemTime, UNIX_EPOCH};

/// For the random tests.
#[derive(clap::Args)]
pub struct Args {
    /// How long to make random changes and transfers, in seconds, for each stack; with the
    /// distribution's libraries no longer than by default
    #[arg(long, default_value_t = SECONDS)]
    pub seconds: u64,
    /// The same seed gives the same changes and transfers; by default the time
    #[arg(long)]
    seed: Option<u64>,
    /// End after this number of them
    #[arg(long)]
    steps: Option<u64>,
}

/// Enough to see wrong data.
const SECONDS: u64 = 20;
const SIZES: &str = "64,1024";
const SMALL: &str = "64";
const BOTH: [Libraries; 2] = [Libraries::Distribution, Libraries::Ours];
/// A change that the patched UCX's hooks in libc see below MPICH, also without the feature.
const MENDED: &str = "mremap_over ";
/// Aborts if a page of a cached registration is not the one that was registered.
const CHECK_PAGES: [(&str, &str); 1] = [("UCX_RCACHE_CHECK_PFN", "1")];
const MOVED: &str = "moved from pfn";

/// Prints results as they come.
struct Tap {
    planned: usize,
    done: usize,
    failed: usize,
}

impl Tap {
    fn new(planned: usize) -> Self {
        println!("1..{planned}");
        Self {
            planned,
            done: 0,
            failed: 0,
        }
    }

    fn line(&mut self, ok: bool, name: &str, rest: &str) {
        self.done += 1;
        self.failed += usize::from(!ok);
        let not = if ok { "" } else { "not " };
        println!("{not}ok {} - {name}{rest}", self.done);
    }

    /// A test that passes if the verdict is that all is right.
    fn right(&mut self, name: &str, verdict: &Verdict) {
        let ok = *verdict == Verdict::Right;
        if !ok {
            println!("# {name}: {verdict}");
        }
        self.line(ok, name, "");
    }

    /// A test that passes if a condition holds.
    fn holds(&mut self, name: &str, ok: bool, otherwise: &str) {
        if !ok {
            println!("# {name}: {otherwise}");
        }
        self.line(ok, name, "");
    }

    /// What was seen is no test.
    fn logged(&mut self, name: &str, verdict: &Verdict) {
        self.line(true, name, &format!(" # SKIP logged: {verdict}"));
    }

    fn end(self) -> Result<bool> {
        anyhow::ensure!(
            self.done == self.planned,
            "{} of {} tests ran",
            self.done,
            self.planned
        );
        Ok(self.failed == 0)
    }
}

/// The names of the lines that a job prints for the changes and sizes.
fn rows(setup: &Setup, sizes: &str) -> Result<Vec<String>> {
    let changes = setup.changes()?;
    let mut rows = Vec::new();
    for size in sizes.split(',') {
        for change in &changes {
            for way in ["send", "receive"] {
                rows.push(format!("{} {way} {size}KiB", change.name));
            }
        }
    }
    Ok(rows)
}

/// The seed, which it prints.
fn seed(args: &Args) -> String {
    let time = || SystemTime::now().duration_since(UNIX_EPOCH);
    let seed = args
        .seed
        .unwrap_or_else(|| time().map_or(1, |t| t.as_secs()));
    println!("# seed {seed}");
    seed.to_string()
}

fn is_wrong(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Wrong(_))
}

/// The tests of a stack.
struct Tests<'a> {
    setup: &'a Setup,
    stack: Stack,
    tap: &'a mut Tap,
}

impl Tests<'_> {
    /// Runs the program that there is for both MPI libraries.
    fn job(&self, libraries: Libraries, arguments: &[&str], pages: bool) -> Result<Job> {
        let program = format!("stale.{}", self.stack.mpi());
        let program = [&[program.as_str()], arguments].concat();
        let (name, environment) = match pages {
            false => (arguments[0], ZERO_COPY.to_vec()),
            true => ("pages", [&ZERO_COPY[..], &CHECK_PAGES].concat()),
        };
        Job::run(
            self.setup,
            self.stack,
            libraries,
            name,
            &program,
            &environment,
        )
    }

    fn name(&self, libraries: Libraries, test: &str) -> String {
        format!("{} {} {test}", self.stack.name(), libraries.name())
    }

    /// Runs all changes, and checks which libraries they ran with: 1 test.
    fn all_rows(&mut self, libraries: Libraries, sizes: &str) -> Result<Job> {
        let job = self.job(libraries, &["rows", "all", sizes], false)?;
        let loaded = job.check_libraries(self.setup, self.stack, libraries);
        self.tap.right(&self.name(libraries, "libraries"), &loaded);
        Ok(job)
    }

    /// All changes with both: 2 tests for each row, and 3.
    fn rows(&mut self, rows: &[String]) -> Result<()> {
        let before = self.all_rows(Libraries::Distribution, SIZES)?;
        for row in rows {
            let name = self.name(Libraries::Distribution, row);
            self.tap.logged(&name, &before.verdict(row));
        }
        let any = rows.iter().any(|row| is_wrong(&before.verdict(row)));
        let name = self.name(Libraries::Distribution, "some are wrong");
        self.tap.holds(&name, any, "none is");
        self.right_rows(rows, SIZES)
    }

    /// All changes with ours: a test for each row, and 1.
    fn right_rows(&mut self, rows: &[String], sizes: &str) -> Result<()> {
        let job = self.all_rows(Libraries::Ours, sizes)?;
        for row in rows {
            let name = self.name(Libraries::Ours, row);
            self.tap.right(&name, &job.verdict(row));
        }
        Ok(())
    }

    /// UCX itself looks at the pages: 2 tests.
    fn pages(&mut self, rows: &[String]) -> Result<()> {
        let arguments = ["rows", "all", SIZES];
        let before = self.job(Libraries::Distribution, &arguments, true)?;
        let name = self.name(Libraries::Distribution, "UCX finds a moved page");
        self.tap.holds(&name, before.output.contains(MOVED), "none");
        let after = self.job(Libraries::Ours, &arguments, true)?;
        let bad = rows
            .iter()
            .filter(|row| after.verdict(row) != Verdict::Right);
        let bad = bad.count();
        let ok = bad == 0 && !after.output.contains(MOVED);
        let name = self.name(Libraries::Ours, "UCX finds no moved page");
        self.tap
            .holds(&name, ok, &format!("{bad} rows are not right"));
        Ok(())
    }

    /// With fork() and exec() between the transfers: a test for each row, and 1.
    fn forks(&mut self, rows: &[String]) -> Result<()> {
        let before = self.job(
            Libraries::Distribution,
            &["fork", "madv_dontneed", SMALL],
            false,
        )?;
        self.wrong(
            Libraries::Distribution,
            &before,
            "fork",
            "madv_dontneed send 64KiB",
        );
        self.right_forks(rows)
    }

    /// The same with ours only: a test for each row.
    fn right_forks(&mut self, rows: &[String]) -> Result<()> {
        let job = self.job(Libraries::Ours, &["fork", "all", SMALL], false)?;
        for row in rows {
            let name = self.name(Libraries::Ours, &format!("fork {row}"));
            self.tap.right(&name, &job.verdict(row));
        }
        Ok(())
    }

    fn wrong(&mut self, libraries: Libraries, job: &Job, test: &str, line: &str) {
        let verdict = job.verdict(line);
        let name = self.name(libraries, &format!("{test} is wrong"));
        self.tap
            .holds(&name, is_wrong(&verdict), &verdict.to_string());
    }

    /// A mode of the program that prints one line: 1 test.
    fn mode(&mut self, libraries: Libraries, arguments: &[&str]) -> Result<()> {
        let line = format!("{} - -", arguments[0]);
        let job = self.job(libraries, arguments, false)?;
        let name = self.name(libraries, arguments[0]);
        println!("# {name}: {}", job.detail(&line));
        match libraries {
            Libraries::Distribution => self.wrong(libraries, &job, arguments[0], &line),
            Libraries::Ours => {
                for line in job.output.lines().filter(|l| l.starts_with("# wrong: ")) {
                    println!("{line}");
                }
                self.tap.right(&name, &job.verdict(&line));
            }
        }
        Ok(())
    }

    /// Threads that change mappings, with each of `with`: a test for each.
    fn threads(&mut self, with: &[Libraries], seed: &str) -> Result<()> {
        with.iter()
            .try_for_each(|&libraries| self.mode(libraries, &["threads", "50", seed]))
    }

    /// The random test with each of `with`: a test for each.
    fn soak(&mut self, with: &[Libraries], args: &Args, seed: &str) -> Result<()> {
        let steps = args.steps.unwrap_or(u64::MAX).to_string();
        for &libraries in with {
            let seconds = match libraries {
                Libraries::Distribution => args.seconds.min(SECONDS),
                Libraries::Ours => args.seconds,
            };
            self.mode(libraries, &["soak", &seconds.to_string(), seed, &steps])?;
        }
        Ok(())
    }

    /// Both libraries do the same, but for [`MENDED`]: a test for each row, and 2.
    fn same(&mut self, rows: &[String]) -> Result<()> {
        let before = self.all_rows(Libraries::Distribution, SIZES)?;
        let after = self.all_rows(Libraries::Ours, SIZES)?;
        for row in rows {
            let [before, after] = [before.verdict(row), after.verdict(row)];
            let same = match self.stack == Stack::MpichUcx && row.starts_with(MENDED) {
                true => after == Verdict::Right,
                false => before == after && !matches!(before, Verdict::Unknown(_)),
            };
            let otherwise = format!("{before} with the distribution's, {after} with ours");
            let name = self.name(Libraries::Ours, &format!("as before: {row}"));
            self.tap.holds(&name, same, &otherwise);
        }
        Ok(())
    }
}

/// Calls `run` with the tests of each stack, of which there are `planned`.
fn each_stack(
    setup: &Setup,
    planned: usize,
    mut run: impl FnMut(&mut Tests<'_>) -> Result<()>,
) -> Result<bool> {
    let mut tap = Tap::new(planned);
    for &stack in setup.stacks() {
        run(&mut Tests {
            setup,
            stack,
            tap: &mut tap,
        })?;
    }
    tap.end()
}

pub fn run(setup: &Setup, args: &Args) -> Result<bool> {
    let (all, small) = (rows(setup, SIZES)?, rows(setup, SMALL)?);
    let with_pages = setup.stacks().iter().filter(|s| s.checks_pages()).count();
    let each = 2 * all.len() + 3 + small.len() + 1 + 2 + 2;
    let seed = seed(args);
    each_stack(
        setup,
        setup.stacks().len() * each + with_pages * 2,
        |tests| {
            tests.rows(&all)?;
            if tests.stack.checks_pages() {
                tests.pages(&all)?;
            }
            tests.forks(&small)?;
            tests.threads(&BOTH, &seed)?;
            tests.soak(&BOTH, args, &seed)
        },
    )
}

pub fn patched(setup: &Setup, args: &Args) -> Result<bool> {
    let rows = rows(setup, SMALL)?;
    let each = 2 * rows.len() + 3;
    let seed = seed(args);
    each_stack(setup, setup.stacks().len() * each, |tests| {
        tests.right_rows(&rows, SMALL)?;
        tests.right_forks(&rows)?;
        tests.threads(&[Libraries::Ours], &seed)?;
        tests.soak(&[Libraries::Ours], args, &seed)
    })
}

pub fn soak(setup: &Setup, args: &Args) -> Result<bool> {
    let seed = seed(args);
    each_stack(setup, 2 * setup.stacks().len(), |tests| {
        tests.soak(&BOTH, args, &seed)
    })
}

pub fn unsupported(setup: &Setup) -> Result<bool> {
    let rows = rows(setup, SIZES)?;
    each_stack(setup, setup.stacks().len() * (rows.len() + 2), |tests| {
        tests.same(&rows)
    })
}

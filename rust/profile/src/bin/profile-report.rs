// SPDX-License-Identifier: GPL-2.0
//! Prints where the instructions of each row of `make profile` go: by symbol, as the
//! difference of two phases.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

/// Prints instructions per symbol.
#[derive(Parser)]
struct Args {
    /// The kernel's System.map.
    map: PathBuf,
    /// Lines "GROUP SYMBOL" for the symbols of mm and of uverbs.
    groups: PathBuf,
    /// What the guest printed: lines "row TIMES PHASE BASELINE NAME", where "-" is no
    /// baseline.
    rows: PathBuf,
    /// The plugin's files, without the numbers of the phases.
    counts: PathBuf,
    /// Leaves out symbols with fewer instructions than this.
    #[arg(long, default_value_t = 2.0)]
    least: f64,
    /// Fails if a first invalidation runs more instructions under the lock than this.
    #[arg(long)]
    lock_budget: Option<f64>,
}

/// Instructions per symbol, and those under the lock.
type Profile<'a> = HashMap<&'a str, (f64, f64)>;

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The symbol of each address that was executed.
fn load<'a>(path: &Path, symbols: &'a [(u64, String)]) -> Result<Profile<'a>> {
    let mut profile = Profile::new();
    for line in read(path)?.lines() {
        let mut words = line.split(' ');
        let mut next = || words.next().context("a word is missing");
        let address = u64::from_str_radix(next()?, 16)?;
        let (all, locked): (f64, f64) = (next()?.parse()?, next()?.parse()?);
        // The kernel's half of the addresses.
        let name = match symbols.partition_point(|(start, _)| *start <= address) {
            at if at > 0 && address >> 63 == 1 => &*symbols[at - 1].1,
            _ => "(userspace)",
        };
        let entry = profile.entry(name).or_default();
        *entry = (entry.0 + all, entry.1 + locked);
    }
    Ok(profile)
}

/// Whose a symbol is. All Rust in this kernel is the series' or serves it.
fn group<'a>(symbol: &str, groups: &'a HashMap<String, String>) -> &'a str {
    if symbol.starts_with("_R") || symbol.starts_with("rust_") || symbol.contains("uverbs_mmu") {
        return "ours";
    }
    groups.get(symbol).map_or("other", |group| &**group)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut symbols: Vec<(u64, String)> = Vec::new();
    for line in read(&args.map)?.lines() {
        if let [address, kind, name] = line.split(' ').collect::<Vec<_>>()[..]
            && "tTwW".contains(kind)
        {
            symbols.push((u64::from_str_radix(address, 16)?, name.to_owned()));
        }
    }
    symbols.sort();
    let groups = read(&args.groups)?
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(group, symbol)| (symbol.to_owned(), group.to_owned()))
        .collect();

    let mut rows = 0;
    let mut first = None;
    for line in read(&args.rows)?.lines() {
        let Some(row) = line.strip_prefix("row ") else {
            continue;
        };
        let [times, phase, baseline, name] = row.splitn(4, ' ').collect::<Vec<_>>()[..] else {
            bail!("not a row: {line}");
        };
        let file = |phase: &str| {
            let mut path = args.counts.clone().into_os_string();
            path.push(format!(".{phase}"));
            load(Path::new(&path), &symbols)
        };
        let mut profile = file(phase)?;
        if baseline != "-" {
            for (symbol, (all, locked)) in file(baseline)? {
                let entry = profile.entry(symbol).or_default();
                *entry = (entry.0 - all, entry.1 - locked);
            }
        }
        let times: f64 = times.parse()?;
        let locked = show(name, &profile, times, &groups, args.least);
        if name.contains("first invalidation") {
            first = Some(locked);
        }
        rows += 1;
    }
    if rows == 0 {
        bail!("no row in {}: did the guest finish?", args.rows.display());
    }
    if let Some(budget) = args.lock_budget {
        let locked = first.context("no row of a first invalidation")?;
        println!("\nfirst invalidation, under the queue lock: {locked:.0}, budget {budget:.0}");
        ensure!(locked <= budget, "the budget is missed");
    }
    Ok(())
}

/// Prints a row. Returns the instructions under the lock.
fn show(
    name: &str,
    profile: &Profile,
    times: f64,
    groups: &HashMap<String, String>,
    least: f64,
) -> f64 {
    let mut sums = BTreeMap::<&str, f64>::new();
    let (mut all, mut locked) = (0.0, 0.0);
    for (symbol, counts) in profile {
        *sums.entry(group(symbol, groups)).or_default() += counts.0 / times;
        all += counts.0 / times;
        locked += counts.1 / times;
    }
    print!("\n{name}: {all:.0}");
    let mut separator = " (";
    for (group, sum) in sums.iter().filter(|(_, sum)| sum.abs() >= 0.5) {
        print!("{separator}{group} {sum:.0}");
        separator = ", ";
    }
    println!("), under the queue lock {locked:.0}");
    let mut lines: Vec<_> = profile.iter().map(|(s, c)| (c.0 / times, *s)).collect();
    lines.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (count, symbol) in lines.iter().filter(|line| line.0.abs() >= least) {
        println!(
            "{count:10.1}  {:7}{:#}",
            group(symbol, groups),
            rustc_demangle::demangle(symbol)
        );
    }
    locked
}

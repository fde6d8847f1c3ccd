// SPDX-License-Identifier: GPL-2.0
//! The report: a table, a file, plots, and whether the budgets are kept.

use crate::{
    budget, plot,
    row::{self, Line, Row},
};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

#[derive(Deserialize, Serialize)]
struct Report {
    kernel: String,
    rows: Vec<Row>,
    skipped: Vec<String>,
}

/// Returns whether all budgets are kept.
pub fn report(lines: &Path, json: &Path, plots: &Path, partial: bool) -> Result<bool> {
    let mut report = Report {
        kernel: String::new(),
        rows: Vec::new(),
        skipped: Vec::new(),
    };
    for line in row::read(lines)? {
        match line {
            Line::Kernel(kernel) => report.kernel = kernel,
            Line::Row(row) => report.rows.push(row),
            Line::Skipped(what) => report.skipped.push(what),
            Line::End => (),
        }
    }
    let keys: BTreeSet<_> = report.rows.iter().map(Row::key).collect();
    ensure!(
        keys.len() == report.rows.len(),
        "two rows have the same name"
    );
    let unused = budget::apply(&mut report.rows);
    ensure!(
        partial || unused.is_empty(),
        "there is no row for these budgets: {unused:?}"
    );
    let text = serde_json::to_string_pretty(&report)? + "\n";
    fs::write(json, text).with_context(|| json.display().to_string())?;
    plot::plot(&report.rows, plots)?;
    fs::write(plots.join("table.md"), markdown(&report.rows))?;

    println!("kernel {}", report.kernel);
    println!(
        "{:68}{:>10} {:13}{:>10}{:>9}{:>9}",
        "row", "value", "unit", "added to", "budget", "goal"
    );
    for row in &report.rows {
        let base = row.base.map(|base| format!("{base:.0}"));
        let limit = row.limit.map(|limit| {
            let sign = if limit.at_least { ">=" } else { "<=" };
            format!(
                "{:>9}{:>9} {}",
                format!("{sign} {}", limit.budget),
                limit.goal,
                limit.verdict(row.value)
            )
        });
        let line = format!(
            "{:68}{:>10.1} {:13}{:>10}{}",
            row.key(),
            row.value,
            row.unit,
            base.unwrap_or_default(),
            limit.unwrap_or_default()
        );
        println!("{}", line.trim_end());
    }
    for what in &report.skipped {
        println!("skipped: {what}");
    }
    let missed = report
        .rows
        .iter()
        .filter(|row| row.limit.is_some_and(|limit| limit.is_missed(row.value)));
    let missed = missed.count();
    let limits = report.rows.iter().filter(|row| row.limit.is_some()).count();
    println!("{missed} of {limits} budgets are missed");
    Ok(missed == 0)
}

/// The table as it is in Documentation/benchmarks.md.
fn markdown(rows: &[Row]) -> String {
    let mut text = "| row | figure | unit | added to | budget | goal |\n".to_owned();
    text += "|---|---:|---|---:|---:|---:|\n";
    for row in rows {
        let base = row.base.map_or(String::new(), |base| format!("{base:.0}"));
        let limits = row.limit.map_or("| | |".to_owned(), |limit| {
            format!("| {} | {} |", limit.budget, limit.goal)
        });
        let (key, value, unit) = (row.key(), row.value, &row.unit);
        text += &format!("| {key} | {value:.1} | {unit} | {base} {limits}\n");
    }
    text
}

fn load(path: &Path) -> Result<BTreeMap<String, Row>> {
    let load = || -> Result<_> {
        let report: Report = serde_json::from_str(&fs::read_to_string(path)?)?;
        println!("{}: kernel {}", path.display(), report.kernel);
        let rows = report.rows.into_iter();
        Ok(rows.map(|row| (row.key(), row)).collect())
    };
    load().with_context(|| path.display().to_string())
}

pub fn compare(before: &Path, after: &Path, least: f64) -> Result<()> {
    let (before, after) = (load(before)?, load(after)?);
    println!(
        "{:68}{:>10}{:>10}{:>10}{:>9}",
        "row", "before", "after", "more", "%"
    );
    let mut same = 0;
    for (key, new) in &after {
        let Some(old) = before.get(key) else {
            println!("{key:68}{:>10}{:10.1}", "-", new.value);
            continue;
        };
        let more = new.value - old.value;
        let part = more / old.value.abs() * 100.0;
        // Of 0 there is no part.
        if more == 0.0 || part.abs() < least {
            same += 1;
            continue;
        }
        println!(
            "{key:68}{:10.1}{:10.1}{more:+10.1}{part:+8.1}%",
            old.value, new.value
        );
    }
    for (key, old) in before.iter().filter(|(key, _)| !after.contains_key(*key)) {
        println!("{key:68}{:10.1}{:>10}", old.value, "-");
    }
    println!("{same} other rows differ by less than {least} %");
    Ok(())
}

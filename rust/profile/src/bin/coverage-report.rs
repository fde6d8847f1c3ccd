// SPDX-License-Identifier: GPL-2.0
//! Which lines that a series adds were executed. A line is coverable if the line table of
//! the kernel has a statement of it, or of a function that is inlined there, and covered if
//! one instruction of such a statement was executed, in any inlined copy.

use addr2line::{
    Context,
    gimli::{DwarfSections, EndianSlice, LittleEndian},
};
use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use object::{Object, ObjectSection};
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    ops::Range,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Tells which lines that a series adds were executed.
#[derive(Parser)]
struct Args {
    /// The kernel, with a line table of the files of the series.
    vmlinux: PathBuf,
    /// The series, as by `git diff --unified=0`.
    diff: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prints the ranges of addresses to look at.
    Ranges,
    /// Prints what is covered; lists what is not, and fails if a reason is missing for it.
    Report {
        /// The source tree.
        source: PathBuf,
        /// The plugin's file.
        executed: PathBuf,
        /// Lines "FILE FUNCTION TEXT" that need not be covered, below a comment that says
        /// why. Each must be uncovered, unless "? " is in front. TEXT is the line without its
        /// indentation, or "*" for all of the function.
        reasons: PathBuf,
    },
}

/// A line of a file of the series.
type Line = (String, u64);

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The lines that the diff adds.
fn added(diff: &str) -> Result<BTreeSet<Line>> {
    let mut lines = BTreeSet::new();
    let mut file = "";
    for text in diff.lines() {
        if let Some(path) = text.strip_prefix("+++ ") {
            file = path.strip_prefix("b/").unwrap_or_default();
        } else if let Some(hunk) = text.strip_prefix("@@ ") {
            let new = hunk.split(' ').nth(1).context("a hunk without lines")?;
            let new = new.trim_start_matches('+');
            let (start, count) = new.split_once(',').unwrap_or((new, "1"));
            let start: u64 = start.parse()?;
            let end = start + count.parse::<u64>()?;
            lines.extend((start..end).map(|line| (file.to_owned(), line)));
        }
    }
    Ok(lines)
}

/// The addresses of each of these lines that has a statement.
fn statements(vmlinux: &Path, lines: &BTreeSet<Line>) -> Result<BTreeMap<Line, Vec<Range<u64>>>> {
    let files: BTreeSet<&str> = lines.iter().map(|(file, _)| &**file).collect();
    let data = fs::read(vmlinux).with_context(|| vmlinux.display().to_string())?;
    let elf = object::File::parse(&*data)?;
    let sections = DwarfSections::load(|id| {
        let section = elf.section_by_name(id.name());
        section.map_or(Ok(Cow::default()), |section| section.uncompressed_data())
    })?;
    let dwarf = sections.borrow(|section| EndianSlice::new(section, LittleEndian));
    let context =
        Context::from_dwarf(sections.borrow(|section| EndianSlice::new(section, LittleEndian)))?;
    // Which file of the series a path is. It has a folder in front.
    let mut names = HashMap::<String, Option<&str>>::new();
    let mut found = BTreeMap::<Line, Vec<Range<u64>>>::new();
    let mut units = dwarf.units();
    while let Some(header) = units.next()? {
        let Some(program) = dwarf.unit(header)?.line_program else {
            continue;
        };
        let mut last = None; // a statement that begins there
        let mut rows = program.rows();
        while let Some((_, row)) = rows.next_row()? {
            let range = last.unwrap_or(row.address())..row.address();
            last = (row.is_stmt() && !row.end_sequence()).then(|| row.address());
            if range.is_empty() {
                continue;
            }
            let mut frames = context.find_frames(range.start).skip_all_loads()?;
            while let Some(frame) = frames.next()? {
                let Some((path, line)) = frame.location.and_then(|at| at.file.zip(at.line)) else {
                    continue;
                };
                let ours = |file: &&&str| Path::new(path).ends_with(**file);
                let name = match names.get(path) {
                    Some(name) => *name,
                    None => *names
                        .entry(path.to_owned())
                        .or_insert(files.iter().find(ours).copied()),
                };
                let line = name.map(|name| (name.to_owned(), u64::from(line)));
                if let Some(line) = line.filter(|line| lines.contains(line)) {
                    found.entry(line).or_default().push(range.clone());
                }
            }
        }
    }
    ensure!(
        !found.is_empty(),
        "{} has no line table of the series",
        vmlinux.display()
    );
    Ok(found)
}

/// The name of the function that a line is in.
fn function(text: &[&str], line: usize) -> String {
    let word = |text: &str| {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    for text in text[..line].iter().rev() {
        // Of Rust, and of C: a definition is not indented, and no label.
        if let Some((_, name)) = text.split_once("fn ") {
            return word(name);
        }
        if text.starts_with(|c: char| c.is_alphabetic() || c == '_')
            && let Some((before, after)) = text.split_once('(')
            && !text.ends_with(';')
        {
            let name = before.rsplit([' ', '*']).next().unwrap_or(before);
            return match name {
                "UVERBS_HANDLER" => word(after),
                _ => name.to_owned(),
            };
        }
    }
    String::new()
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let statements = statements(&args.vmlinux, &added(&read(&args.diff)?)?)?;
    let Command::Report {
        source,
        executed,
        reasons,
    } = args.command
    else {
        for range in statements.into_values().flatten() {
            println!("{:x} {:x}", range.start, range.end);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let executed = read(&executed)?
        .lines()
        .map(|line| u64::from_str_radix(line, 16))
        .collect::<Result<BTreeSet<_>, _>>()?;
    let mut unused = BTreeMap::new();
    let mut reason = String::new();
    let mut below = false;
    for line in read(&reasons)?.lines() {
        if let Some(comment) = line.strip_prefix('#') {
            if below {
                reason.clear();
            }
            reason = format!("{reason} {}", comment.trim());
        } else if !line.is_empty() {
            let (line, used) = line.strip_prefix("? ").map_or((line, false), |l| (l, true));
            unused.insert(line.to_owned(), (reason.clone(), used));
        }
        below = !line.starts_with('#');
    }

    let mut files = BTreeMap::<&str, (usize, Vec<usize>)>::new();
    for ((file, line), ranges) in &statements {
        let (all, missing) = files.entry(file).or_default();
        *all += 1;
        let mut ranges = ranges.iter();
        if !ranges.any(|range| executed.range(range.clone()).next().is_some()) {
            missing.push(usize::try_from(*line)?);
        }
    }
    let (mut all, mut covered, mut without) = (0, 0, 0);
    for (file, (coverable, missing)) in &files {
        let text = read(&source.join(file))?;
        let text: Vec<&str> = text.lines().collect();
        println!("{file}: {}/{coverable}", coverable - missing.len());
        all += coverable;
        covered += coverable - missing.len();
        for &line in missing {
            let function = function(&text, line);
            let this = text
                .get(line - 1)
                .context("a line that is not there")?
                .trim();
            let listed = [this, "*"].map(|text| format!("{file} {function} {text}"));
            let listed = listed.iter().find(|listed| unused.contains_key(*listed));
            let why = listed.and_then(|listed| unused.get_mut(listed));
            let why = why.map(|(reason, used)| {
                *used = true;
                &**reason
            });
            without += usize::from(why.is_none());
            println!(
                "  {line} {function}: {this}\n   {}",
                why.unwrap_or(" NO REASON")
            );
        }
    }
    println!("{covered}/{all} lines covered");
    unused.retain(|_, (_, used)| !*used);
    for line in unused.keys() {
        println!("a reason for what is covered, or is not there: {line}");
    }
    if without != 0 {
        println!("{without} uncovered lines without a reason");
    }
    Ok(ExitCode::from(u8::from(without != 0 || !unused.is_empty())))
}

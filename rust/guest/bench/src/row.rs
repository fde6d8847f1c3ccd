// SPDX-License-Identifier: GPL-2.0
//! What was counted.

use crate::measure::Pair;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
};

/// The value of a parameter.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Param {
    Number(u64),
    Text(String),
}

impl fmt::Display for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl From<usize> for Param {
    fn from(number: usize) -> Self {
        Self::Number(number as u64)
    }
}

impl From<&str> for Param {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// A limit, and what it is meant to become.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Limit {
    pub goal: f64,
    pub budget: f64,
    /// The value must be at least this, not at most.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub at_least: bool,
}

/// A figure.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    pub name: String,
    pub params: BTreeMap<String, Param>,
    pub unit: String,
    pub value: f64,
    /// What the value comes in addition to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<f64>,
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
}

impl Row {
    /// Its name and parameters, in which no other row has the same.
    pub fn key(&self) -> String {
        let mut key = self.name.clone();
        for (name, value) in &self.params {
            key += &format!(", {name} {value}");
        }
        key
    }

    pub fn number(&self, param: &str) -> Option<u64> {
        match self.params.get(param)? {
            Param::Number(number) => Some(*number),
            Param::Text(_) => None,
        }
    }

    pub fn text(&self, param: &str) -> &str {
        match self.params.get(param) {
            Some(Param::Text(text)) => text,
            _ => "",
        }
    }
}

/// A line of what the guest writes.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Line {
    Kernel(String),
    Row(Row),
    Skipped(String),
    /// Nothing is missing before it.
    End,
}

/// Where rows go.
pub struct Rows(File);

impl Rows {
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        let mut rows = Self(file);
        let uname = rustix::system::uname();
        let kernel = [uname.release(), uname.version()].map(|part| part.to_string_lossy());
        rows.line(&Line::Kernel(kernel.join(" ")));
        Ok(rows)
    }

    /// Adds a count of instructions.
    pub fn add(&mut self, name: &str, params: &[(&str, Param)], value: f64) {
        self.push(name, params, "instructions", value, None);
    }

    /// Adds what `value` has more than `base`.
    pub fn added(&mut self, name: &str, params: &[(&str, Param)], value: f64, base: f64) {
        self.push(name, params, "instructions", value - base, Some(base));
    }

    /// Adds what watching adds.
    pub fn pair(&mut self, name: &str, params: &[(&str, Param)], pair: Pair) {
        self.added(name, params, pair.plain + pair.more, pair.plain);
    }

    /// Adds a figure of another unit.
    pub fn other(&mut self, name: &str, params: &[(&str, Param)], unit: &str, value: f64) {
        self.push(name, params, unit, value, None);
    }

    fn push(
        &mut self,
        name: &str,
        params: &[(&str, Param)],
        unit: &str,
        value: f64,
        base: Option<f64>,
    ) {
        let params = params
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()));
        let row = Row {
            name: name.to_owned(),
            params: params.collect(),
            unit: unit.to_owned(),
            value,
            base,
            limit: None,
        };
        println!("{:72}{value:12.1} {unit}", row.key());
        self.line(&Line::Row(row));
    }

    /// Says what is not counted, and why.
    pub fn skip(&mut self, what: &str) {
        println!("skipped: {what}");
        self.line(&Line::Skipped(what.to_owned()));
    }

    pub fn end(&mut self) {
        self.line(&Line::End);
    }

    fn line(&mut self, line: &Line) {
        let mut text = serde_json::to_string(line).expect("a row is JSON");
        text.push('\n');
        self.0.write_all(text.as_bytes()).expect("write a row");
    }
}

/// What the guest wrote, all of it.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let read = || -> Result<Vec<Line>> {
        let lines = BufReader::new(File::open(path)?).lines();
        let lines: Vec<Line> = lines
            .map(|line| Ok(serde_json::from_str(&line?)?))
            .collect::<Result<_>>()?;
        let complete = matches!(lines.last(), Some(Line::End));
        anyhow::ensure!(complete, "the guest did not finish");
        Ok(lines)
    };
    read().with_context(|| path.display().to_string())
}

// SPDX-License-Identifier: GPL-2.0
//! Plots, each as SVG and as PNG. The font is built in, so that none of the machine's is
//! needed.

use crate::row::Row;
use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::*,
    style::{FontStyle, register_font},
};
use std::{fs, io::BufWriter, path::Path};

const SIZE: (u32, u32) = (900, 560);
const FONT: &str = "sans-serif";

/// A line or a group of bars: its name, and values by x.
struct Series {
    name: String,
    points: Vec<(u64, f64)>,
}

struct Plot {
    file: &'static str,
    title: &'static str,
    x: &'static str,
    series: Vec<Series>,
}

/// Writes the plots for which there are rows.
pub fn plot(rows: &[Row], folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| anyhow!("the built-in font is not one"))?;
    let plots = [
        Plot {
            file: "hit",
            title: "Added to munmap() of 64 KiB by a watch that it hits",
            x: "watches elsewhere in the process",
            series: series(rows, "hit, munmap of 64 KiB", "elsewhere", "", "added"),
        },
        Plot {
            file: "overlapping",
            title: "Added to munmap() of 64 KiB by each watch that it hits",
            x: "watches of the same memory",
            series: series(
                rows,
                "hit, munmap, for each watch",
                "overlapping",
                "",
                "each",
            ),
        },
        Plot {
            file: "registration",
            title: "Added by watching to REG_MR and MR_DESTROY of 64 KiB",
            x: "watches elsewhere in the process",
            series: series(rows, "REG_MR and MR_DESTROY", "elsewhere", "size", ""),
        },
        Plot {
            file: "drain",
            title: "read(), for each event",
            x: "events at once",
            series: series(rows, "drain, for each event", "batch", "buffer", ""),
        },
        Plot {
            file: "bystander",
            title: "Added to changes of memory that is not registered",
            x: "watches elsewhere in the process",
            series: bystanders(rows),
        },
    ];
    for plot in plots.iter().filter(|plot| !plot.series.is_empty()) {
        both(
            folder,
            plot.file,
            |area| lines(plot, area),
            |area| lines(plot, area),
        )?;
    }
    let jobs = jobs(rows);
    if !jobs.is_empty() {
        both(
            folder,
            "job",
            |area| bars(&jobs, area),
            |area| bars(&jobs, area),
        )?;
    }
    Ok(())
}

fn both(
    folder: &Path,
    file: &str,
    svg: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<()>,
    bitmap: impl FnOnce(&DrawingArea<BitMapBackend<'_>, Shift>) -> Result<()>,
) -> Result<()> {
    let path = folder.join(file);
    svg(&SVGBackend::new(&path.with_extension("svg"), SIZE).into_drawing_area())?;
    let mut pixels = vec![0; 3 * SIZE.0 as usize * SIZE.1 as usize];
    bitmap(&BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area())?;
    let png = fs::File::create(path.with_extension("png"))?;
    let mut png = png::Encoder::new(BufWriter::new(png), SIZE.0, SIZE.1);
    png.set_color(png::ColorType::Rgb);
    Ok(png.write_header()?.write_image_data(&pixels)?)
}

/// The rows of a name, a series for each value of parameter `by`.
fn series(rows: &[Row], name: &str, x: &str, by: &str, only: &str) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows.iter().filter(|row| row.name == name) {
        let Some(at) = row.number(x) else { continue };
        let name = if by.is_empty() { only } else { row.text(by) };
        add(&mut series, name, at, row.value);
    }
    series
}

fn add(series: &mut Vec<Series>, name: &str, at: u64, value: f64) {
    let index = series.iter().position(|series| series.name == name);
    let index = index.unwrap_or_else(|| {
        series.push(Series {
            name: name.to_owned(),
            points: Vec::new(),
        });
        series.len() - 1
    });
    series[index].points.push((at, value));
}

fn bystanders(rows: &[Row]) -> Vec<Series> {
    let mut series = Vec::new();
    for row in rows.iter().filter(|row| row.name == "bystander") {
        let at = match row.text("process").split_once(' ') {
            Some(("an", _)) => 0,
            Some((count, "watches elsewhere")) => count.parse().unwrap_or(0),
            _ => continue,
        };
        add(&mut series, row.text("change"), at, row.value);
    }
    series
}

/// A series for each way to have registrations, by the number of the trace.
fn jobs(rows: &[Row]) -> Vec<(String, Vec<Series>)> {
    let mut traces: Vec<(String, Vec<Series>)> = Vec::new();
    for row in rows.iter().filter(|row| row.name == "job, each transfer") {
        let trace = row.text("trace");
        if traces.iter().all(|(name, _)| name != trace) {
            traces.push((trace.to_owned(), Vec::new()));
        }
        let last = traces.last_mut().expect("one was added");
        add(&mut last.1, row.text("with"), 0, row.value);
    }
    traces
}

fn most(series: &[Series]) -> f64 {
    let values = series.iter().flat_map(|series| &series.points);
    values.map(|point| point.1).fold(1.0, f64::max) * 1.15
}

fn lines<B: DrawingBackend>(plot: &Plot, area: &DrawingArea<B, Shift>) -> Result<()>
where
    B::ErrorType: 'static,
{
    let xs = || plot.series.iter().flat_map(|series| &series.points);
    // There is no logarithm of 0.
    let x = |at: u64| at.max(1) as f64;
    let last = xs().map(|point| x(point.0)).fold(10.0, f64::max);
    let least = xs().map(|point| point.1).fold(0.0, f64::min);
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(plot.title, (FONT, 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((1.0..last * 1.2).log_scale(), least..most(&plot.series))?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(plot.x)
        .y_desc("instructions")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    for (n, series) in plot.series.iter().enumerate() {
        let color = Palette99::pick(n).to_rgba();
        let points = || series.points.iter().map(|&(at, value)| (x(at), value));
        chart
            .draw_series(LineSeries::new(points(), color.stroke_width(2)))?
            .label(&series.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart.draw_series(points().map(|point| Circle::new(point, 3, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}

fn bars<B: DrawingBackend>(
    traces: &[(String, Vec<Series>)],
    area: &DrawingArea<B, Shift>,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let most = traces
        .iter()
        .map(|trace| most(&trace.1))
        .fold(1.0, f64::max);
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(
            "Added to each transfer by having a registration for it",
            (FONT, 20),
        )
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..traces.len() as f64, 0.0..most)?;
    let name = |x: &f64| match traces.get(*x as usize) {
        Some(trace) if (x.fract() - 0.5).abs() < 0.01 => trace.0.clone(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(2 * traces.len() + 1)
        .x_label_formatter(&name)
        .y_desc("instructions")
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    let ways = traces.iter().map(|trace| trace.1.len()).max().unwrap_or(0);
    for way in 0..ways {
        let color = Palette99::pick(way).to_rgba();
        let bar = |n: usize| {
            let value = traces[n].1.get(way)?.points[0].1;
            let left = n as f64 + 0.1 + 0.8 * way as f64 / ways as f64;
            let corners = [(left, 0.0), (left + 0.7 / ways as f64, value)];
            Some(Rectangle::new(corners, color.filled()))
        };
        let label = traces.iter().find_map(|trace| trace.1.get(way));
        chart
            .draw_series((0..traces.len()).filter_map(bar))?
            .label(label.map_or("", |series| &series.name))
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}

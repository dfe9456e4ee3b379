//! Plots as SVG files: lines, bars and time lines, on white, with axes that name their units.
//!
//! Written by hand, some hundred lines. Rejected: the crate `plotters`, whose labels for bars and for two panels over one
//! axis need as much code around it, with forty times as much behind it.

mod chart;
mod scale;
mod svg;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use chart::{bars, lines, timeline};
pub use scale::Kind;

/// A line of a plot.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// For the legend.
    pub name: String,
    /// In ascending order of x.
    pub points: Vec<(f64, f64)>,
}

/// What an axis shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis<'a> {
    /// With the unit: `latency, ms`.
    pub label: &'a str,
    /// How values lie on it.
    pub kind: Kind,
}

impl<'a> Axis<'a> {
    /// Equal steps are equally long.
    #[must_use]
    pub fn linear(label: &'a str) -> Axis<'a> {
        Axis { label, kind: Kind::Linear }
    }

    /// Doubling is equally long everywhere.
    #[must_use]
    pub fn log(label: &'a str) -> Axis<'a> {
        Axis { label, kind: Kind::Log }
    }
}

/// One bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// Below it.
    pub label: String,
    /// Its height.
    pub value: f64,
}

/// One of the plots of a time line, above one another over the same time.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel<'a> {
    /// With the unit.
    pub label: &'a str,
    /// Time in seconds and value. Where there is no point for long, the line is interrupted.
    pub series: Vec<Series>,
}

/// Something that happened at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When, in seconds.
    pub at_s: f64,
    /// What.
    pub label: String,
}

/// Writes a plot to `NAME.svg` in `directory`, which is made if it is missing, and says where it is.
///
/// # Errors
/// The file cannot be written.
pub fn write(directory: &Path, name: &str, svg: &str) -> Result<PathBuf> {
    let path = directory.join(format!("{name}.svg"));
    let written = fs::create_dir_all(directory).and_then(|()| fs::write(&path, svg));
    written.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

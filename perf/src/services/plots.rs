//! Plots of what was measured, as far as all that belongs in one was.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::report::Measured;
use super::workload::{BY_CLIENTS, FIGURE_7};
use crate::plot::{self, Axis, Bar, Series};

/// Writes them; returns where they are.
///
/// # Errors
/// A file cannot be written.
pub fn write(measured: &[Measured<'_>], directory: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    if let Some(svg) = by_clients(measured) {
        paths.push(plot::write(directory, "services-redis-by-clients", &svg)?);
    }
    if let Some(svg) = switches(measured) {
        paths.push(plot::write(directory, "services-switches", &svg)?);
    }
    Ok(paths)
}

/// Throughput over the number of clients that wait for each answer, a line per policy.
fn by_clients(measured: &[Measured<'_>]) -> Option<String> {
    let find = |id: &&str| measured.iter().find(|one| one.workload.id == *id);
    let steps: Option<Vec<&Measured<'_>>> = BY_CLIENTS.iter().map(find).collect();
    let steps = steps?;
    let point = |one: &&Measured<'_>, policy: &str| {
        let rate = one.per_s().into_iter().find(|(name, _)| *name == policy)?.1;
        Some((one.workload.clients() as f64, rate))
    };
    let line = |(policy, _): (&str, f64)| Series {
        name: policy.to_owned(),
        points: steps.iter().filter_map(|one| point(one, policy)).collect(),
    };
    let series: Vec<Series> = steps.first()?.per_s().into_iter().map(line).collect();
    let title = "Redis: SETs of clients that wait for each answer";
    Some(plot::lines(title, Axis::log("clients"), Axis::log("requests/s"), &series))
}

/// What each switch gains.
fn switches(measured: &[Measured<'_>]) -> Option<String> {
    let one = measured.iter().find(|one| one.workload.id == FIGURE_7)?;
    let bars: Vec<Bar> = one.per_s().into_iter().map(|(name, value)| Bar { label: name.to_owned(), value }).collect();
    Some(plot::bars("Redis, 64 × 64 SETs: what each switch gains", "requests/s", &bars))
}

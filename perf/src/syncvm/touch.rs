//! What it costs a guest that each harvest protects the pages it found: the first write to each of them faults.
//!
//! The same slot is run three times. The first brings everything into the caches and dirties the pages, the second finds
//! them writable, and the third comes after a harvest. What the third takes longer than the second, by the number of
//! pages, is the price; messages to the guest's process are in both.

use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use syncvm::DirtySet;
use syncvm::exchange::Guest;

use super::guest::SyntheticGuest;
use super::workload::{Shape, Side, Slot};
use super::{Size, pin};
use crate::Effort;
use crate::row::Row;
use crate::sample::{Better, Figure, alone};

/// The row's id.
pub const ID: &str = "syncvm.first_write_us";

/// Measures it, with the guest on one CPU and whoever harvests on the other.
///
/// # Errors
/// Not root, or the guest's process has ended.
pub fn row(size: Size, effort: Effort) -> Result<Row> {
    let figure = Figure { id: ID, unit: "us per page", better: Better::Lower };
    // In a thread of its own, because it is pinned.
    let costs = std::thread::scope(|scope| scope.spawn(|| costs_us(size)).join());
    Ok(alone(figure, effort, costs.map_err(|_| anyhow!("the measuring thread panicked"))??))
}

fn costs_us(size: Size) -> Result<Vec<f64>> {
    let [guest_cpu, cpu] = pin::two_cpus()?;
    let mut guest = SyntheticGuest::start(Side::Leader, size.ram_pages, guest_cpu, &[])?;
    pin::pin(cpu)?;
    let mut costs = Vec::new();
    for seed in 0..=size.slots {
        let slot = Slot { seed: seed as u64, turn: 0, dirty: size.dirty, different: 0, shape: Shape::REDIS };
        run_us(&mut guest, slot)?;
        let writable_us = run_us(&mut guest, slot)?;
        let mut found = DirtySet::new(size.ram_pages);
        guest.harvest(&mut found)?;
        ensure!(found.count() == size.dirty as usize, "{} of {} pages were found", found.count(), size.dirty);
        costs.push((run_us(&mut guest, slot)? - writable_us) / f64::from(size.dirty));
        // The next slot begins with a clean guest.
        guest.harvest(&mut found)?;
    }
    // The first is the warm-up.
    Ok(costs.split_off(1))
}

fn run_us(guest: &mut SyntheticGuest, slot: Slot) -> Result<f64> {
    let start = Instant::now();
    guest.run(slot)?;
    Ok(start.elapsed().as_secs_f64() * 1e6)
}

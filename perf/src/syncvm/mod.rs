//! Group `syncvm`: what it costs to make two guests equal again.
//!
//! The guests are synthetic, everything else is what the product uses: tracker, hashes, exchange and the encrypted bulk lane
//! over loopback TCP. Leader and follower have a core each. A guest is a process that writes the same pages as the other's, of
//! which a share comes out different ([`workload`]); only QEMU's own part, stopping and saving devices, costs nothing here. After every
//! syncvm the two memories are compared byte by byte.
//!
//! Rejected: guests in threads of the measuring process, which could not be tracked as QEMU is.

mod compare;
mod guest;
mod pair;
mod phases;
mod touch;
mod workload;

use anyhow::{Context, Result, anyhow, bail, ensure};
use syncvm::exchange::Guest;
use syncvm::transfer::TransferMode;
use syncvm::{DirtySet, PAGE_BYTES};

pub use guest::was_guest;

use crate::group::Sink;
use crate::plot::{self, Bar};
use crate::row::Row;
use crate::sample::{Better, Figure, alone, median, paired, thread_cpu_time};
use crate::{Effort, page_hash, pin, results};
use guest::SyntheticGuest;
use pair::{Mode, Pair, Synced};
use workload::{Shape, Side, Slot};

/// Each is measured on the same slots, in turn. The first is what the rows are about.
const MODES: [Mode; 7] = [
    Mode::DEFAULT,
    Mode { name: "mc", set: |config| config.transfer = TransferMode::All, both_run: false },
    Mode {
        name: "mc, late resume",
        set: |config| (config.transfer, config.early_resume) = (TransferMode::All, false),
        both_run: false,
    },
    Mode {
        name: "ordering only",
        set: |config| {
            config.early_resume = false;
            (config.transfer, config.background_hashing) = (TransferMode::Pages, false);
        },
        ..Mode::DEFAULT
    },
    Mode {
        name: "+ early resume",
        set: |config| (config.transfer, config.background_hashing) = (TransferMode::Pages, false),
        ..Mode::DEFAULT
    },
    Mode { name: "+ background hashing", set: |config| config.transfer = TransferMode::Pages, ..Mode::DEFAULT },
    Mode { name: HASHED_AT_THE_STOP, set: |config| config.background_hashing = false, ..Mode::DEFAULT },
];
const HASHED_AT_THE_STOP: &str = "hashed at the stop";
/// What is switched on one after the other, up to what is the default, and what the plot calls it.
const STEPS: [(&str, &str); 5] = [
    ("mc, late resume", "checkpointing (mc, late resume)"),
    ("ordering only", "ordering, divergent pages only"),
    ("+ early resume", "+ early resume"),
    ("+ background hashing", "+ background hashing"),
    ("default", "+ delta (default)"),
];

/// How large everything is.
#[derive(Clone, Copy, Debug)]
struct Size {
    ram_pages: usize,
    dirty: u32,
    slots: usize,
}

impl Size {
    const DIRTY: u32 = 10_000;
    /// Dirty pages of a slot in which hardly anything happens.
    const FEW: u32 = 100;

    fn of(effort: Effort) -> Size {
        let full = Size { ram_pages: (1 << 30) / PAGE_BYTES, dirty: Size::DIRTY, slots: effort.runs() };
        effort.pick(full, Size { ram_pages: (128 << 20) / PAGE_BYTES, dirty: Size::DIRTY / 10, ..full })
    }

    fn slot(&self, seed: usize, turn: usize, shape: Shape) -> Slot {
        Slot { seed: seed as u64, turn: turn as u64, dirty: self.dirty, different: self.dirty / 5, shape }
    }
}

/// Measures everything.
///
/// # Errors
/// Not root, a guest or an exchange that fails, or memories that differ afterwards.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    page_hash::run(effort, sink)?;
    let scans = [("syncvm.scan_ms_per_gib", Size::DIRTY), ("syncvm.scan_ms_per_gib.few", Size::FEW)];
    let exchanges = ["syncvm.stop", "syncvm.bytes"].iter().any(|area| sink.wants_some(area));
    if !rig::is_root() && (exchanges || ["syncvm.scan", touch::ID].iter().any(|area| sink.wants_some(area))) {
        bail!("the other figures of this group track the memory of another process: start this again as root");
    }
    let size = Size::of(effort);
    for (id, dirty) in scans {
        if sink.wants(id) {
            sink(scan(id, dirty, size, effort)?)?;
        }
    }
    if sink.wants(touch::ID) {
        sink(touch::row(size, effort)?)?;
    }
    if exchanges { exchange(size, effort, sink) } else { Ok(()) }
}

fn exchange(size: Size, effort: Effort, sink: Sink<'_>) -> Result<()> {
    let mut pair = Pair::start(size.ram_pages, &[])?;
    let mut modes = MODES.map(|mode| (mode, Vec::new()));
    measure(&mut pair, &mut modes, size, Shape::REDIS)?;
    for row in rows(&modes, effort)? {
        if sink.wants(&row.id) {
            sink(row)?;
        }
    }
    let mut scattered = [(Mode::DEFAULT, Vec::new())];
    measure(&mut pair, &mut scattered, Size { slots: effort.pick(5, 1), ..size }, Shape::SCATTERED)?;
    print_tables(&modes, &scattered[0].1);
    plots(&modes, effort)
}

/// The paper's Figure 7: what each switch adds. Nothing is drawn of a smoke run.
fn plots(modes: &[(Mode, Vec<Synced>)], effort: Effort) -> Result<()> {
    if effort == Effort::Smoke {
        return Ok(());
    }
    let bars = |of: fn(&Synced) -> f64| -> Vec<Bar> {
        let steps = STEPS.iter().filter_map(|(name, label)| {
            let (_, slots) = modes.iter().find(|(mode, _)| mode.name == *name)?;
            Some(Bar { label: (*label).to_owned(), value: median(slots.iter().map(of).collect()) })
        });
        steps.collect()
    };
    let stop = bars(Synced::stop_ms);
    let stop = plot::bars("How long the leader's guest stands still, switch by switch", "stop, ms (median)", &stop);
    let bytes = bars(|slot| slot.bytes() as f64 / 1e6);
    let bytes = plot::bars("What crosses the network, switch by switch", "MB both ways (median)", &bytes);
    for (name, svg) in [("syncvm-stop", stop), ("syncvm-bytes", bytes)] {
        println!("plot: {}", plot::write(&results::directory(), name, &svg)?.display());
    }
    Ok(())
}

/// Slots of all modes in turn. The first of each is a warm-up and does not count; the order is reversed in every other round.
fn measure(pair: &mut Pair, modes: &mut [(Mode, Vec<Synced>)], size: Size, shape: Shape) -> Result<()> {
    for round in 0..=size.slots {
        let mut order: Vec<usize> = (0..modes.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let (mode, slots) = &mut modes[index];
            let synced = pair.slot(size.slot(round, index, shape), *mode)?;
            if round > 0 {
                slots.push(synced);
            }
        }
    }
    Ok(())
}

fn rows(modes: &[(Mode, Vec<Synced>)], effort: Effort) -> Result<Vec<Row>> {
    let ours = &modes[0].1;
    let stops = |slots: &[Synced]| slots.iter().map(Synced::stop_ms).collect::<Vec<f64>>();
    let stop = Figure { id: "syncvm.stop_ms", unit: "ms", better: Better::Lower };
    let mut rows = vec![alone(stop, effort, stops(ours))];
    let peers = [
        ("syncvm.stop_vs_mc", "mc"),
        ("syncvm.stop_vs_mc.late_resume", "mc, late resume"),
        ("syncvm.stop_vs_hashed_at_the_stop", HASHED_AT_THE_STOP),
    ];
    for (id, name) in peers {
        let (_, mc) = modes.iter().find(|(mode, _)| mode.name == name).context("the mode was measured")?;
        rows.push(paired(Figure { id, ..stop }, effort, name, stops(ours), stops(mc)));
    }
    let figure = Figure { id: "syncvm.bytes_vs_different", unit: "bytes", better: Better::Lower };
    let of = |bytes: fn(&Synced) -> u64| ours.iter().map(|slot| bytes(slot) as f64).collect();
    let (sent, different) = (of(Synced::bytes), of(|slot| slot.difference.block_bytes()));
    rows.push(paired(figure, effort, "256-byte blocks that differ", sent, different));
    Ok(rows)
}

/// The harvest of one guest alone, in CPU time of its core.
fn scan(id: &str, dirty: u32, size: Size, effort: Effort) -> Result<Row> {
    let figure = Figure { id, unit: "ms", better: Better::Lower };
    // In a thread of its own, because it is pinned.
    let times = std::thread::scope(|scope| scope.spawn(|| scan_times(dirty, size)).join());
    Ok(alone(figure, effort, times.map_err(|_| anyhow!("the harvesting thread panicked"))??))
}

fn scan_times(dirty: u32, size: Size) -> Result<Vec<f64>> {
    let [guest_cpu, cpu] = pin::two_cpus()?;
    let mut guest = SyntheticGuest::start(Side::Leader, size.ram_pages, guest_cpu, &[])?;
    pin::pin(cpu)?;
    let gib = (size.ram_pages * PAGE_BYTES) as f64 / f64::from(1 << 30);
    let mut times = Vec::new();
    for seed in 0..=size.slots {
        guest.run(Slot { seed: seed as u64, turn: 0, dirty, different: 0, shape: Shape::REDIS })?;
        let mut found = DirtySet::new(size.ram_pages);
        let start = thread_cpu_time();
        guest.harvest(&mut found)?;
        times.push((thread_cpu_time() - start).as_secs_f64() * 1e3 / gib);
        ensure!(found.count() == dirty as usize, "{} of {dirty} pages were found", found.count());
    }
    // The first is the warm-up.
    Ok(times.split_off(1))
}

fn print_tables(modes: &[(Mode, Vec<Synced>)], scattered: &[Synced]) {
    let all: Vec<(&str, &[Synced])> = modes.iter().map(|(mode, slots)| (mode.name, &slots[..])).collect();
    let difference = &modes[0].1[0].difference;
    println!(
        "a slot: {} pages dirty, {} differ, in {} of 64 lines (median), {:.2} MB of 256-byte blocks, {:.2} MB of lines",
        modes[0].1[0].led.union_pages,
        difference.pages.len(),
        difference.median_lines(),
        difference.block_bytes() as f64 / 1e6,
        (difference.lines * workload::LINE_BYTES) as f64 / 1e6,
    );
    println!("\n{}", phases::table(&all));
    let scattered = [("default, scattered lines", scattered)];
    println!("{}", phases::effects(&[&all[..], &scattered[..]].concat()));
}

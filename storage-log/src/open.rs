//! Opening a log: take the copies, read what they hold, fill small gaps, start the engine.

use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::block::{BLOCK_BYTES, Content, examine};
use crate::engine::{Engine, Start, random};
use crate::keeper::{Keeper, Port};
use crate::legs::{Legs, MAX_LEGS};
use crate::recovery::{Gap, Scan, scan};
use crate::segment::SegmentNumber;
use crate::stage::Stage;
use crate::uring::Uring;
use crate::volume::{Access, FileVolume, Geometry, LegSpec, Volume, aligned_buffer};
use crate::{LogError, LogStore, Options, Recovered};

/// A copy that lacks more than this is rebuilt while the log runs; smaller gaps are filled before it is opened.
const FILL_AT_ONCE_BLOCKS: usize = if cfg!(test) { 12 } else { (16 << 20) / BLOCK_BYTES };

/// Opens a log that is kept in `legs`, each of which holds all of it, and returns what it holds. It is written through io_uring,
/// or by SPDK if all legs are NVMe namespaces.
///
/// With several legs, one that cannot be opened is left out and rebuilt as soon as it can.
///
/// # Errors
/// [`LogError`]: in use, damaged, not accessible, or options that contradict each other.
pub fn open(legs: &[LegSpec], options: Options) -> Result<(Box<dyn LogStore>, Recovered), LogError> {
    let geometry = options.geometry()?;
    if legs.is_empty() || legs.len() > MAX_LEGS {
        return Err(LogError::BadOptions {
            problem: format!("{} places for the log: 1 to {MAX_LEGS} are", legs.len()),
        });
    }
    #[cfg(feature = "spdk")]
    if legs.iter().all(|leg| matches!(leg, LegSpec::Nvme(_))) {
        return crate::spdk::open_legs(legs, options);
    }
    let here = legs[0].path();
    let opened = open_copies::<FileVolume>(legs, geometry)?;
    let memory = aligned_buffer(options.stage_bytes.next_multiple_of(BLOCK_BYTES))?;
    let stage = Stage::new(Box::new(memory), opened.scan.chain);
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
    let event = Arc::new(event.map_err(|error| LogError::io("making an eventfd for", here, error))?);
    // SAFETY: the memory is owned by the stage, which never moves or frees it; engine and driver are dropped before it
    // (the driver is declared before the stage in `Engine`).
    let driver = unsafe { Uring::new(stage.memory(), Arc::clone(&event)) };
    let driver = driver.map_err(|error| LogError::io("setting up io_uring for", here, error))?;
    let keeper = Keeper::new(legs.to_vec(), geometry, opened.volumes);
    let keeper = Port::spawn(keeper, event).map_err(|error| LogError::io("starting the keeper of", here, error))?;
    let paths = legs.iter().map(|leg| leg.path().to_owned());
    let out = paths.zip(opened.out);
    let (start, recovered) = start(driver, stage, keeper, Legs::new(out), geometry, &options, opened.scan);
    Ok((Box::new(Engine::new(start)), recovered))
}

/// The engine's beginnings from what was found.
pub(crate) fn start<V: Volume, D>(
    driver: D,
    stage: Stage,
    keeper: Port<V>,
    legs: Legs,
    geometry: Geometry,
    options: &Options,
    scan: Scan,
) -> (Start<V, D>, Recovered) {
    let start = Start {
        driver,
        stage,
        keeper,
        legs,
        geometry,
        max_bytes: options.max_bytes,
        range: scan.range,
        segments: scan.segments.into(),
        state: scan.recovered.state.clone(),
        state_in: scan.state_in,
        last: scan.last,
        log_id: scan.last.map_or_else(random, |last| last.log_id),
        doubtful: scan.recovered.doubtful,
    };
    (start, scan.recovered)
}

/// Copies that were opened and read.
pub(crate) struct Opened<V> {
    pub volumes: Vec<Option<V>>,
    /// Why a copy does not take part yet.
    pub out: Vec<Option<LogError>>,
    pub scan: Scan,
}

/// Opens and reads the copies, and makes those equal that lack little.
pub(crate) fn open_copies<V: Volume>(specs: &[V::Spec], geometry: Geometry) -> Result<Opened<V>, LogError> {
    let (mut volumes, mut out) = (Vec::new(), Vec::new());
    for spec in specs {
        let (volume, error) = match V::open(spec, geometry, Access::Own) {
            Ok(volume) => (Some(volume), None),
            // Somebody else writes there: going on with the others would split the log. Or it was not meant so.
            Err(error @ (LogError::Locked { .. } | LogError::Foreign { .. } | LogError::BadOptions { .. })) => {
                return Err(error);
            }
            Err(error) => (None, Some(error)),
        };
        volumes.push(volume);
        out.push(error);
    }
    if volumes.iter().all(Option::is_none) {
        return Err(out.into_iter().flatten().next().expect("each that is not open has an error"));
    }
    let scan = scan(&volumes, &mut |_, _, _| {})?;
    let gaps_of = |leg| scan.gaps.iter().copied().filter(move |gap: &Gap| gap.leg == leg);
    let mut here: Vec<usize> = (0..specs.len()).filter(|leg| volumes[*leg].is_some()).collect();
    // Those that lack least first: one that lacks more and is left out then may have just that.
    here.sort_by_key(|leg| gaps_of(*leg).count());
    let mut complete = 0;
    for leg in here {
        let gaps: Vec<Gap> = gaps_of(leg).collect();
        let made = if gaps.len() > FILL_AT_ONCE_BLOCKS && complete > 0 {
            Err(LogError::Incomplete { path: describe(&volumes, leg, gaps[0].number), blocks: gaps.len() })
        } else {
            fill(&mut volumes, &gaps).and_then(|()| settle(volumes[leg].as_mut(), &scan))
        };
        match made {
            Ok(()) => complete += 1,
            Err(error) => {
                volumes[leg] = None;
                out[leg] = Some(error);
            }
        }
    }
    if volumes.iter().all(Option::is_none) {
        return Err(out.into_iter().flatten().next().expect("each that is not open has an error"));
    }
    report(&scan, &out);
    Ok(Opened { volumes, out, scan })
}

fn describe<V: Volume>(volumes: &[Option<V>], leg: usize, number: SegmentNumber) -> std::path::PathBuf {
    volumes[leg].as_ref().map(|volume| volume.describe(number)).unwrap_or_default()
}

/// Writes the blocks that a copy lacks, from whichever other one has them.
fn fill<V: Volume>(volumes: &mut [Option<V>], gaps: &[Gap]) -> Result<(), LogError> {
    let mut buffer = aligned_buffer(BLOCK_BYTES)?;
    for gap in gaps {
        find_block(volumes, gap, &mut buffer)?;
        if let Some(volume) = &mut volumes[gap.leg] {
            if !volume.segments().contains(&gap.number) {
                volume.prepare(gap.number)?;
            }
            volume.write(gap.number, gap.block, &buffer)?;
        }
    }
    for pair in gaps.windows(2) {
        if pair[0].number != pair[1].number
            && let Some(volume) = &mut volumes[pair[0].leg]
        {
            volume.sync(pair[0].number)?;
        }
    }
    match gaps.last().and_then(|gap| volumes[gap.leg].as_mut().map(|volume| (volume, gap.number))) {
        Some((volume, number)) => volume.sync(number),
        None => Ok(()),
    }
}

fn find_block<V: Volume>(volumes: &[Option<V>], gap: &Gap, buffer: &mut [u8]) -> Result<(), LogError> {
    for (leg, volume) in volumes.iter().enumerate() {
        if leg == gap.leg {
            continue;
        }
        if let Some(volume) = volume
            && volume.segments().contains(&gap.number)
            && volume.read(gap.number, gap.block, buffer)? == 1
            && let Content::Whole(trailer) = examine((&*buffer).try_into().expect("a block's length"), gap.block)
            && trailer.segment == gap.segment
        {
            return Ok(());
        }
    }
    Err(LogError::Incomplete { path: describe(volumes, gap.leg, gap.number), blocks: 1 })
}

/// Makes durable what was read (the process that wrote it may have died before its sync), and gives back what is no
/// longer needed.
fn settle<V: Volume>(volume: Option<&mut V>, scan: &Scan) -> Result<(), LogError> {
    let (Some(volume), Some(last)) = (volume, scan.last) else { return Ok(()) };
    if volume.segments().contains(&last.number()) {
        volume.sync(last.number())?;
    }
    for number in volume.segments().into_iter().filter(|number| *number < scan.first) {
        volume.release(number)?;
    }
    Ok(())
}

fn report(scan: &Scan, out: &[Option<LogError>]) {
    for error in out.iter().flatten() {
        tracing::error!(error = error as &dyn std::error::Error, "a copy of the log does not take part");
    }
    let Recovered { torn_bytes, doubtful, .. } = scan.recovered;
    if torn_bytes > 0 {
        tracing::info!(torn_bytes, "an unfinished write is left out at the end of the log");
    }
    if doubtful {
        tracing::warn!("the end of the log is in doubt: this replica asks the others before it votes");
    }
}

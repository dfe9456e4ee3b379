//! `plover log check` and `plover log dump`: the log on this node's disks, for operators. Reads only, and only while no
//! daemon has the log.

use std::io::Write;
use std::process::ExitCode;

use consensus::{Entry, HardState};
use dataplane::batch;
use qemu_vhost_user::config::{NodeConfig, VmConfig};
use storage_log::{InspectedRecord, RecordKind, inspect};

/// The log is whole, yet what was acknowledged last may be missing.
const EXIT_IN_DOUBT: u8 = 5;

/// Says whether the log is whole.
///
/// # Errors
/// The log is damaged, in use or not there; or the output is closed.
pub fn check(node: &NodeConfig, vm: &VmConfig, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let legs = node.log_legs(&vm.name);
    let mut records = 0_u64;
    let found = inspect(&legs, &mut |_| records += 1)?;
    for (leg, missing) in legs.iter().zip(&found.missing_blocks) {
        match missing {
            Ok(0) => writeln!(out, "copy      {}: complete", leg.path().display())?,
            Ok(blocks) => writeln!(out, "copy      {}: lacks {blocks} blocks; rebuilt at start", leg.path().display())?,
            Err(error) => writeln!(out, "copy      {}: {error}", leg.path().display())?,
        }
    }
    for segment in &found.segments {
        let (number, blocks) = (segment.number, segment.blocks);
        writeln!(out, "segment   {number}: {blocks} blocks in {}", segment.place.display())?;
    }
    let recovered = &found.recovered;
    match recovered.state.as_deref().map(HardState::decode) {
        Some(Ok(state)) => writeln!(out, "state     {}", state_text(&state))?,
        Some(Err(error)) => writeln!(out, "state     not understood: {error}")?,
        None => writeln!(out, "state     none")?,
    }
    match (recovered.entries.first(), recovered.entries.last()) {
        (Some(first), Some(last)) => writeln!(out, "entries   {} to {}, {records} records", first.index, last.index)?,
        _ => writeln!(out, "entries   none, {records} records")?,
    }
    if recovered.torn_bytes > 0 && !recovered.doubtful {
        writeln!(out, "end       a write of {} bytes was cut short and counts for nothing", recovered.torn_bytes)?;
    }
    if recovered.doubtful {
        writeln!(out, "IN DOUBT  the last records may be lost; this replica will ask both others before it votes")?;
        return Ok(ExitCode::from(EXIT_IN_DOUBT));
    }
    writeln!(out, "whole")?;
    Ok(ExitCode::SUCCESS)
}

/// Prints every record, also those that later ones supersede.
///
/// # Errors
/// As [`check`]; records before a damage have been printed then.
pub fn dump(node: &NodeConfig, vm: &VmConfig, frames: bool, out: &mut dyn Write) -> anyhow::Result<ExitCode> {
    let mut written = Ok(());
    let found = inspect(&node.log_legs(&vm.name), &mut |record| {
        if written.is_ok() {
            written = print_record(record, frames, out);
        }
    });
    written?;
    found?;
    Ok(ExitCode::SUCCESS)
}

fn print_record(record: &InspectedRecord<'_>, frames: bool, out: &mut dyn Write) -> std::io::Result<()> {
    write!(out, "{:>6} {:>6}  ", record.segment, record.block)?;
    match record.kind {
        RecordKind::State | RecordKind::StateCopy => {
            let name = if record.kind == RecordKind::State { "state" } else { "state again" };
            match HardState::decode(record.payload) {
                Ok(state) => writeln!(out, "{name}: {}", state_text(&state)),
                Err(error) => writeln!(out, "{name}: not understood: {error}"),
            }
        }
        RecordKind::Truncate => writeln!(out, "forget through {}", record.index),
        RecordKind::Begin => writeln!(out, "begin with segment {}", record.index),
        RecordKind::Entry => match Entry::decode(record.payload) {
            Ok(entry) => {
                writeln!(out, "{} v{}: {entry}", record.index, record.view)?;
                if frames { print_frames(&entry, out) } else { Ok(()) }
            }
            Err(error) => writeln!(out, "{} v{}: not understood: {error}", record.index, record.view),
        },
    }
}

fn print_frames(entry: &Entry, out: &mut dyn Write) -> std::io::Result<()> {
    let Entry::Input(payload) = entry else { return Ok(()) };
    let Ok(frames) = batch::frames(payload) else {
        return writeln!(out, "{:>16}not a batch of frames", "");
    };
    for frame in frames {
        write!(out, "{:>16}", "")?;
        for byte in frame {
            write!(out, "{byte:02x}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn state_text(state: &HardState) -> String {
    let HardState { promised, base, learner, void_entries } = state;
    let role = |role: Option<consensus::ReplicaId>| role.map_or("none".to_owned(), |id| id.to_string());
    let mut text = format!(
        "promised {promised}, base {}, second {}, leader {}",
        base.viewstamp(),
        role(base.second),
        role(base.leader)
    );
    if *learner {
        text += ", must catch up before it votes";
    }
    if *void_entries {
        text += ", entries above the base are void";
    }
    text
}

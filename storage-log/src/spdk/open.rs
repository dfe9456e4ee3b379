//! Opening a log that lives on SPDK devices.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use super::device::{Device, DeviceOptions};
use super::driver::SpdkDriver;
use super::environment::Environment;
use super::error::SpdkError;
use super::memory::DmaBuffer;
use super::volume::{Leg, SpdkVolume};
use crate::engine::Engine;
use crate::keeper::{Keeper, Port};
use crate::legs::Legs;
use crate::open::{open_copies, start};
use crate::stage::Stage;
use crate::volume::{Access, Geometry, LegSpec, Volume};
use crate::{BLOCK_BYTES, LogError, LogStore, Options, Recovered};

/// Opens a log whose copies are all NVMe namespaces. It has no event: its owner polls it while it is busy. With several
/// copies, one whose device cannot be opened is left out; it is tried again when the log is opened the next time.
pub(crate) fn open_legs(specs: &[LegSpec], options: Options) -> Result<(Box<dyn LogStore>, Recovered), LogError> {
    let geometry = options.geometry()?;
    let stage_bytes = options.stage_bytes.next_multiple_of(BLOCK_BYTES);
    let (memory, legs) = open_devices(specs, stage_bytes)?;
    let opened = open_copies::<SpdkVolume>(&legs, geometry)?;
    let stage = Stage::new(Box::new(memory), opened.scan.chain);
    let paths = legs.iter().map(|leg| leg.path.clone());
    let states = Legs::new(paths.zip(opened.out));
    let keeper = Port::inline(Keeper::new(legs, geometry, opened.volumes));
    let (start, recovered) = start(SpdkDriver::default(), stage, keeper, states, geometry, &options, opened.scan);
    Ok((Box::new(Engine::new(start)), recovered))
}

/// Opens the copies of a log to look at them.
pub(crate) fn inspect_legs(
    specs: &[LegSpec],
    geometry: Geometry,
) -> Result<Vec<Result<SpdkVolume, LogError>>, LogError> {
    let (_, legs) = open_devices(specs, BLOCK_BYTES)?;
    Ok(legs.iter().map(|leg| SpdkVolume::open(leg, geometry, Access::Inspect)).collect())
}

/// Opens the devices, whose writes will come from the buffer.
fn open_devices(specs: &[LegSpec], buffer_bytes: usize) -> Result<(DmaBuffer, Vec<Leg>), LogError> {
    let failed = |error: SpdkError| LogError::io("opening", specs[0].path(), io::Error::other(error));
    let environment = Environment::running().map_err(failed)?;
    let memory = DmaBuffer::new(environment, buffer_bytes, "records on their way").map_err(failed)?;
    let mut legs = Vec::new();
    for spec in specs {
        let path = spec.path().to_owned();
        let Some((address, namespace)) = spec.nvme() else {
            let problem = format!("the place {}: it must be spdk:ADDRESS or spdk:ADDRESS/NAMESPACE", path.display());
            return Err(LogError::BadOptions { problem });
        };
        let options = DeviceOptions { namespace, ..DeviceOptions::new(address) };
        let device = Device::open(environment, &options, &memory).map(|device| Rc::new(RefCell::new(device)));
        legs.push(Leg { path, device });
    }
    Ok((memory, legs))
}

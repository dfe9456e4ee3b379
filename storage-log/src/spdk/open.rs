//! Opening a log that lives on SPDK devices.

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;

use super::device::{Device, DeviceOptions};
use super::driver::SpdkDriver;
use super::environment::Environment;
use super::error::SpdkError;
use super::memory::DmaBuffer;
use super::volume::{Leg, SpdkVolume};
use crate::engine::Engine;
use crate::keeper::{Keeper, Port};
use crate::legs::{Legs, MAX_LEGS};
use crate::open::{open_copies, start};
use crate::stage::Stage;
use crate::{BLOCK_BYTES, LogError, LogStore, Options, Recovered};

/// Opens a log that is kept in `devices`, each of which holds all of it, and returns what it holds. It has no event: its owner
/// polls it while it is busy. With several devices, one that cannot be opened is left out; it is tried again when the log
/// is opened the next time, and filled while the log runs.
///
/// # Errors
/// [`LogError`]: damaged, not accessible, or options that contradict each other.
pub fn open(
    environment: Environment,
    devices: &[DeviceOptions],
    options: Options,
) -> Result<(Box<dyn LogStore>, Recovered), LogError> {
    let geometry = options.geometry()?;
    if devices.is_empty() || devices.len() > MAX_LEGS {
        let problem = format!("{} devices: 1 to {MAX_LEGS} are possible", devices.len());
        return Err(LogError::BadOptions { problem });
    }
    let path = |device: &DeviceOptions| {
        PathBuf::from(format!("NVMe controller {} namespace {}", device.address, device.namespace))
    };
    let failed = |error: SpdkError| LogError::io("opening", path(&devices[0]), io::Error::other(error));
    let stage_bytes = options.stage_bytes.next_multiple_of(BLOCK_BYTES);
    let memory = DmaBuffer::new(environment, stage_bytes, "records on their way").map_err(failed)?;
    let leg = |device: &DeviceOptions| Leg {
        path: path(device),
        device: Device::open(environment, device, &memory).map(|device| Rc::new(RefCell::new(device))),
    };
    let legs: Vec<Leg> = devices.iter().map(leg).collect();
    let opened = open_copies::<SpdkVolume>(&legs, geometry)?;
    let stage = Stage::new(Box::new(memory), opened.scan.chain);
    let paths = legs.iter().map(|leg| leg.path.clone());
    let states = Legs::new(paths.zip(opened.out));
    let keeper = Port::inline(Keeper { specs: legs, geometry, volumes: opened.volumes });
    let (start, recovered) = start(SpdkDriver::default(), stage, keeper, states, geometry, &options, opened.scan);
    Ok((Box::new(Engine::new(start)), recovered))
}

//! The engine's driver on SPDK: a write, and when it has ended a flush. NVMe orders nothing among commands in flight, so the
//! flush cannot be submitted together with the write.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::device::Tag;
use super::volume::{Place, SharedDevice};
use crate::engine::Driver;
use crate::legs::MAX_LEGS;

/// The controller itself is looked at once per so many groups.
const GROUPS_PER_LOOK: u32 = 64;
/// Between two looks while somebody waits and nothing is in flight.
const NAP: Duration = Duration::from_micros(100);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Idle,
    Writing(Tag),
    Flushing(Tag),
}

/// One copy's segment and the group on its way there.
#[derive(Debug, Default)]
struct Target {
    place: Option<Place>,
    stage: Stage,
    groups: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct SpdkDriver {
    targets: [Target; MAX_LEGS],
}

impl Target {
    fn device(&self) -> io::Result<&SharedDevice> {
        self.place.as_ref().map(|place| &place.device).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Follows the group; its end, if it has come.
    fn poll(&mut self) -> Option<io::Result<()>> {
        let (Stage::Writing(tag) | Stage::Flushing(tag)) = self.stage else { return None };
        let device = &self.place.as_ref()?.device;
        let mut ended = None;
        device.borrow_mut().poll(&mut |other, outcome| {
            // Others belong to a group that was given up.
            if other == tag {
                ended = Some(outcome);
            }
        });
        let mut outcome = ended?;
        if outcome.is_ok() && matches!(self.stage, Stage::Writing(_)) {
            let flush = device.borrow_mut().submit_flush();
            match flush {
                Ok(tag) => {
                    self.stage = Stage::Flushing(tag);
                    return None;
                }
                Err(error) => outcome = Err(error),
            }
        }
        self.stage = Stage::Idle;
        Some(outcome.map_err(io::Error::other))
    }
}

impl Driver for SpdkDriver {
    type Place = Place;

    fn bind(&mut self, leg: usize, place: &Place) -> io::Result<()> {
        self.targets[leg].place = Some(place.clone());
        Ok(())
    }

    fn write(&mut self, leg: usize, bytes: Range<usize>, offset_bytes: u64) -> io::Result<()> {
        let target = &mut self.targets[leg];
        target.groups = target.groups.wrapping_add(1);
        let looks = target.groups.is_multiple_of(GROUPS_PER_LOOK);
        let base = target.place.as_ref().map_or(0, |place| place.offset_bytes);
        let mut device = target.device()?.borrow_mut();
        if looks {
            device.maintain().map_err(io::Error::other)?;
        }
        let submitted = device.submit_write(base + offset_bytes, bytes);
        drop(device);
        target.stage = Stage::Writing(submitted.map_err(io::Error::other)?);
        Ok(())
    }

    fn release(&mut self, leg: usize) -> bool {
        let target = &mut self.targets[leg];
        // A command that exceeded its time was told as failed, and the device may still carry it out.
        let is_idle = target.place.as_ref().is_none_or(|place| {
            let mut device = place.device.borrow_mut();
            device.process();
            device.is_idle()
        });
        let released = is_idle && target.stage == Stage::Idle;
        if released {
            target.place = None;
        }
        released
    }

    fn poll(&mut self, done: &mut dyn FnMut(usize, io::Result<()>)) {
        for (leg, target) in self.targets.iter_mut().enumerate() {
            if let Some(outcome) = target.poll() {
                done(leg, outcome);
            }
        }
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let mut busy = self.targets.iter().filter(|target| target.stage != Stage::Idle).peekable();
            let any = busy.peek().is_some();
            let ready = busy.any(|target| target.device().is_ok_and(|device| device.borrow_mut().process()));
            if ready || Instant::now() >= deadline {
                return Ok(());
            }
            if any {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(NAP.min(timeout));
            }
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

//! The lane through memory that two processes of one host share.
//!
//! The dialing side makes a file in /dev/shm with a ring for each direction and a slot for both, and offers its name over the authenticated
//! connection; the other side opens it, checks it, and maps it; then the name goes away. A sender whose peer sleeps rings on the
//! TCP connection. Rejected: a memfd handed over a Unix socket (one more connection to make and to authenticate), and
//! /proc/PID/fd (needs both in one PID namespace and the right to trace).

mod file;
mod lane;
mod mapping;
mod pause;

pub(super) use file::sweep;

use self::file::{FileName, NamedFile};
use self::lane::ShmLane;
use self::mapping::{Direction, Mapping};
use super::lane::{LaneSetup, SetupContext, SetupError, SetupProgress, Transport};
use std::sync::Arc;

/// Offer of both sides: magic, `u32` ring bytes (little-endian); then the dialer's has the name of the file.
const MAGIC: [u8; 4] = *b"SHM1";
const FIXED_BYTES: usize = 8;

/// Starts a set-up: the file, on the dialing side, and the offer.
///
/// # Errors
/// [`SetupError`].
pub(super) fn begin(context: &SetupContext) -> Result<(Box<dyn LaneSetup>, Vec<u8>), SetupError> {
    let ring_bytes = u32::try_from(context.ring_bytes).expect("rings are of some MiB");
    let mut offer = MAGIC.to_vec();
    offer.extend(ring_bytes.to_le_bytes());
    let setup: Box<dyn LaneSetup> = if context.we_dial {
        let file = NamedFile::create(mapping::file_bytes(context.ring_bytes)).map_err(setup_error)?;
        offer.extend(file.name().as_str().as_bytes());
        Box::new(Dialer { context: context.clone(), file: Some(file) })
    } else {
        Box::new(Acceptor { context: context.clone() })
    };
    Ok((setup, offer))
}

fn setup_error(what: impl ToString) -> SetupError {
    SetupError { transport: Transport::Shm, what: what.to_string() }
}

/// What follows the fixed part of an offer for rings of `ring_bytes`.
fn check_offer(offer: &[u8], ring_bytes: usize) -> Result<&[u8], SetupError> {
    let fixed = offer.first_chunk::<FIXED_BYTES>().filter(|fixed| fixed.starts_with(&MAGIC));
    let fixed = fixed.ok_or_else(|| setup_error("the peer's offer is not understood; run one version on all nodes"))?;
    let theirs = u32::from_le_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
    if theirs as usize != ring_bytes {
        let text = format!("the peer's rings have {theirs} bytes, ours {ring_bytes}; run one version on all nodes");
        return Err(setup_error(text));
    }
    Ok(&offer[FIXED_BYTES..])
}

struct Dialer {
    context: SetupContext,
    file: Option<NamedFile>,
}

impl LaneSetup for Dialer {
    fn complete(&mut self, peer_offer: &[u8], _now_us: u64) -> Result<SetupProgress, SetupError> {
        if !check_offer(peer_offer, self.context.ring_bytes)?.is_empty() {
            return Err(setup_error("both sides made a file; the lower replica is to make it"));
        }
        let file = self.file.take().expect("a set-up is completed once");
        let mapping = Arc::new(Mapping::new(file.fd(), self.context.ring_bytes).map_err(setup_error)?);
        let lane = ShmLane::new(&mapping, [Direction::FromDialer, Direction::ToDialer], &self.context, Some(file));
        Ok(SetupProgress::Up(Box::new(lane)))
    }
}

struct Acceptor {
    context: SetupContext,
}

impl LaneSetup for Acceptor {
    fn complete(&mut self, peer_offer: &[u8], _now_us: u64) -> Result<SetupProgress, SetupError> {
        let name = check_offer(peer_offer, self.context.ring_bytes)?;
        let name =
            FileName::parse(name).ok_or_else(|| setup_error("the peer's file has a name that is none of ours"))?;
        let fd = file::open(&name, mapping::file_bytes(self.context.ring_bytes)).map_err(setup_error)?;
        let mapping = Arc::new(Mapping::new(&fd, self.context.ring_bytes).map_err(setup_error)?);
        let lane = ShmLane::new(&mapping, [Direction::ToDialer, Direction::FromDialer], &self.context, None);
        Ok(SetupProgress::Up(Box::new(lane)))
    }
}

#[cfg(test)]
mod tests;

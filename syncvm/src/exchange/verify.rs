//! The check of invariant I4: after apply and load, before anyone runs, both sides hash **all** of RAM and
//! compare, and the follower's device state, saved again, is compared with the leader's byte by byte.
//!
//! It does not trust the dirty sets, which is its purpose: a tracker that misses pages is found here.

use super::{BATCH_PAGES, Channel, Deadlines, FollowerContext, Guest, LeaderContext, Observer, SyncError};
use crate::page::PageNumber;
use crate::transfer::{Header, Kind};

/// How many divergent pages an error names.
const NAMED_PAGES: usize = 16;

fn batches(pages: usize) -> impl Iterator<Item = Vec<PageNumber>> {
    (0..pages)
        .step_by(BATCH_PAGES)
        .map(move |first| (first..pages.min(first + BATCH_PAGES)).map(|page| PageNumber(page as u32)).collect())
}

/// The leader compares and tells the follower.
pub(super) fn lead<G: Guest, C: Channel, O: Observer>(
    ctx: &mut LeaderContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
) -> Result<(), SyncError> {
    let mut divergent = Vec::new();
    for batch in batches(ctx.pairing.pages()) {
        ctx.verify_batch(header, deadlines, &batch, &mut divergent)?;
    }
    let limit = ctx.config.max_device_bytes;
    let theirs = ctx.link.recv_pieces(header, Kind::VerifyDevice, "the device state", limit, deadlines)?;
    let ours = ctx.outgoing.device();
    let different = (0..ours.len().max(theirs.len())).filter(|&at| ours.get(at) != theirs.get(at));
    let device_bytes = different.clone().count();
    let first_device_byte = different.clone().next();
    let equal = divergent.is_empty() && device_bytes == 0;
    ctx.link.send(header, Kind::Verdict, &[&[equal.into()]], deadlines.next())?;
    if equal {
        return Ok(());
    }
    let pages = divergent.len();
    divergent.truncate(NAMED_PAGES);
    Err(SyncError::Diverged { number: header.number, pages, first_pages: divergent, device_bytes, first_device_byte })
}

/// The follower sends its side and waits for the verdict. `Ok(false)`: the leader is gone, so nobody can say;
/// the transfer was acknowledged and applied, and stands.
pub(super) fn follow<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
) -> Result<bool, SyncError> {
    // Saving comes before hashing: what saving writes into RAM is looked at as well.
    let device = match ctx.guest.save_device_state() {
        Ok(device) => device,
        Err(error) => {
            tracing::warn!(%error, "invariant I4 cannot be checked");
            ctx.link.send_abort(header, &SyncError::Guest(error));
            return Ok(false);
        }
    };
    match send_and_wait(ctx, header, deadlines, &device) {
        Ok(true) => Ok(true),
        Ok(false) => {
            ctx.lose_guest();
            Err(SyncError::PeerAborted {
                needs_rejoin: true,
                hash_agreed_falsely: false,
                reason: "the guests differ after the syncvm (invariant I4); see the leader's log".into(),
            })
        }
        Err(error) => {
            tracing::warn!(%error, "invariant I4 was not checked to the end");
            Ok(false)
        }
    }
}

fn send_and_wait<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
    device: &[u8],
) -> Result<bool, SyncError> {
    for batch in batches(ctx.pairing.pages()) {
        ctx.verify_batch(header, deadlines, &batch)?;
    }
    ctx.link.send_pieces(header, Kind::VerifyDevice, device, deadlines)?;
    let verdict = ctx.link.expect(header, Kind::Verdict, "the verdict", deadlines)?;
    Ok(verdict == [1])
}

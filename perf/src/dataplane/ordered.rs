//! A loop that orders what it gives to the guest: three replicas over shared memory, all driven by the device's thread.
//!
//! The leader makes frames up, proposes them in batches as the daemon's ingress does, and gives them to the guest once they are
//! committed. The secondary has no guest: it walks each committed batch and looks at every frame instead. The witness stores.
//! One thread, because the guest needs one of two CPUs: what three hosts would share out, this does one after the other.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use consensus::{Entry, Event, Index, ReplicaId};
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::fabric::{FabricKey, Listener, NodeIdentity, PeerId, Replica, Security, Transport};
use dataplane::wait::now_us;
use qemu_vhost_user::device::{NetDevice, VNET_HEADER_BYTES};

use super::member::{ARENA_BYTES, Member, shared};

/// As the daemon's ingress: the largest batch, frames taken in one turn, proposals on their way, committed input that waits.
const BATCH_BYTES: usize = 256 << 10;
const BATCH_FRAMES: usize = 512;
const PROPOSALS_IN_FLIGHT: u64 = 4;
const BACKLOG_BYTES: usize = 8 << 20;
/// As the daemon's delivery: frames given to the guest in one turn, twice what is taken, so that what waits becomes less.
const DELIVER_FRAMES: usize = 2 * BATCH_FRAMES;
/// Input between two syncvms, behind which the log is truncated.
const SYNC_EVERY_BYTES: usize = ARENA_BYTES / 4;
/// Longest wait for a leader, for a commit, and for the last frames.
const PATIENCE: Duration = Duration::from_secs(10);

const LEADER: usize = 0;
const SECONDARY: usize = 1;
const WITNESS: usize = 2;
const SECOND: ReplicaId = ReplicaId(1);
/// Where a frame has its number: in place of the IP addresses, behind the headers of Ethernet and the start of IP.
const NUMBER_AT: usize = VNET_HEADER_BYTES + 26;

/// See the module.
pub struct Group {
    members: [Member; 3],
    /// Held for their threads, which took the connections.
    _listeners: Vec<Listener>,
    /// What each frame is but for its number.
    frame: Vec<u8>,
    /// Frames that were proposed.
    made: u64,
    /// Committed bytes that wait for the guest.
    backlog_bytes: usize,
    /// Where in the first entry that waits the frames are that the guest does not have yet.
    waiting: VecDeque<Range<usize>>,
    /// Frames that were given to the guest.
    delivered: u64,
    /// Frames that the secondary has looked at.
    walked: u64,
    /// The last entry that the secondary is through with.
    secondary_at: Index,
    /// The syncvm under way.
    sync: Option<Index>,
    since_sync_bytes: usize,
}

impl Group {
    /// Connects three replicas, of which replica 0 leads and replica 1 is the secondary.
    ///
    /// # Errors
    /// No connection through shared memory, or no leader, in time.
    pub fn start(frame_bytes: usize) -> Result<Group> {
        let security = Security::Encrypted(FabricKey::generate()?);
        let mut listeners = Vec::new();
        for id in 0..3 {
            let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            listeners.push(Listener::bind(addr, NodeIdentity::new(&format!("node{id}"))?, security.clone())?);
        }
        let replica = |(id, listener): (u8, &Listener)| Replica {
            id: PeerId(id),
            node: listener.identity().name.clone(),
            addr: listener.local_addr(),
            transports: vec![Transport::Shm],
        };
        let replicas: Vec<Replica> = (0..).zip(&listeners).map(replica).collect();
        let now = now_us();
        let member = |id: u8| Member::new(&listeners[usize::from(id)], replicas.clone(), ReplicaId(id), now);
        let members = [member(0)?, member(1)?, member(2)?];
        let mut group = Group {
            members,
            _listeners: listeners,
            frame: frame(frame_bytes),
            made: 0,
            backlog_bytes: 0,
            waiting: VecDeque::with_capacity(BATCH_FRAMES),
            delivered: 0,
            walked: 0,
            secondary_at: Index(0),
            sync: None,
            since_sync_bytes: 0,
        };
        group.elect().context("no group of three over shared memory")?;
        Ok(group)
    }

    /// A leader; then a secondary, which needs a syncvm before it is named.
    fn elect(&mut self) -> Result<()> {
        self.members[LEADER].step(now_us(), Event::GuestIntact(true))?;
        self.turn_until("a leader", |group| {
            group.members.iter().all(Member::is_connected) && group.members[LEADER].replica().leading().is_some()
        })?;
        let base = self.members[LEADER].propose(now_us(), Entry::SyncVm { with: SECOND })?;
        self.turn_until("a syncvm", |group| group.members[LEADER].replica().commit_index() >= base)?;
        let named = self.members[LEADER].propose(now_us(), Entry::Second { replica: Some(SECOND), base })?;
        self.turn_until("a secondary", |group| group.secondary_at >= named)
    }

    fn turn_until(&mut self, what: &str, done: impl Fn(&Group) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            ensure!(Instant::now() < deadline, "no {what} within {} s", PATIENCE.as_secs());
            self.drive(now_us(), |_| Ok(()))?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// One turn of everybody. `making`: new frames are proposed.
    ///
    /// # Errors
    /// A replica fails, or a frame is not what was proposed in its place.
    pub fn turn(&mut self, device: &mut NetDevice, making: bool) -> Result<()> {
        let now = now_us();
        if making {
            self.propose_frames(now)?;
        }
        // In between as well: the others' turns would not keep a leader from its guest if they had CPUs of their own.
        self.drive(now, |group| group.deliver(device))?;
        self.synchronise(now)
    }

    /// The three replicas in turn, and the secondary's walk; `between` after each.
    fn drive(&mut self, now: u64, mut between: impl FnMut(&mut Group) -> Result<()>) -> Result<()> {
        self.members[SECONDARY].turn(now)?;
        self.walk(now)?;
        between(self)?;
        self.members[WITNESS].turn(now)?;
        // It has no guest.
        self.members[WITNESS].committed.clear();
        between(self)?;
        self.members[LEADER].turn(now)?;
        between(self)
    }

    fn propose_frames(&mut self, now: u64) -> Result<()> {
        let Member { arena, .. } = &mut self.members[LEADER];
        let has_room = arena.has_room(MIN_BATCH_BYTES);
        let replica = self.members[LEADER].replica();
        let in_flight = replica.last_index().0 - replica.commit_index().0;
        if in_flight >= PROPOSALS_IN_FLIGHT
            || self.backlog_bytes >= BACKLOG_BYTES
            || replica.second_lags(now)
            || !has_room
        {
            return Ok(());
        }
        let Some(room) = self.members[LEADER].arena.room(MIN_BATCH_BYTES, BATCH_BYTES) else { return Ok(()) };
        let mut batch = BatchBuilder::within(room);
        while batch.len() < BATCH_FRAMES
            && let Some(spare) = batch.spare(self.frame.len())
        {
            spare.copy_from_slice(&self.frame);
            spare[NUMBER_AT..][..8].copy_from_slice(&self.made.to_be_bytes());
            batch.commit(self.frame.len())?;
            self.made += 1;
        }
        let bytes = batch.seal();
        self.since_sync_bytes += bytes;
        let payload = shared(self.members[LEADER].arena.freeze(bytes));
        self.backlog_bytes += bytes;
        self.members[LEADER].propose(now, Entry::Input(payload))?;
        Ok(())
    }

    /// A syncvm's place in the log, now and then, and the truncation behind it once the secondary has reached it. What a syncvm
    /// transfers is not part of this.
    fn synchronise(&mut self, now: u64) -> Result<()> {
        let leader = &mut self.members[LEADER];
        match self.sync {
            None if self.since_sync_bytes >= SYNC_EVERY_BYTES => {
                self.since_sync_bytes = 0;
                self.sync = Some(leader.propose(now, Entry::SyncVm { with: SECOND })?);
            }
            Some(index) if self.secondary_at >= index && leader.replica().commit_index() >= index => {
                self.sync = None;
                leader.step(now, Event::Truncate(index))?;
            }
            _ => {}
        }
        Ok(())
    }

    /// The secondary looks at each frame in place of a guest, and says how far it is.
    fn walk(&mut self, now: u64) -> Result<()> {
        let secondary = &mut self.members[SECONDARY];
        let before = self.secondary_at;
        while let Some((index, entry)) = secondary.committed.pop_front() {
            if let Entry::Input(payload) = &entry {
                for frame in batch::frames(payload)? {
                    ensure!(
                        frame.len() == self.frame.len() && number(frame) == self.walked,
                        "the secondary's frame {} is another one: {frame:02x?}",
                        self.walked
                    );
                    self.walked += 1;
                }
            }
            self.secondary_at = index;
        }
        if self.secondary_at > before {
            secondary.step(now, Event::Consumed(self.secondary_at))?;
        }
        Ok(())
    }

    /// Committed frames go to the guest, as many as it takes; what it does not take waits.
    fn deliver(&mut self, device: &mut NetDevice) -> Result<()> {
        let mut left = DELIVER_FRAMES;
        while left > 0
            && let Some((_, entry)) = self.members[LEADER].committed.front()
        {
            let payload = entry.payload();
            if let Entry::Input(_) = entry {
                if self.waiting.is_empty() {
                    // Once per batch: a guest that takes it in ten steps must not cost ten walks through it.
                    let start = |frame: &[u8]| frame.as_ptr() as usize - payload.as_ptr() as usize;
                    let ranges = batch::frames(payload)?.map(|frame| start(frame)..start(frame) + frame.len());
                    self.waiting.extend(ranges);
                    let first = self.waiting.front().map(|range| &payload[range.clone()]);
                    check(&self.frame, first, self.delivered)?;
                }
                let frames = self.waiting.iter().take(left).map(|range| &payload[range.clone()]);
                let (done, _) = device.inject_batch(frames);
                self.waiting.drain(..done);
                self.delivered += done as u64;
                left -= done;
                if !self.waiting.is_empty() {
                    return Ok(());
                }
            }
            self.backlog_bytes -= payload.len();
            self.members[LEADER].committed.pop_front();
        }
        Ok(())
    }

    /// After the last frame: whether every replica has what was proposed, and the guest nothing else.
    ///
    /// # Errors
    /// They do not in time, or something is missing.
    pub fn finish(&mut self, device: &NetDevice) -> Result<()> {
        let last = self.members[LEADER].replica().last_index();
        self.turn_until("end", |group| {
            group.secondary_at >= last && group.members.iter().all(|member| member.stored() >= last)
        })?;
        ensure!(self.walked == self.made, "{} frames proposed, {} at the secondary", self.made, self.walked);
        let injected = device.counters().rx_frames;
        ensure!(injected == self.delivered, "{injected} frames injected, {} committed and delivered", self.delivered);
        ensure!(injected <= self.made, "{injected} frames injected, {} proposed", self.made);
        Ok(())
    }
}

/// A frame as `txonly` makes it, without its number.
fn frame(frame_bytes: usize) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER_BYTES];
    frame.resize(VNET_HEADER_BYTES + frame_bytes, 0x5a);
    frame[VNET_HEADER_BYTES..][..super::backend::MADE_BYTES].fill(0);
    frame[VNET_HEADER_BYTES..][..16].copy_from_slice(&super::backend::HEADERS);
    frame
}

fn number(frame: &[u8]) -> u64 {
    u64::from_be_bytes(*frame[NUMBER_AT..].first_chunk().expect("frames have headers"))
}

/// Whether the first frame of a batch is the one that was proposed in this place.
fn check(pattern: &[u8], frame: Option<&[u8]>, expected: u64) -> Result<()> {
    let frame = frame.context("a batch without frames")?;
    let (behind, same) = (NUMBER_AT + 8, |range: Range<usize>| frame[range.clone()] == pattern[range]);
    ensure!(
        frame.len() == pattern.len() && number(frame) == expected && same(0..NUMBER_AT) && same(behind..frame.len()),
        "frame {expected} is another one: {frame:02x?}"
    );
    Ok(())
}

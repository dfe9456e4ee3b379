//! A guest in a memfd that writes at random whenever it "runs", and a channel that breaks where it is told.

use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use syncvm::exchange::{
    Channel, ChannelError, ExchangeConfig, FollowerContext, Guest, GuestError, LeaderContext, Observer, Parts, Phase,
    SyncError, SyncReport, follow_syncvm, lead_syncvm,
};
use syncvm::hash::HashPool;
use syncvm::rejoin::RejoinProgress;
use syncvm::transfer::Kind;
use syncvm::{DirtySet, GuestRam, PAGE_BYTES, PageNumber, Pairing};

pub const PAGES: usize = 96;

/// SplitMix64.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

pub fn new_ram(pages: usize) -> GuestRam {
    let fd = memfd_create("plover-fake-guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, (pages * PAGE_BYTES) as u64).unwrap();
    GuestRam::new(fd, None).unwrap()
}

pub fn snapshot(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; ram.pages() * PAGE_BYTES];
    for (page, into) in bytes.chunks_exact_mut(PAGE_BYTES).enumerate() {
        ram.read_page(PageNumber(page as u32), into);
    }
    bytes
}

/// What the fake refuses to do, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Stop,
    Harvest,
    Save,
    Load,
    Resume,
}

pub struct FakeGuest {
    /// A device state part of its own that a load would leave; a reset takes it away.
    pub leftover: Option<String>,
    /// A page that saving the device state writes, as QEMU's may.
    pub save_writes: Option<PageNumber>,
    pub ram: GuestRam,
    pub dirty: Arc<Mutex<DirtySet>>,
    pub device: Vec<u8>,
    pub running: bool,
    pub rng: Rng,
    pub writes_per_run: usize,
    pub refuse: Option<Refusal>,
    /// RAM and device state when it was stopped last, loaded last, and just before it ran again last.
    pub at_stop: (Vec<u8>, Vec<u8>),
    pub at_load: Option<(Vec<u8>, Vec<u8>)>,
    /// Pages that it was told of since it stopped, if it was; and how often it was.
    pub announced: Option<Vec<PageNumber>>,
    pub announcements: usize,
    pub at_resume: (Vec<u8>, Vec<u8>),
    pub needs_stop: bool,
    /// Harvests are of no use in the background.
    pub tells_nothing: bool,
    pub drop_every: Option<usize>,
    pub corrupt_load: bool,
    /// After this many more runs the guest calms down to one write per run.
    pub calm_after_runs: Option<usize>,
    /// While it runs again, a thread writes all the time.
    pub races: bool,
    pub racer: Option<Racer>,
}

/// Writes pages until it is dropped.
pub struct Racer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Racer {
    fn start(ram: GuestRam, dirty: Arc<Mutex<DirtySet>>, mut rng: Rng) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Half of the writes go to a few pages. The page first, its bit after.
                let pages = if rng.below(2) == 0 { 16 } else { ram.pages() };
                let page = PageNumber(rng.below(pages) as u32);
                ram.write_page(page, &[rng.next() as u8; PAGE_BYTES]);
                dirty.lock().unwrap().insert(page);
                std::thread::yield_now();
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl FakeGuest {
    pub fn new(seed: u64, pages: usize) -> Self {
        let mut guest = Self {
            leftover: None,
            save_writes: None,
            ram: new_ram(pages),
            dirty: Arc::new(Mutex::new(DirtySet::new(pages))),
            device: vec![seed as u8; 3000],
            running: true,
            rng: Rng(seed),
            writes_per_run: 12,
            refuse: None,
            at_stop: Default::default(),
            at_load: None,
            announced: None,
            announcements: 0,
            at_resume: Default::default(),
            needs_stop: false,
            tells_nothing: false,
            drop_every: None,
            corrupt_load: false,
            calm_after_runs: None,
            races: false,
            racer: None,
        };
        guest.run_a_while();
        guest
    }

    pub fn state(&self) -> (Vec<u8>, Vec<u8>) {
        (snapshot(&self.ram), self.device.clone())
    }

    /// What a guest does with its time: whole pages, single bytes, zeroed pages, device registers.
    pub fn run_a_while(&mut self) {
        for _ in 0..self.writes_per_run {
            let page = PageNumber(self.rng.below(self.ram.pages()) as u32);
            let mut bytes = vec![0; PAGE_BYTES];
            match self.rng.below(4) {
                0 => {}
                1 => bytes.fill(self.rng.next() as u8),
                // The same on both sides: dirty, but not divergent.
                2 => bytes.fill(page.0 as u8),
                _ => {
                    self.ram.read_page(page, &mut bytes);
                    let at = self.rng.below(PAGE_BYTES);
                    bytes[at] = self.rng.next() as u8;
                }
            }
            self.ram.write_page(page, &bytes);
            self.dirty.lock().unwrap().insert(page);
        }
        let at = self.rng.below(self.device.len());
        self.device[at] = self.rng.next() as u8;
    }

    fn refused(&mut self, what: Refusal) -> Result<(), GuestError> {
        if self.refuse == Some(what) {
            self.refuse = None;
            return Err(GuestError::new("obey", format!("{what:?} refused by the test")));
        }
        Ok(())
    }
}

impl Guest for FakeGuest {
    fn stop(&mut self) -> Result<(), GuestError> {
        self.refused(Refusal::Stop)?;
        // It writes to the last, also where the scheduler starves its racer.
        if self.racer.take().is_some() {
            self.run_a_while();
        }
        self.running = false;
        self.announced = None;
        self.at_stop = self.state();
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.refused(Refusal::Resume)?;
        self.at_resume = self.state();
        self.running = true;
        match &mut self.calm_after_runs {
            Some(0) => self.writes_per_run = 1,
            Some(left) => *left -= 1,
            None => {}
        }
        self.run_a_while();
        if self.races {
            self.racer = Some(Racer::start(self.ram.clone(), Arc::clone(&self.dirty), self.rng.clone()));
        }
        Ok(())
    }
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let mut dirty = self.dirty.lock().unwrap();
        for (index, page) in dirty.iter().enumerate() {
            if self.drop_every.is_none_or(|n| index % n != 0) {
                into.insert(page);
            }
        }
        dirty.clear();
        drop(dirty);
        if self.refuse == Some(Refusal::Harvest) {
            // The nastiest way to fail: the bits are gone, the pages were not reported.
            into.clear();
        }
        self.refused(Refusal::Harvest)
    }
    fn harvest_needs_stop(&self) -> bool {
        self.needs_stop
    }
    fn harvest_tells_pages_apart(&self) -> bool {
        !self.tells_nothing
    }
    fn loads_have_leftovers(&self) -> bool {
        self.leftover.is_some() || self.save_writes.is_some()
    }
    fn leftovers(&self, _present: &[u8], _incoming: &[u8]) -> Vec<String> {
        self.leftover.iter().cloned().collect()
    }
    fn reset_devices(&mut self) -> Result<(), GuestError> {
        assert!(!self.running, "reset while running");
        self.leftover = None;
        Ok(())
    }
    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        assert!(!self.running, "saved while running");
        self.refused(Refusal::Save)?;
        if let Some(page) = self.save_writes {
            self.ram.write_page(page, &[self.rng.next() as u8 | 1; PAGE_BYTES]);
            self.dirty.lock().unwrap().insert(page);
        }
        Ok(self.device.clone())
    }
    fn announce_written(&mut self, pages: &mut dyn Iterator<Item = PageNumber>) {
        assert!(!self.running, "written while running");
        self.announced = Some(pages.collect());
        self.announcements += 1;
    }
    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        assert!(!self.running, "loaded while running");
        self.refused(Refusal::Load)?;
        if let Some(announced) = self.announced.take() {
            let (before, now) = (&self.at_stop.0, self.state().0);
            let pages = before.chunks(PAGE_BYTES).zip(now.chunks(PAGE_BYTES)).enumerate();
            for (page, _) in pages.filter(|(_, (before, now))| before != now) {
                let page = PageNumber(page as u32);
                assert!(
                    announced.contains(&page) || self.save_writes == Some(page),
                    "{page:?} was written and not said"
                );
            }
        }
        self.device = state.to_vec();
        self.device[7] ^= u8::from(self.corrupt_load);
        self.at_load = Some(self.state());
        Ok(())
    }
    fn ram(&self) -> &GuestRam {
        &self.ram
    }
}

/// How the channel breaks at a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// The sender sees an error, nothing arrives.
    Refused,
    /// The sender sees success, nothing arrives.
    Lost,
    /// The sender sees an error, but it arrived.
    Uncertain,
}

pub struct Fault {
    pub at_message: usize,
    pub how: Break,
}

/// Changes a whole message of a kind before it is sent.
pub type Mangle = Box<dyn FnMut(Kind, &mut Vec<u8>) + Send>;

pub struct MemoryChannel {
    pub mangle: Option<Mangle>,
    to_peer: Option<Sender<(u16, Vec<u8>)>>,
    from_peer: Receiver<(u16, Vec<u8>)>,
    sent: Arc<AtomicUsize>,
    fault: Option<Arc<Fault>>,
}

/// Both ends of a channel; messages of both directions count towards the fault.
pub fn channel_pair(fault: Option<Fault>) -> (MemoryChannel, MemoryChannel) {
    let (a_out, b_in) = channel();
    let (b_out, a_in) = channel();
    let sent = Arc::new(AtomicUsize::new(0));
    let fault = fault.map(Arc::new);
    let end = |to_peer, from_peer| MemoryChannel {
        mangle: None,
        to_peer: Some(to_peer),
        from_peer,
        sent: Arc::clone(&sent),
        fault: fault.clone(),
    };
    (end(a_out, a_in), end(b_out, b_in))
}

impl MemoryChannel {
    fn deliver(&mut self, kind: u16, message: Vec<u8>) -> Result<(), ChannelError> {
        let to_peer = self.to_peer.as_ref().ok_or(ChannelError::Closed)?;
        to_peer.send((kind, message)).map_err(|_| ChannelError::Closed)
    }
}

impl Channel for MemoryChannel {
    fn send(&mut self, kind: u16, parts: &[IoSlice<'_>], _: Instant) -> Result<(), ChannelError> {
        let mut message: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        if let Some(mangle) = &mut self.mangle {
            mangle(Kind::from_code(kind).unwrap(), &mut message);
        }
        assert!(message.len() <= syncvm::transfer::MAX_MESSAGE_BYTES);
        let number = self.sent.fetch_add(1, Ordering::SeqCst);
        let Some(fault) = self.fault.as_ref().filter(|fault| number >= fault.at_message) else {
            return self.deliver(kind, message);
        };
        let how = fault.how;
        if number == fault.at_message && how == Break::Uncertain {
            self.deliver(kind, message)?;
        }
        self.to_peer = None;
        match how {
            Break::Lost => Ok(()),
            Break::Refused | Break::Uncertain => Err(ChannelError::Closed),
        }
    }

    fn recv(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<u16, ChannelError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        match self.from_peer.recv_timeout(patience) {
            Ok((kind, message)) => {
                *buf = message;
                Ok(kind)
            }
            Err(RecvTimeoutError::Timeout) => Err(ChannelError::Timeout),
            Err(RecvTimeoutError::Disconnected) => {
                // As with TCP, a channel that is dead one way is soon dead the other way.
                self.to_peer = None;
                Err(ChannelError::Closed)
            }
        }
    }
}

#[derive(Default)]
pub struct Watcher {
    pub may_not_run: bool,
    pub acknowledged: usize,
    pub applied: usize,
    pub resumed: usize,
    pub seen: Vec<Phase>,
    pub die_at: Option<Phase>,
    pub progress: Vec<RejoinProgress>,
}

impl Observer for Watcher {
    fn crash_point(&mut self, phase: Phase) {
        self.seen.push(phase);
        if self.die_at == Some(phase) {
            // Unwinds the thread and drops its end of the channel: the process is gone.
            std::panic::resume_unwind(Box::new("crash point"));
        }
    }
    fn may_run(&mut self) -> bool {
        !self.may_not_run
    }
    fn progress(&mut self, progress: RejoinProgress) {
        self.progress.push(progress);
    }
    fn resumed(&mut self) {
        self.resumed += 1;
    }
    fn acknowledged(&mut self) {
        self.acknowledged += 1;
    }
    fn applied(&mut self) {
        self.applied += 1;
    }
}

pub type Leader = LeaderContext<FakeGuest, MemoryChannel, Watcher>;
pub type Follower = FollowerContext<FakeGuest, MemoryChannel, Watcher>;

pub fn config() -> ExchangeConfig {
    ExchangeConfig { silence_timeout: Duration::from_secs(2), ..ExchangeConfig::new(77) }
}

pub fn parts(guest: FakeGuest, channel: MemoryChannel) -> Parts<FakeGuest, MemoryChannel, Watcher> {
    Parts { guest, channel, observer: Watcher::default(), config: config(), view: 3, pool: Arc::new(HashPool::new(0)) }
}

/// A leader with a fresh pairing and a follower that is worth nothing, both with random memory.
pub fn pair(seed: u64, pages: usize) -> (Leader, Follower) {
    let (a, b) = channel_pair(None);
    let leader = LeaderContext::new(parts(FakeGuest::new(seed, pages), a), Pairing::fresh(pages));
    let follower = FollowerContext::new(parts(FakeGuest::new(seed ^ 0xffff, pages), b));
    (leader, follower)
}

/// One syncvm in which the messages of the leader and of the follower are changed on their way.
pub fn mangled_sync(
    leader: &mut Leader,
    follower: &mut Follower,
    number: u64,
    of_leader: Option<Mangle>,
    of_follower: Option<Mangle>,
) -> Outcome {
    let (mut a, mut b) = channel_pair(None);
    (a.mangle, b.mangle) = (of_leader, of_follower);
    leader.replace_channel(a);
    follower.replace_channel(b);
    sync_on_present_channel(leader, follower, number)
}

/// After a syncvm that may have failed anywhere: nobody hangs or stands still, the follower's guest is exactly
/// its own or exactly the leader's, and an acknowledgement means the latter.
pub fn check_after_fault(leader: &Leader, follower: &Follower, outcome: &Outcome, applied_before: usize) -> bool {
    assert!(leader.guest.running, "the leader's guest runs after {:?}", outcome.0);
    assert!(follower.guest.running, "the follower's guest runs after {:?}", outcome.1);
    let applied = follower.observer.applied > applied_before;
    if applied {
        assert!(follower.guest.at_resume == leader.guest.at_stop, "whole and the leader's");
    } else {
        assert!(follower.guest.at_resume == follower.guest.at_stop, "untouched");
    }
    assert!(outcome.0.is_err() || applied, "acknowledged means applied");
    applied
}

pub type Outcome = (Result<SyncReport, SyncError>, Result<SyncReport, SyncError>);

/// One syncvm over a new channel with this fault.
pub fn sync(leader: &mut Leader, follower: &mut Follower, number: u64, fault: Option<Fault>) -> Outcome {
    let (a, b) = channel_pair(fault);
    leader.replace_channel(a);
    follower.replace_channel(b);
    sync_on_present_channel(leader, follower, number)
}

pub fn sync_on_present_channel(leader: &mut Leader, follower: &mut Follower, number: u64) -> Outcome {
    // A guest that is not even stopped is as it ran last.
    follower.guest.at_stop = follower.guest.at_resume.clone();
    std::thread::scope(|scope| {
        let following = scope.spawn(|| follow_syncvm(follower, number));
        let led = lead_syncvm(leader, number);
        (led, following.join().unwrap())
    })
}

/// A syncvm that must succeed and make the follower what the leader was.
pub fn good_sync(leader: &mut Leader, follower: &mut Follower, number: u64) -> (SyncReport, SyncReport) {
    follower.guest.at_load = None;
    let (led, followed) = sync(leader, follower, number, None);
    let (led, followed) = (led.unwrap(), followed.unwrap());
    assert!(leader.guest.running && follower.guest.running);
    let loaded = follower.guest.at_load.as_ref().expect("loaded");
    assert!(*loaded == leader.guest.at_stop, "equal byte by byte at the sync point");
    assert!(follower.guest.at_resume == leader.guest.at_stop);
    (led, followed)
}

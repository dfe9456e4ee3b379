//! The worker's thread: attaches to QEMU, carries out commands, takes part in rejoins that a leader begins.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use consensus::{Index, ReplicaId, View};
use dataplane::fabric::PeerId;
use dataplane::fabric::bulk::BulkLink;
use dataplane::fabric::{BulkPort, IncomingBulk};
use dataplane::wait::{Interest, Poller};
use syncvm::exchange::{
    ExchangeConfig, FollowerContext, Guest, LeaderContext, Parts, Standing as GuestStanding, SyncError, follow_syncvm,
    lead_syncvm,
};
use syncvm::hash::{HashKind, HashPool};
use syncvm::pairing::Pairing;
use syncvm::rejoin::{RejoinPolicy, follow_rejoin, lead_rejoin};
use syncvm::transfer::TransferMode;

use super::attach::{QemuGuest, QemuNews, Sockets};
use super::link::BulkChannel;
use super::observer::WorkerObserver;
use super::{Command, CrashPoints, Report, Worker, WorkerPort, queues};
use crate::config::{self, Scheduling, SyncPolicy, VmConfig};
use crate::device::BackendDirty;
use crate::group::scheduling;

const TOKEN_COMMANDS: u64 = 0;
const TOKEN_BULK: u64 = 1;
const TOKEN_QEMU: u64 = 2;

/// How often a QEMU is looked for.
const ATTACH_INTERVAL: Duration = Duration::from_millis(200);
/// How often an attached one is asked whether it lives, if nothing else is asked of it; its end is also seen at once from
/// the closed connection.
const IDLE_WAIT_US: u64 = 1_000_000;
const PING_INTERVAL: Duration = Duration::from_micros(IDLE_WAIT_US);
/// How long opening a bulk connection may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a wait for the leader's connection looks at the view.
const LINK_WAIT_SLICE: Duration = Duration::from_millis(20);
/// How long a whole rejoin may take.
const REJOIN_TIMEOUT: Duration = Duration::from_secs(600);
/// What is said of a QEMU that is there and does nothing.
const SILENT_QEMU: &str = "QEMU does not answer its monitor any more: it is frozen (`kill -CONT` or thaw it) or stuck; it is attached again when it does";
/// Pages left when the rounds of a rejoin end.
const REJOIN_TARGET_PAGES: usize = 1024;

/// What a worker needs.
pub struct WorkerSetup {
    /// The VM.
    pub vm: VmConfig,
    /// This node's name.
    pub node: String,
    /// This replica.
    pub me: ReplicaId,
    /// The VM's sockets and state files.
    pub run_dir: PathBuf,
    /// Hash threads: the core of each, if it has one of its own.
    pub hash_cores: Vec<Option<usize>>,
    /// Whether the thread may go before others.
    pub scheduling: Scheduling,
    /// Bulk connections.
    pub bulk: BulkPort,
    /// The device's own writes into guest memory.
    pub dirty: BackendDirty,
    /// For tests.
    pub crash_points: Arc<CrashPoints>,
}

type Leader = LeaderContext<QemuGuest, BulkChannel, WorkerObserver>;
type Follower = FollowerContext<QemuGuest, BulkChannel, WorkerObserver>;

/// What the attached guest is part of.
enum Side {
    /// No QEMU.
    Detached,
    /// A QEMU, and no exchange so far.
    Alone(Box<QemuGuest>),
    /// It leads exchanges with this peer.
    Leading(Box<Leader>, ReplicaId),
    /// It follows.
    Following(Box<Follower>),
}

struct Serve {
    setup: WorkerSetup,
    port: Arc<WorkerPort>,
    sockets: Sockets,
    pool: Arc<HashPool>,
    poller: Poller,
    side: Side,
    next_attach: Instant,
    next_ping: Instant,
    last_problem: String,
}

/// Starts the thread.
///
/// # Errors
/// When descriptors or threads are used up.
pub fn start(setup: WorkerSetup) -> std::io::Result<Worker> {
    let (mut worker, port) = queues(setup.crash_points.clone())?;
    let poller = Poller::new()?;
    poller.add(&*port.command_event, TOKEN_COMMANDS, Interest::Read)?;
    poller.add(&setup.bulk, TOKEN_BULK, Interest::ReadEdge)?;
    let name = format!("plover-guest-{}", setup.vm.name);
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        scheduling::favour(setup.scheduling);
        let mut serve = Serve {
            sockets: Sockets::of(&setup.vm, &setup.run_dir),
            pool: Arc::new(HashPool::on_cores(&setup.hash_cores)),
            port: Arc::new(port),
            poller,
            side: Side::Detached,
            next_attach: Instant::now(),
            next_ping: Instant::now(),
            last_problem: String::new(),
            setup,
        };
        serve.run();
    })?;
    worker.thread = Some(thread);
    Ok(worker)
}

impl Serve {
    fn run(&mut self) {
        let mut ready = Vec::new();
        loop {
            let timeout_us = match self.side {
                Side::Detached => ATTACH_INTERVAL.as_micros() as u64,
                _ => IDLE_WAIT_US,
            };
            if let Err(error) = self.poller.wait(Some(timeout_us), &mut ready) {
                tracing::error!(%error, "the guest worker cannot wait");
                return;
            }
            self.port.command_event.drain();
            while let Some(command) = self.port.next_command() {
                if command == Command::End {
                    return;
                }
                self.carry_out(command);
                self.next_ping = Instant::now() + PING_INTERVAL;
            }
            self.take_incoming();
            self.look_at_qemu();
            self.ping_qemu();
            if matches!(self.side, Side::Detached) && Instant::now() >= self.next_attach {
                self.try_attach();
            }
        }
    }

    fn guest(&mut self) -> Option<&mut QemuGuest> {
        match &mut self.side {
            Side::Detached => None,
            Side::Alone(guest) => Some(guest),
            Side::Leading(context, _) => Some(&mut context.guest),
            Side::Following(context) => Some(&mut context.guest),
        }
    }

    fn try_attach(&mut self) {
        self.next_attach = Instant::now() + ATTACH_INTERVAL;
        let attached = QemuGuest::attach(&self.sockets, &self.setup.vm, &self.setup.node, self.setup.dirty.clone());
        match attached {
            Ok((mut guest, found)) => {
                guest.use_pool(&self.pool);
                if let Err(error) = self.poller.add(guest.event_fd(), TOKEN_QEMU, Interest::Read) {
                    tracing::warn!(%error, "QEMU's events are only seen once a second");
                }
                self.port.crash_points.set_qemu(guest.pid);
                scheduling::favour_qemu(self.setup.scheduling, guest.pid);
                self.side = Side::Alone(Box::new(guest));
                self.last_problem.clear();
                self.port.report(Report::Attached {
                    fingerprint: found.fingerprint,
                    fresh: found.fresh,
                    follows: found.follows,
                    running: found.running,
                    clocks: found.clocks,
                    tracker: found.tracker,
                });
            }
            Err(reason) => {
                if reason != self.last_problem {
                    self.last_problem.clone_from(&reason);
                    self.port.report(Report::Lost { reason, powered_off: false });
                }
            }
        }
    }

    /// Notices a QEMU that is gone or whose guest switched itself off.
    fn look_at_qemu(&mut self) {
        let Some(guest) = self.guest() else { return };
        let (reason, powered_off) = match guest.news() {
            QemuNews::Nothing => return,
            QemuNews::PoweredOff => ("the guest has switched itself off".to_owned(), true),
            QemuNews::Gone(reason) => (reason, false),
        };
        self.lose_qemu(reason, powered_off);
    }

    /// Whether another replica leads. Only then may a QEMU be given up that says nothing: the group has the guest all the
    /// same, while a leader that gave up its own might lose the last one.
    fn follows(&self) -> bool {
        let leader = self.port.standing.leader.load(Ordering::Acquire);
        leader != 0 && leader != u64::from(self.setup.me.0) + 1
    }

    /// A secondary whose QEMU is frozen protects nobody.
    fn ping_qemu(&mut self) {
        if Instant::now() < self.next_ping || !matches!(self.side, Side::Following(_)) || !self.follows() {
            return;
        }
        if self.guest().is_some_and(QemuGuest::is_silent) {
            self.lose_qemu(SILENT_QEMU.to_owned(), false);
        }
        self.next_ping = Instant::now() + PING_INTERVAL;
    }

    /// After a failed exchange: the leader need not find out by itself, try after try, that QEMU is stuck here. One that is
    /// slow answers now.
    fn give_up_stuck_qemu(&mut self) {
        if self.follows() && self.guest().is_some_and(QemuGuest::is_stuck) {
            self.lose_qemu(SILENT_QEMU.to_owned(), false);
        }
    }

    fn lose_qemu(&mut self, reason: String, powered_off: bool) {
        self.drop_link();
        // Closing its connection takes it out of the poller as well.
        self.side = Side::Detached;
        // Not at once: one that is ending still takes a connection, and closes it.
        self.next_attach = Instant::now() + ATTACH_INTERVAL;
        self.last_problem.clone_from(&reason);
        self.port.report(Report::Lost { reason, powered_off });
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::RunFresh => {
                self.run_guest();
                self.note_leading();
            }
            Command::Resume => self.run_guest(),
            Command::Leads => self.note_leading(),
            Command::Halt => self.halt(),
            Command::Lead { number, view, peer, last, idle } => self.lead(number, view, peer, last, idle),
            Command::LeadRejoin { view, peer, number } => self.lead_rejoin(view, peer, number),
            Command::Follow { number, view, idle } => self.follow(number, view, idle),
            Command::End => {}
        }
    }

    fn run_guest(&mut self) {
        if !self.port.standing.may_run.load(Ordering::Acquire) {
            return;
        }
        let Some(guest) = self.guest() else { return };
        match guest.resume() {
            Ok(()) => self.port.report(Report::Running),
            Err(error) => {
                // Perhaps because it has just switched itself off: then nobody shall take over, so that is said instead.
                self.look_at_qemu();
                if !matches!(self.side, Side::Detached) {
                    self.port.report(Report::NotRunning { reason: error.to_string() });
                }
            }
        }
    }

    /// From here on a daemon that is started next may go on with the guest, if it is whole.
    fn note_leading(&mut self) {
        if matches!(&self.side, Side::Following(context) if context.standing() != GuestStanding::Whole) {
            return;
        }
        if let Some(guest) = self.guest()
            && let Err(error) = guest.note_following(false)
        {
            tracing::error!(%error, "the guest is lost if this daemon ends while it serves alone");
        }
    }

    /// Stops the guest and forgets what is known about it: its next use begins with a rejoin.
    fn halt(&mut self) {
        if matches!(&self.side, Side::Following(context) if context.standing() == GuestStanding::Joining) {
            // Rounds of a rejoin came first: it stands still already, and what it was given is worth keeping.
            return self.port.report(Report::Halted);
        }
        self.drop_link();
        if let Some(mut guest) = self.take_guest() {
            match guest.stop() {
                Ok(()) => self.port.report(Report::Halted),
                Err(error) => tracing::error!(%error, "the guest does not stop"),
            }
            if let Err(error) = guest.note_following(true) {
                tracing::error!(%error, "the guest may be taken for one that may lead");
            }
            self.side = Side::Alone(Box::new(guest));
        }
    }

    /// Takes the guest out of whatever it is part of.
    fn take_guest(&mut self) -> Option<QemuGuest> {
        match std::mem::replace(&mut self.side, Side::Detached) {
            Side::Detached => None,
            Side::Alone(guest) => Some(*guest),
            Side::Leading(context, _) => Some(context.into_parts().0),
            Side::Following(context) => Some(context.into_parts().0),
        }
    }

    fn drop_link(&mut self) {
        *self.port.standing.link.lock().expect("no holder of this lock panics") = None;
        match &mut self.side {
            Side::Leading(context, _) => context.replace_channel(BulkChannel(None)),
            Side::Following(context) => context.replace_channel(BulkChannel(None)),
            Side::Detached | Side::Alone(_) => {}
        }
    }

    /// Makes the connection known to the reactor, which may cut it.
    fn adopt_link(&self, link: BulkLink) -> BulkChannel {
        *self.port.standing.link.lock().expect("no holder of this lock panics") =
            Some((link.cancel_handle(), link.progress()));
        BulkChannel(Some(link))
    }

    fn has_link(&self) -> bool {
        self.port.standing.link.lock().expect("no holder of this lock panics").is_some()
    }

    fn parts(&self, guest: QemuGuest, view: View) -> Parts<QemuGuest, BulkChannel, WorkerObserver> {
        let policy = &self.setup.vm.policy;
        Parts {
            guest,
            channel: BulkChannel(None),
            observer: WorkerObserver::new(self.port.clone()),
            config: ExchangeConfig {
                silence_timeout: Duration::from_millis(policy.sync_timeout_ms),
                total_timeout: Duration::from_millis(policy.sync_timeout_ms * 10),
                hash: match policy.hash {
                    config::HashKind::City128 => HashKind::City128,
                    config::HashKind::Xxh3 => HashKind::Xxh3_128,
                },
                early_resume: policy.early_resume,
                background_hashing: policy.background_hashing,
                transfer: match policy.sync {
                    SyncPolicy::Vsmr | SyncPolicy::Str if policy.delta => TransferMode::Delta,
                    SyncPolicy::Vsmr | SyncPolicy::Str => TransferMode::Pages,
                    SyncPolicy::Mc => TransferMode::All,
                },
                verify: policy.verify,
                ..ExchangeConfig::new(group_hash(&self.setup.vm.name))
            },
            view: view.0,
            pool: self.pool.clone(),
        }
    }

    /// The leader's context towards `peer` with a standing connection. A context towards somebody else is dropped:
    /// nothing is known about a new peer.
    fn leader_towards(&mut self, peer: ReplicaId, view: View, number: u64) -> Result<&mut Leader, String> {
        let same = matches!(&self.side, Side::Leading(_, present) if *present == peer);
        if !same {
            self.drop_link();
            let guest = self.take_guest().ok_or("no QEMU is attached")?;
            let pairing = Pairing::fresh(guest.ram().pages());
            let context = LeaderContext::new(self.parts(guest, view), pairing);
            self.side = Side::Leading(Box::new(context), peer);
        }
        let channel = if self.has_link() && number != 0 {
            None
        } else {
            let deadline = Instant::now() + DIAL_TIMEOUT;
            let link = self.setup.bulk.dial(PeerId(peer.0), view.0, number, deadline);
            Some(self.adopt_link(link.map_err(|error| error.to_string())?))
        };
        if self.port.standing.view.load(Ordering::Acquire) != view.0 {
            // Nobody could cut a connection that did not exist yet.
            self.drop_link();
            return Err("the view has changed".into());
        }
        let Side::Leading(context, _) = &mut self.side else { unreachable!("just made") };
        if let Some(channel) = channel {
            context.replace_channel(channel);
        }
        context.view = view.0;
        Ok(context)
    }

    fn lead(&mut self, number: Index, view: View, peer: ReplicaId, last: bool, idle: bool) {
        let early_resume = self.setup.vm.policy.early_resume && !last;
        let result = match self.leader_towards(peer, view, number.0) {
            Ok(context) => {
                context.config.early_resume = early_resume;
                context.idle = idle;
                context.observer.begin(number, view, last);
                lead_syncvm(context, number.0).map_err(|error| {
                    let diverged = matches!(error, SyncError::Diverged { .. });
                    (describe(&error), diverged, error.peer_was_silent())
                })
            }
            Err(error) => Err((error, false, false)),
        };
        match result {
            Ok(report) => {
                let stands = !report.resumed && !last;
                self.port.report(Report::Led(report));
                if stands {
                    self.run_guest();
                }
            }
            Err((error, diverged, silent)) => {
                self.drop_link();
                // It runs already unless resuming failed or the last syncvm before a hand-over did.
                self.run_guest();
                self.port.report(Report::LeadFailed { number, error, diverged, silent });
            }
        }
    }

    fn rejoin_policy(&self) -> RejoinPolicy {
        let policy = RejoinPolicy {
            target_pages: REJOIN_TARGET_PAGES,
            mib_per_s: self.setup.vm.policy.rejoin_mib_per_s,
            ..RejoinPolicy::default()
        };
        // Rounds after the first may carry as much again.
        let capped = 2 * policy.time_for(self.setup.vm.memory_mib << 20);
        RejoinPolicy { give_up_after: REJOIN_TIMEOUT + capped, ..policy }
    }

    fn rejoin_over(&self) {
        *self.port.standing.rejoin.lock().expect("no holder of this lock panics") = None;
    }

    fn lead_rejoin(&mut self, view: View, peer: ReplicaId, number: Index) {
        let policy = self.rejoin_policy();
        self.drop_link();
        let result = self.leader_towards(peer, view, 0).and_then(|context| {
            context.observer.begin(number, view, false);
            lead_rejoin(context, number.0, &policy).map_err(|error| describe(&error))
        });
        self.rejoin_over();
        match result {
            Ok(report) => {
                let summary = format!(
                    "{} rounds, {} pages compared, {} sent, {} left, {} bytes, {} ms",
                    report.rounds,
                    report.compared_pages,
                    report.sent_pages,
                    report.left_pages,
                    report.bytes_sent + report.bytes_received,
                    report.total_us / 1000
                );
                self.port.report(Report::RejoinReady { peer, summary });
            }
            Err(error) => {
                self.drop_link();
                self.port.report(Report::RejoinFailed { peer, error });
            }
        }
    }

    /// The follower's context; a guest that led before is worth nothing to another leader.
    fn follower(&mut self, view: View) -> Option<&mut Follower> {
        if !matches!(self.side, Side::Following(_)) {
            let mut guest = self.take_guest()?;
            // A daemon that is started next must not take what it finds for a guest that waits to be booted.
            if let Err(error) = guest.mark_used() {
                tracing::error!(%error, "the guest cannot follow");
                self.side = Side::Alone(Box::new(guest));
                return None;
            }
            let context = FollowerContext::new(self.parts(guest, view));
            self.side = Side::Following(Box::new(context));
        }
        let Side::Following(context) = &mut self.side else { return None };
        if let Err(error) = context.guest.note_following(true) {
            tracing::error!(%error, "the guest cannot follow");
            return None;
        }
        context.view = view.0;
        Some(context)
    }

    fn follow(&mut self, number: Index, view: View, idle: bool) {
        // A connection that waits is newer than the one in use, which the leader has then given up.
        self.take_incoming();
        if !self.has_link() {
            self.await_link(number, view);
        }
        let result = match self.follower(view) {
            None => Err(("there is no QEMU that can follow".to_owned(), false, false)),
            Some(context) => {
                context.observer.begin(number, view, false);
                context.idle = idle;
                context.guest.hurry(true);
                let followed = follow_syncvm(context, number.0);
                context.guest.hurry(false);
                followed.map_err(|error| {
                    // Its first message is kept: the connection belongs to the exchange that comes next.
                    let next = matches!(error, SyncError::Superseded { .. });
                    let whole = context.standing() == GuestStanding::Whole && !error.needs_rejoin();
                    (describe(&error), whole, next)
                })
            }
        };
        match result {
            Ok(report) => {
                let stands = !report.resumed;
                self.port.report(Report::Followed(report));
                if stands {
                    self.run_guest();
                }
            }
            Err((error, whole, next)) => {
                if !next {
                    self.drop_link();
                }
                self.give_up_stuck_qemu();
                if whole {
                    self.run_guest();
                }
                self.port.report(Report::FollowFailed { number, error, whole });
            }
        }
    }

    /// The leader opens the connection; it may come a moment after the `SyncVm`.
    fn await_link(&mut self, number: Index, view: View) {
        let deadline = Instant::now() + DIAL_TIMEOUT;
        // In slices: a new view ends the wait, since its leader must not wait for the old one.
        while Instant::now() < deadline && self.port.standing.view.load(Ordering::Acquire) == view.0 {
            let Some(incoming) = self.setup.bulk.wait(Instant::now() + LINK_WAIT_SLICE) else { continue };
            if incoming.view == view.0 && incoming.number == 0 {
                return self.accept(incoming);
            }
            if incoming.view == view.0 && incoming.number >= number.0 {
                let channel = self.adopt_link(incoming.link);
                if let Some(context) = self.follower(view) {
                    context.replace_channel(channel);
                }
                return;
            }
        }
    }

    fn take_incoming(&mut self) {
        while let Some(incoming) = self.setup.bulk.take() {
            let standing = &self.port.standing;
            let expected = incoming.view == standing.view.load(Ordering::Acquire)
                && u64::from(incoming.peer.0) + 1 == standing.leader.load(Ordering::Acquire);
            if expected {
                self.accept(incoming);
            } else {
                tracing::info!(
                    peer = incoming.peer.0,
                    view = incoming.view,
                    "a bulk connection of another view is refused"
                );
            }
        }
    }

    /// A leader of the present view opens a connection: for a rejoin (number 0), or to go on after a broken one.
    fn accept(&mut self, incoming: IncomingBulk) {
        let (view, rejoin) = (View(incoming.view), incoming.number == 0);
        let channel = self.adopt_link(incoming.link);
        if rejoin && let Some(guest) = self.guest() {
            // It will be overwritten: it must not run, and the reactor must not count on it, from here on.
            if let Err(error) = guest.stop() {
                tracing::error!(%error, "the guest does not stop for a rejoin");
                return self.drop_link();
            }
            self.port.report(Report::Joining);
        }
        let patience = self.rejoin_policy().give_up_after;
        let Some(context) = self.follower(view) else { return self.drop_link() };
        context.replace_channel(channel);
        if rejoin && let Err(error) = follow_rejoin(context, patience) {
            tracing::warn!(error = describe(&error), "the rejoin broke off");
            self.drop_link();
        }
        self.rejoin_over();
    }
}

/// An error with its causes, for people.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The group's number in syncvm's messages: FNV-1a of its name.
fn group_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

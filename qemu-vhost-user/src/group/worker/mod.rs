//! The guest worker: one thread per group that owns QMP, the agent, the dirty tracker and the bulk connection.
//!
//! Everything that blocks for milliseconds happens here (stop, harvest, hash, transfer, apply, cont), so that the reactor
//! stays responsive. The worker decides nothing: it carries out one [`Command`] at a time and says how it went in
//! [`Report`]s. What it may still do when the group's mind changes meanwhile is in [`Standing`], which the reactor writes.
//!
//! Rejected: syncvm inside the reactor as a state machine, because a comparison of megabytes between two polls would cost
//! heartbeats; and a thread per step, because the steps are sequential anyway.

mod attach;
mod crash;
mod link;
mod observer;
mod serve;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Mutex};

use consensus::{Index, ReplicaId, View};
use dataplane::fabric::bulk::BulkCancel;
use dataplane::mailbox::{self, mailbox};
use dataplane::wait::{Bell, EventFd};
use syncvm::exchange::SyncReport;
use syncvm::rejoin::RejoinProgress;

use crate::qemu::agent::VcpuClocks;
use crate::qemu::fingerprint::Fingerprint;
use crate::status::RejoinStatus;

pub use crash::{CrashAction, CrashPoints};
pub use serve::{WorkerSetup, start};

/// What the reactor wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Let the prepared guest run: this replica leads a group whose guest has never run.
    RunFresh,
    /// The guest leads from here on.
    Leads,
    /// Stop the guest: it is not part of the group any more.
    Halt,
    /// Let the guest run again that an aborted syncvm left stopped.
    Resume,
    /// syncvm as the leader, with `peer`.
    Lead {
        /// The log index of its entry.
        number: Index,
        /// The view in which it was proposed.
        view: View,
        /// The secondary, or the joiner at the end of its rejoin.
        peer: ReplicaId,
        /// The last syncvm before a planned hand-over: the guest stays stopped.
        last: bool,
        /// The guest is idle.
        idle: bool,
    },
    /// Bring `peer` near, in rounds, while the guest runs.
    LeadRejoin {
        /// The present view.
        view: View,
        /// The joiner.
        peer: ReplicaId,
        /// The last committed index: no exchange of this view has a higher number yet.
        number: Index,
    },
    /// syncvm as the secondary or as the joiner.
    Follow {
        /// The log index of its entry.
        number: Index,
        /// The view in which it was proposed.
        view: View,
        /// The guest is idle.
        idle: bool,
    },
    /// End the thread.
    End,
}

/// How it went.
pub enum Report {
    /// A QEMU is there, was checked, and its guest can be worked with.
    Attached {
        /// What must be equal on all replicas.
        fingerprint: Fingerprint,
        /// The guest has never run: it may be booted afresh.
        fresh: bool,
        /// The guest followed another's execution last: a process that died may have left it a mixture.
        follows: bool,
        /// The guest is running now.
        running: bool,
        /// The vCPUs' clocks for idle detection.
        clocks: VcpuClocks,
        /// Which tracker and why.
        tracker: String,
    },
    /// No QEMU is there, or it cannot be used.
    Lost {
        /// What happened, or what is wrong and how to mend it.
        reason: String,
        /// The guest switched itself off.
        powered_off: bool,
    },
    /// The guest runs after `RunFresh` or `Resume`.
    Running,
    /// The guest should run and does not: it is of no use to the group.
    NotRunning {
        /// Why.
        reason: String,
    },
    /// The guest stands still after `Halt`.
    Halted,
    /// Leader or follower: the guest stands still and its rings are stopped. The worker goes on at once, but does not
    /// resume before [`Standing::sealed`] says that the reactor has ended the slot.
    Stopped {
        /// Which syncvm.
        number: Index,
    },
    /// Leader: the guest runs again.
    Resumed {
        /// Which syncvm.
        number: Index,
    },
    /// Leader: the peer has it all.
    Acknowledged {
        /// Which syncvm.
        number: Index,
        /// In which view.
        view: View,
    },
    /// Leader: figures of an acknowledged syncvm.
    Led(SyncReport),
    /// Leader: it did not work; the guest runs as before.
    LeadFailed {
        /// Which syncvm.
        number: Index,
        /// Why.
        error: String,
        /// RAM or device state differed after the syncvm (`verify = true`).
        diverged: bool,
        /// The other side let a deadline pass.
        silent: bool,
    },
    /// Leader: the joiner is near enough for the last syncvm.
    RejoinReady {
        /// The joiner.
        peer: ReplicaId,
        /// What the rounds did, for people.
        summary: String,
    },
    /// Leader: the rounds broke off.
    RejoinFailed {
        /// The joiner.
        peer: ReplicaId,
        /// Why.
        error: String,
    },
    /// Follower: a leader has begun to write into our guest's memory, so it is no longer whole.
    Joining,
    /// Follower: acknowledged; from here on it will be applied whatever happens to the leader.
    Staged {
        /// Which syncvm.
        number: Index,
    },
    /// Follower: RAM and device state are the leader's. The worker resumes when [`Standing::sealed`] allows.
    Applied {
        /// Which syncvm.
        number: Index,
    },
    /// Follower: figures of an applied syncvm.
    Followed(SyncReport),
    /// Follower: it did not work. `whole`: the guest is as it was and runs again.
    FollowFailed {
        /// Which syncvm.
        number: Index,
        /// Why.
        error: String,
        /// Whether the guest is still in a state of its own.
        whole: bool,
    },
}

/// What the worker may do, written by the reactor and read by the worker between its steps.
#[derive(Debug, Default)]
pub struct Standing {
    /// Whether the local guest may run.
    pub may_run: AtomicBool,
    /// The present view; a bulk connection of an older one is refused.
    pub view: AtomicU64,
    /// Who leads it (replica id + 1; 0: nobody known).
    pub leader: AtomicU64,
    /// The last syncvm whose slot the reactor has ended (leader) or thrown away (follower).
    pub sealed: AtomicU64,
    /// The bulk connection that is in use: how to cut it, and the bytes it has moved.
    pub link: Mutex<Option<(BulkCancel, Arc<AtomicU64>)>>,
    /// How far the present rejoin is.
    pub rejoin: Mutex<Option<RejoinProgress>>,
}

impl Standing {
    /// Makes the worker's present exchange fail at once. Harmless when there is none.
    pub fn cancel_exchange(&self) {
        if let Some((cancel, _)) = self.link.lock().expect("no holder of this lock panics").as_ref() {
            cancel.cancel();
        }
    }

    /// How far the present rejoin is, for the status.
    pub fn rejoin(&self) -> Option<RejoinStatus> {
        let progress = (*self.rejoin.lock().expect("no holder of this lock panics"))?;
        Some(RejoinStatus {
            round: progress.round,
            done_pages: progress.done_pages as u64,
            total_pages: progress.total_pages as u64,
            left_ms: progress.left.as_millis() as u64,
        })
    }

    /// Bytes that the present bulk connection has moved: a sign of life of the peer.
    pub fn progress(&self) -> u64 {
        let link = self.link.lock().expect("no holder of this lock panics");
        link.as_ref().map_or(0, |(_, progress)| progress.load(Ordering::Relaxed))
    }

    /// Notes view and leader for the check of incoming bulk connections.
    pub fn set_view(&self, view: View, leader: Option<ReplicaId>) {
        self.view.store(view.0, Ordering::Release);
        self.leader.store(leader.map_or(0, |id| u64::from(id.0) + 1), Ordering::Release);
    }
}

/// The reactor's end of the worker.
pub struct Worker {
    commands: mpsc::Sender<Command>,
    command_event: Arc<EventFd>,
    reports: mailbox::Receiver<Report>,
    /// Rung when reports wait.
    pub report_bell: Arc<Bell>,
    /// Shared permissions.
    pub standing: Arc<Standing>,
    /// Crash points for tests.
    pub crash_points: Arc<CrashPoints>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// The worker's end.
pub(crate) struct WorkerPort {
    pub commands: Mutex<mpsc::Receiver<Command>>,
    pub command_event: Arc<EventFd>,
    pub reports: mailbox::Sender<Report>,
    pub report_bell: Arc<Bell>,
    pub standing: Arc<Standing>,
    pub crash_points: Arc<CrashPoints>,
}

impl WorkerPort {
    /// The next command, if one waits. Only the worker's thread takes them.
    pub fn next_command(&self) -> Option<Command> {
        self.commands.lock().expect("no holder of this lock panics").try_recv().ok()
    }

    /// Tells the reactor; a reactor that is gone has ended us already.
    pub fn report(&self, report: Report) {
        let _ = self.reports.send(report);
        self.report_bell.ring();
    }
}

/// Both ends of a new pair of queues.
pub(crate) fn queues(crash_points: Arc<CrashPoints>) -> std::io::Result<(Worker, WorkerPort)> {
    let (commands, command_receiver) = mpsc::channel();
    let (report_sender, reports) = mailbox(usize::MAX);
    let (command_event, report_bell) = (Arc::new(EventFd::new()?), Arc::new(Bell::new()?));
    let standing = Arc::new(Standing::default());
    let port = WorkerPort {
        commands: Mutex::new(command_receiver),
        command_event: command_event.clone(),
        reports: report_sender,
        report_bell: report_bell.clone(),
        standing: standing.clone(),
        crash_points: crash_points.clone(),
    };
    Ok((Worker { commands, command_event, reports, report_bell, standing, crash_points, thread: None }, port))
}

impl Worker {
    /// Queues a command.
    pub fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.command_event.signal();
    }

    /// The next report, if one waits.
    pub fn next_report(&self) -> Option<Report> {
        match self.reports.try_recv() {
            Ok(report) => Some(report),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                panic!("the guest worker ended by itself: it never does unless it panicked")
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.standing.may_run.store(false, Ordering::Release);
        // First: a connection that is opened just now is refused by its view, so that the join below cannot wait for it.
        self.standing.set_view(View(u64::MAX), None);
        self.standing.cancel_exchange();
        self.send(Command::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

//! How an exchange of the worker is seen by the reactor: reports at the points that matter, crash points, permission to run.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use consensus::{Index, View};
use syncvm::exchange::{Observer, Phase};
use syncvm::rejoin::RejoinProgress;

use super::{CrashPoints, Report, Standing, WorkerPort};

/// How long the reactor may take to end a slot; it does so within one turn.
const SEAL_TIMEOUT: Duration = Duration::from_secs(1);

/// The observer of one context.
pub struct WorkerObserver {
    port: Arc<WorkerPort>,
    /// The syncvm under way.
    pub number: Index,
    /// Its view.
    pub view: View,
    /// The guest stays stopped whatever the role allows: the last syncvm before a hand-over.
    pub keep_stopped: bool,
    /// The reactor must have ended this slot before the guest runs again.
    awaited_seal: Option<Index>,
}

impl WorkerObserver {
    /// An observer that has nothing to see yet.
    pub fn new(port: Arc<WorkerPort>) -> Self {
        Self { port, number: Index(0), view: View(0), keep_stopped: false, awaited_seal: None }
    }

    /// A syncvm begins.
    pub fn begin(&mut self, number: Index, view: View, keep_stopped: bool) {
        (self.number, self.view, self.keep_stopped, self.awaited_seal) = (number, view, keep_stopped, None);
    }

    fn standing(&self) -> &Standing {
        &self.port.standing
    }

    fn crash_points(&self) -> &CrashPoints {
        &self.port.crash_points
    }

    /// Frames of the next slot must not meet a guard that still counts them to this one.
    fn await_seal(&mut self) -> bool {
        let Some(number) = self.awaited_seal.take() else { return true };
        let deadline = Instant::now() + SEAL_TIMEOUT;
        while self.standing().sealed.load(Ordering::Acquire) != number.0 {
            if Instant::now() > deadline {
                tracing::error!(number = number.0, "the reactor did not end the slot; the guest stays stopped");
                return false;
            }
            std::thread::yield_now();
        }
        true
    }
}

impl Observer for WorkerObserver {
    fn crash_point(&mut self, phase: Phase) {
        match phase {
            Phase::LeaderStopped => {
                self.awaited_seal = Some(self.number);
                self.port.report(Report::Stopped { number: self.number });
            }
            Phase::FollowerStopped => self.port.report(Report::Stopped { number: self.number }),
            Phase::FollowerStaged => self.port.report(Report::Staged { number: self.number }),
            _ => {}
        }
        self.crash_points().reached(phase);
    }

    fn may_run(&mut self) -> bool {
        // The seal first: the reactor decides about the permission when it ends the slot.
        !self.keep_stopped && self.await_seal() && self.standing().may_run.load(Ordering::Acquire)
    }

    fn progress(&mut self, progress: RejoinProgress) {
        *self.standing().rejoin.lock().expect("no holder of this lock panics") = Some(progress);
    }

    fn resumed(&mut self) {
        self.port.report(Report::Resumed { number: self.number });
    }

    fn acknowledged(&mut self) {
        self.port.report(Report::Acknowledged { number: self.number, view: self.view });
    }

    fn applied(&mut self) {
        self.awaited_seal = Some(self.number);
        self.port.report(Report::Applied { number: self.number });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CrashPoints, Worker, queues};
    use super::*;

    fn observer(number: u64) -> (Worker, WorkerObserver) {
        let (worker, port) = queues(Arc::new(CrashPoints::default())).expect("descriptors");
        let mut observer = WorkerObserver::new(Arc::new(port));
        observer.begin(Index(number), View(1), false);
        (worker, observer)
    }

    #[test]
    fn a_joiner_runs_although_the_permission_comes_after_the_question() {
        let (worker, mut observer) = observer(7);
        observer.applied();
        let standing = worker.standing.clone();
        // The reactor's side of `Applied`: asked before this thread was even started, answered in its own time.
        let reactor = std::thread::spawn(move || {
            assert!(matches!(worker.next_report(), Some(Report::Applied { number: Index(7) })));
            std::thread::park_timeout(Duration::from_millis(20));
            standing.may_run.store(true, Ordering::Release);
            standing.sealed.store(7, Ordering::Release);
            worker
        });
        assert!(observer.may_run(), "the permission was given with the seal");
        drop(reactor.join().expect("the report was there"));
    }

    #[test]
    fn a_guest_stays_stopped_without_permission_or_before_a_hand_over() {
        let (worker, mut observer) = observer(7);
        observer.crash_point(Phase::LeaderStopped);
        worker.standing.sealed.store(7, Ordering::Release);
        assert!(!observer.may_run(), "sealed, but deposed");
        worker.standing.may_run.store(true, Ordering::Release);
        observer.begin(Index(8), View(1), true);
        assert!(!observer.may_run(), "the last syncvm before a hand-over");
        observer.begin(Index(9), View(1), false);
        assert!(observer.may_run(), "nothing was stopped, nothing to wait for");
    }
}

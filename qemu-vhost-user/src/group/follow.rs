//! What a secondary, or a joiner, does at a `SyncVm`: wait for its guest to become idle, take part, come out whole.

use std::sync::atomic::Ordering;

use consensus::{Event, Index, ReplicaId, View};
use dataplane::guard::SlotMark;

use syncvm::idle::Activity;

use super::reactor::Reactor;
use super::worker::{Command, Report};

/// How often the vCPUs' clock is looked at while the leader waits for a guest to become idle. That wait is short.
const FOLLOW_POLL_US: u64 = 100;

/// The syncvm that this replica follows, if any.
#[derive(Debug, Default)]
pub enum Follow {
    /// None.
    #[default]
    Resting,
    /// Everything before the `SyncVm` is consumed; the guest may still be working on it.
    Waiting {
        /// Which.
        number: Index,
        /// In which view.
        view: View,
        /// Then it is stopped, idle or not.
        deadline_us: u64,
    },
    /// The worker is at it.
    Running {
        /// Which.
        number: Index,
        /// End of the slot, once the guest stands still.
        mark: Option<SlotMark>,
        /// Acknowledged: it will be applied whatever happens.
        staged: bool,
        /// The group went on without this guest meanwhile: what comes out is not whole.
        abandoned: bool,
        /// Who leads it.
        leader: Option<ReplicaId>,
    },
}

impl Follow {
    /// When the next look is due.
    pub fn next_deadline_us(&self, now_us: u64) -> u64 {
        match self {
            Follow::Waiting { deadline_us, .. } => (*deadline_us).min(now_us + FOLLOW_POLL_US),
            _ => u64::MAX,
        }
    }

    /// Whether the worker is at it.
    pub fn is_running(&self) -> bool {
        matches!(self, Follow::Running { .. })
    }

    /// An exchange is over without having been applied. Returns whether the group went on without this guest meanwhile.
    pub(super) fn failed(&mut self, failed: Index) -> bool {
        let abandoned = matches!(self, Follow::Running { abandoned: true, .. });
        if matches!(self, Follow::Running { number, .. } if *number == failed) {
            *self = Follow::Resting;
        }
        abandoned
    }
}

impl Reactor<'_> {
    /// The head of the queue is a `SyncVm` with this replica. Returns whether it blocks the queue.
    pub(super) fn reach_followed_sync(&mut self, now: u64, number: Index, view: View) -> bool {
        match self.follow {
            // An older one that is still under way comes first.
            Follow::Waiting { .. } | Follow::Running { .. } => return true,
            // The leader has given this one up: it is at a later one.
            Follow::Resting if self.delivery.newer_sync_queued() => return false,
            Follow::Resting => {}
        }
        let replica = self.ordering.replica();
        let current = replica.view() == view && replica.leader().is_some_and(|leader| leader != self.me);
        if !current || self.guest.attached.is_none() {
            return false;
        }
        // Only slots that end when the leader's guest is idle gain from an idle guest here.
        let waits = self.guest.intact && self.vm.policy.interval_us().is_none();
        let idle_wait_us = if waits { self.vm.policy.max_idle_wait_ms * 1000 } else { 0 };
        if idle_wait_us > 0 {
            self.guest.watch_idle(FOLLOW_POLL_US);
        }
        self.follow = Follow::Waiting { number, view, deadline_us: now + idle_wait_us };
        true
    }

    /// Starts the exchange once the guest is idle or has had its time.
    pub(super) fn plan_follow(&mut self, now: u64) {
        let Follow::Waiting { number, view, deadline_us } = self.follow else { return };
        let idle = self.guest.activity(now, self.delivery.last_injected_us) == Activity::Idle;
        if now < deadline_us && !idle {
            return;
        }
        self.guest.unwatch_idle();
        let leader = self.ordering.replica().leader();
        self.follow = Follow::Running { number, mark: None, staged: false, abandoned: false, leader };
        self.worker.send(Command::Follow { number, view, idle });
    }

    /// A later syncvm with this replica is committed: the leader has given up the one before it.
    pub(super) fn leave_older_exchange(&mut self, newer: Index) {
        match self.follow {
            Follow::Waiting { number, .. } | Follow::Running { number, staged: false, .. } if number < newer => {
                self.leave_exchange_of_another_view();
            }
            _ => {}
        }
    }

    /// A new view began: an exchange with the old leader is over unless it is being applied.
    pub(super) fn leave_exchange_of_another_view(&mut self) {
        match self.follow {
            Follow::Waiting { number, .. } => {
                self.guest.unwatch_idle();
                self.follow = Follow::Resting;
                self.delivery.pass_sync(number, self.me);
            }
            Follow::Running { staged: false, .. } => self.worker.standing.cancel_exchange(),
            Follow::Running { .. } | Follow::Resting => {}
        }
    }

    /// What the worker says while this replica follows.
    pub(super) fn follow_report(&mut self, now: u64, report: Report) {
        match report {
            Report::Joining => self.invalidate_for_join(now),
            Report::Staged { number } => {
                if let Follow::Running { number: present, staged, .. } = &mut self.follow {
                    assert_eq!(*present, number, "the worker does one syncvm at a time");
                    *staged = true;
                }
            }
            Report::Followed(report) => self.totals.followed(&report),
            Report::Applied { number } => {
                let Follow::Running { mark, abandoned, leader, .. } = std::mem::take(&mut self.follow) else {
                    return self.invalidate_guest(now, "a syncvm was applied that was given up before");
                };
                if let Some(mark) = mark {
                    self.egress.discard(mark);
                }
                // Permission first: the worker resumes the guest as soon as the slot is ended.
                let runs = !abandoned && !self.is_passive();
                self.worker.standing.may_run.store(runs, Ordering::Release);
                self.worker.standing.sealed.store(number.0, Ordering::Release);
                self.delivery.pass_sync(number, self.me);
                self.delivery.forget_kept();
                self.delivery.end_slot();
                if abandoned {
                    self.invalidate_guest(now, "the group went on without it");
                } else {
                    self.guest.whole_since(leader, runs);
                    self.delivery.forget_stall();
                    self.ordering.step(now, Event::GuestIntact(true));
                }
            }
            Report::FollowFailed { number, error, whole } => {
                let abandoned = self.follow.failed(number);
                self.delivery.pass_sync(number, self.me);
                self.totals.failed += 1;
                self.note_error(format!("syncvm {} as follower: {error}", number.0));
                if self.guest.intact && (!whole || abandoned) {
                    self.invalidate_guest(now, "a syncvm broke off while it was applied");
                }
                if self.lead.is_some() {
                    // It came to lead meanwhile, perhaps too late for the worker to see that the guest may run.
                    self.resume_to_lead();
                }
            }
            _ => unreachable!("only a follower's reports come here"),
        }
    }

    /// The worker stopped the guest for a syncvm: the slot ends here.
    pub(super) fn guest_stopped(&mut self, now: u64, number: Index) {
        // The rings are stopped, so whatever is in the guard was said before the sync point.
        let slot_end = self.egress.seal();
        match &mut self.follow {
            Follow::Running { number: present, mark, .. } if *present == number => *mark = Some(slot_end),
            _ => {
                self.led_guest_stopped(now, number, slot_end);
                self.worker.standing.sealed.store(number.0, Ordering::Release);
            }
        }
    }
}

//! The guest on this node: is a QEMU there, does its guest run, is it whole, is it idle.
//!
//! «Whole» (intact) is what lets a replica lead: the guest is in a state that one whole syncvm, or its own execution of the
//! committed log since, produced (I5). Everything that breaks that goes through [`Reactor::invalidate_guest`].

use std::sync::atomic::Ordering;

use consensus::{Event, Index, ReplicaId};
use syncvm::idle::{Activity, IdleConfig, IdleDetector};

use super::follow::Follow;
use super::messages::GuestReport;
use super::reactor::Reactor;
use super::worker::{Command, Report};
use crate::device::DeviceEvent;
use crate::qemu::agent::VcpuClocks;
use crate::qemu::fingerprint::Fingerprint;

/// A frame needs this long from the ring to a vCPU; before that, stillness says nothing.
const INJECT_SETTLE_US: u64 = 200;

/// A QEMU that passed the checks.
pub struct AttachedGuest {
    /// What must be equal on all replicas.
    pub fingerprint: Fingerprint,
    /// Its guest has never run.
    pub fresh: bool,
    /// It followed another's execution when it was attached.
    follows: bool,
    /// Which tracker and why.
    pub tracker: String,
    clocks: VcpuClocks,
}

/// The guest on this node.
pub struct LocalGuest {
    /// The QEMU, if one is there.
    pub attached: Option<AttachedGuest>,
    /// Whether the guest is whole.
    pub intact: bool,
    /// Whether it runs, as far as the worker has said.
    pub running: bool,
    /// Why there is none, or why it cannot be used.
    pub problem: Option<String>,
    /// It switched itself off: the group stops instead of failing over. True until a guest begins anew here: the QEMU that
    /// ends, and the one that is started next, have nothing to say about it.
    pub powered_off: bool,
    /// The operator's word that all guests are lost.
    pub cold_start: bool,
    /// The last syncvm before a planned hand-over left it standing.
    pub stopped_for_hand_over: bool,
    /// Whose execution this guest follows; its own when it leads.
    lineage: Option<ReplicaId>,
    rings_ran: bool,
    detector: IdleDetector,
    watching: bool,
    /// Buffer for device events.
    pub device_events: Vec<DeviceEvent>,
}

impl LocalGuest {
    /// No QEMU yet.
    pub fn new(idle_threshold_us: u64) -> Self {
        Self {
            attached: None,
            intact: false,
            running: false,
            problem: Some("no QEMU has been attached yet; start it with `plover launch`".into()),
            powered_off: false,
            cold_start: false,
            stopped_for_hand_over: false,
            lineage: None,
            rings_ran: false,
            detector: IdleDetector::new(IdleConfig { threshold_us: idle_threshold_us, ..IdleConfig::default() }),
            watching: false,
            device_events: Vec::new(),
        }
    }

    /// Whether inputs are for this guest.
    pub fn consumes(&self) -> bool {
        self.intact
    }

    /// The guest is whole as of a syncvm led by `leader`, and runs again or stands still until this replica leads.
    pub fn whole_since(&mut self, leader: Option<ReplicaId>, runs: bool) {
        self.intact = true;
        self.running = runs;
        self.powered_off = false;
        self.rings_ran = true;
        self.lineage = leader;
        if let Some(attached) = &mut self.attached {
            attached.fresh = false;
        }
    }

    /// Its QEMU is gone or cannot be used. Returns whether one was attached before.
    pub fn lost(&mut self, reason: &str, powered_off: bool) -> bool {
        self.unwatch_idle();
        self.running = false;
        self.powered_off |= powered_off;
        self.rings_ran = false;
        self.problem = Some(reason.to_owned());
        self.attached.take().is_some()
    }

    /// It begins here, or goes on where this daemon's predecessor left it.
    fn begins(&mut self, me: ReplicaId) {
        self.intact = true;
        self.powered_off = false;
        self.lineage = Some(me);
    }

    /// Whether stopped rings will start again: they have run before in this guest, or in the one it is a copy of.
    pub fn rings_expected(&self) -> bool {
        self.rings_ran
    }

    /// The guest's driver has started its rings.
    pub fn rings_started(&mut self) {
        self.rings_ran = true;
    }

    /// Whether the guest is whole as somebody else's secondary.
    pub fn follows_another(&self, me: ReplicaId) -> bool {
        self.intact && self.lineage.is_some_and(|leader| leader != me)
    }

    /// Has the vCPUs' clocks looked at so often from now on. Each look wakes a thread beside the vCPU.
    pub fn watch_idle(&mut self, every_us: u64) {
        let Some(attached) = &self.attached else { return };
        attached.clocks.set_period_us(u32::try_from(every_us).unwrap_or(u32::MAX));
        if !self.watching {
            self.detector.reset();
            self.watching = true;
        }
    }

    /// Stops looking: the agent's sampler sleeps.
    pub fn unwatch_idle(&mut self) {
        if std::mem::take(&mut self.watching)
            && let Some(attached) = &self.attached
        {
            attached.clocks.set_period_us(0);
        }
    }

    /// Whether the vCPUs stand still, judged from samples taken after the last frame had time to arrive.
    pub fn activity(&mut self, now_us: u64, last_injected_us: u64) -> Activity {
        let Some(attached) = self.attached.as_ref().filter(|_| self.watching) else { return Activity::Unknown };
        if now_us < last_injected_us + INJECT_SETTLE_US {
            self.detector.reset();
            return Activity::Busy;
        }
        let sample = attached.clocks.read();
        let at_us = sample.as_ref().map_or(now_us, |sample| sample.at_ns / 1000);
        self.detector.sample(at_us, sample.map(|sample| sample.cpu_ns))
    }
}

impl Reactor<'_> {
    /// The worker says how QEMU is.
    pub(super) fn guest_report(&mut self, now: u64, report: Report) {
        match report {
            Report::Attached { fingerprint, fresh, follows, running, clocks, tracker } => {
                tracing::info!(vm = %self.vm.name, fresh, follows, running, %tracker, "QEMU attached");
                self.guest.attached = Some(AttachedGuest { fingerprint, fresh, follows, tracker, clocks });
                self.guest.problem = None;
                self.guest.watching = false;
                self.guest.running = running;
                self.claim_guest(now);
            }
            Report::Lost { reason, powered_off } => self.guest_lost(now, &reason, powered_off),
            Report::Running => self.guest.running = true,
            Report::NotRunning { reason } => {
                self.guest.running = false;
                self.note_error(format!("guest: {reason}"));
                self.invalidate_guest(now, "it does not run");
            }
            Report::Halted => self.guest.running = false,
            _ => unreachable!("only reports about QEMU come here"),
        }
    }

    /// A QEMU just came: may its guest lead? A fresh one when the group has no history, or the operator said so; a running
    /// one when this daemon was restarted while its guest served alone.
    pub(super) fn claim_guest(&mut self, now: u64) {
        let genesis = self.ordering.replica().last_index().0 == 0 && self.me.0 == 0;
        let alone = self.ordering.take_served_alone();
        let attached = self.guest.attached.as_ref().expect("just attached");
        let boots_fresh = attached.fresh && (genesis || self.guest.cold_start);
        // A syncvm may have had it stopped when the daemon ended. If it was still being given another's state, it is no guest.
        let continues = alone && !attached.fresh && !attached.follows;
        if boots_fresh || continues {
            if continues {
                self.delivery.skip_through = self.ordering.recovered_last();
            }
            self.guest.begins(self.me);
            self.worker.standing.may_run.store(true, Ordering::Release);
            self.ordering.step(now, Event::GuestIntact(true));
            if boots_fresh && self.lead.is_some() {
                self.worker.send(Command::RunFresh);
            }
        } else if self.guest.running {
            // It ran before this daemon started and the group may have gone on without it.
            self.worker.send(Command::Halt);
        }
    }

    fn guest_lost(&mut self, now: u64, reason: &str, powered_off: bool) {
        if self.guest.problem.as_deref() != Some(reason) {
            self.note_error(format!("guest: {reason}"));
        }
        if self.guest.lost(reason, powered_off) {
            self.invalidate_guest(now, "its QEMU is gone");
        }
    }

    /// The guest is no longer part of the group: stop it, forget what it said, and say so.
    pub(super) fn invalidate_guest(&mut self, now: u64, why: &str) {
        if let Follow::Running { abandoned, .. } = &mut self.follow {
            *abandoned = true;
        }
        self.leave_exchange_of_another_view();
        if !self.guest.intact {
            return;
        }
        tracing::warn!(vm = %self.vm.name, why, "the local guest is no longer whole");
        self.drop_guest(now);
        if self.guest.running {
            self.worker.send(Command::Halt);
        }
    }

    /// As [`Reactor::invalidate_guest`], while the worker itself has stopped the guest for a rejoin.
    pub(super) fn invalidate_for_join(&mut self, now: u64) {
        self.guest.running = false;
        if let Some(attached) = &mut self.guest.attached {
            // From here on its memory is a mixture, also if the rejoin fails: it can only be restarted.
            attached.fresh = false;
        }
        if self.guest.intact {
            self.drop_guest(now);
        }
    }

    fn drop_guest(&mut self, now: u64) {
        self.guest.intact = false;
        self.guest.lineage = None;
        self.guest.cold_start = false;
        self.guest.stopped_for_hand_over = false;
        self.delivery.skip_through = Index(0);
        self.delivery.forget_kept();
        self.worker.standing.may_run.store(false, Ordering::Release);
        self.egress.set_held();
        self.egress.discard_all();
        self.ordering.step(now, Event::GuestIntact(false));
    }

    /// Somebody else leads a group whose guest this replica was about to boot afresh.
    pub(super) fn withdraw_fresh_guest(&mut self, now: u64) {
        let fresh = self.guest.attached.as_ref().is_some_and(|attached| attached.fresh);
        if fresh && !self.guest.running && self.guest.intact {
            self.drop_guest(now);
        }
    }

    /// A committed `Noop` says who leads from here on.
    pub(super) fn leader_changed(&mut self, now: u64, leader: ReplicaId) {
        if self.guest.intact && leader != self.me && self.guest.lineage != Some(leader) {
            self.invalidate_guest(now, "another replica leads on from an older state");
        }
        if leader == self.me && self.guest.intact {
            self.guest.lineage = Some(self.me);
        }
    }

    /// What the peers should know.
    pub(super) fn own_report(&self) -> GuestReport {
        GuestReport {
            attached: self.guest.attached.is_some(),
            intact: self.guest.intact,
            fingerprint: self.guest.attached.as_ref().map(|attached| attached.fingerprint.clone()),
            problem: self.guest.problem.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: ReplicaId = ReplicaId(0);

    #[test]
    fn a_guest_that_switched_itself_off_stays_so_until_one_begins_anew() {
        let off = || {
            let mut guest = LocalGuest::new(100);
            guest.begins(ME);
            guest.lost("the guest has switched itself off", true);
            // A QEMU that is still ending takes a connection and closes it; then there is none.
            guest.lost("QEMU closed its monitor", false);
            guest.lost("cannot connect to QEMU's monitor", false);
            assert!(guest.powered_off && !guest.running);
            guest
        };
        let mut cold = off();
        cold.begins(ME);
        assert!(!cold.powered_off, "booted again");
        let mut joined = off();
        joined.whole_since(Some(ReplicaId(1)), true);
        assert!(!joined.powered_off, "another replica's guest");
        joined.lost("QEMU closed its monitor", false);
        assert!(!joined.powered_off, "killed");
    }
}

//! The copies of a log that runs: which of them count, which are out, which are being rebuilt. No I/O.
//!
//! A record is acknowledged when all *members* have it. Who is a member stands in the header of every segment, so that a
//! later opening knows whose word to take. When a member fails, nothing is acknowledged until a header that leaves it
//! out is durable; when a copy has been rebuilt, a header that takes it in is written.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::segment::{Members, SegmentNumber};
use crate::{LegState, LegStatus, LogError};

/// A copy that failed is tried again after this time.
const RETRY_AFTER: Duration = if cfg!(test) { Duration::ZERO } else { Duration::from_secs(5) };

/// Copies of one log at most.
pub const MAX_LEGS: usize = 4;

#[derive(Debug)]
enum State {
    Member,
    Out {
        error: LogError,
        retry_at: Instant,
    },
    Reopening,
    /// Open and empty: it takes part from this segment on.
    Joining {
        from: SegmentNumber,
    },
    /// It takes part, and is filled with what was before.
    Filling,
}

#[derive(Debug)]
struct Leg {
    path: PathBuf,
    state: State,
    /// The group in flight is not done there.
    busy: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Legs {
    legs: Vec<Leg>,
    /// The members by the last header that is durable.
    recorded: Option<Members>,
}

impl Legs {
    /// `out` says why a copy does not take part.
    pub fn new(legs: impl Iterator<Item = (PathBuf, Option<LogError>)>) -> Legs {
        let leg = |(path, out): (PathBuf, Option<LogError>)| {
            let state = match out {
                None => State::Member,
                Some(error) => State::Out { error, retry_at: Instant::now() },
            };
            Leg { path, state, busy: false }
        };
        Legs { legs: legs.map(leg).collect(), recorded: None }
    }

    pub fn len(&self) -> usize {
        self.legs.len()
    }

    pub fn path(&self, leg: usize) -> &Path {
        &self.legs[leg].path
    }

    pub fn members(&self) -> Members {
        let mut members = Members::default();
        for (at, leg) in self.legs.iter().enumerate() {
            if matches!(leg.state, State::Member) {
                members.insert(at);
            }
        }
        members
    }

    /// Whether the disks know who the members are.
    pub fn is_recorded(&self) -> bool {
        self.recorded == Some(self.members())
    }

    /// A header with these members is durable.
    pub fn record(&mut self, members: Members) {
        self.recorded = Some(members);
    }

    /// Whether a copy gets the groups of a segment.
    pub fn takes(&self, leg: usize, number: SegmentNumber) -> bool {
        match self.legs[leg].state {
            State::Member | State::Filling => true,
            State::Joining { from } => number >= from,
            State::Out { .. } | State::Reopening => false,
        }
    }

    pub fn set_busy(&mut self, leg: usize, busy: bool) {
        self.legs[leg].busy = busy;
    }

    pub fn any_busy(&self) -> bool {
        self.legs.iter().any(|leg| leg.busy)
    }

    /// A copy cannot be used any more. Returns whether it could before. A group in flight there stays in flight: the device
    /// may still read it, whoever found out that the copy failed.
    pub fn fail(&mut self, leg: usize, error: LogError, now: Instant) -> bool {
        let leg = &mut self.legs[leg];
        let was_in = !matches!(leg.state, State::Out { .. } | State::Reopening);
        if was_in {
            let path = leg.path.display();
            tracing::error!(error = &error as &dyn std::error::Error, copy = %path, "a copy of the log has failed");
        }
        leg.state = State::Out { error, retry_at: now + RETRY_AFTER };
        was_in
    }

    /// Why the last member failed.
    pub fn error(&self) -> Option<LogError> {
        self.legs.iter().find_map(|leg| match &leg.state {
            State::Out { error, .. } => Some(error.clone()),
            _ => None,
        })
    }

    /// Whether every copy is a member: there is nothing to look after.
    pub fn are_all_members(&self) -> bool {
        self.legs.iter().all(|leg| matches!(leg.state, State::Member))
    }

    /// Whether a copy takes no part, and is not open.
    pub fn is_out(&self, leg: usize) -> bool {
        matches!(self.legs[leg].state, State::Out { .. } | State::Reopening)
    }

    /// A copy that should be tried again now, and that nobody uses any more; it counts as being reopened.
    pub fn next_retry(&mut self, now: Instant, mut is_free: impl FnMut(usize) -> bool) -> Option<usize> {
        let due = |leg: &Leg| matches!(leg.state, State::Out { retry_at, .. } if now >= retry_at);
        let at = (0..self.legs.len()).find(|at| due(&self.legs[*at]) && is_free(*at))?;
        self.legs[at].state = State::Reopening;
        Some(at)
    }

    /// A copy was opened anew; it takes part from a segment on.
    pub fn join(&mut self, leg: usize, from: SegmentNumber) {
        if matches!(self.legs[leg].state, State::Reopening) {
            self.legs[leg].state = State::Joining { from };
        }
    }

    /// Whether a copy that was opened anew waits for a segment behind this one.
    pub fn awaits_segment_behind(&self, number: SegmentNumber) -> bool {
        self.legs.iter().any(|leg| matches!(leg.state, State::Joining { from } if from > number))
    }

    /// A copy that takes part from this segment on, and must now be filled with what was before.
    pub fn next_to_fill(&mut self, number: SegmentNumber) -> Option<usize> {
        let due = |leg: &Leg| matches!(leg.state, State::Joining { from } if number >= from);
        let at = self.legs.iter().position(due)?;
        self.legs[at].state = State::Filling;
        Some(at)
    }

    /// A copy is complete.
    pub fn complete(&mut self, leg: usize) -> bool {
        let filled = matches!(self.legs[leg].state, State::Filling);
        if filled {
            tracing::info!(copy = %self.legs[leg].path.display(), "a copy of the log is complete again");
            self.legs[leg].state = State::Member;
        }
        filled
    }

    pub fn status(&self) -> Vec<LegStatus> {
        let status = |leg: &Leg| LegStatus {
            path: leg.path.clone(),
            state: match &leg.state {
                State::Member => LegState::Complete,
                State::Out { error, .. } => LegState::Failed(error.clone()),
                State::Reopening | State::Joining { .. } | State::Filling => LegState::Rebuilding,
            },
        };
        self.legs.iter().map(status).collect()
    }
}

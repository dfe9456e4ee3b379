//! `Phase`: the named points between the steps of an exchange, where a crash can be provoked.

use std::fmt;
use std::str::FromStr;

macro_rules! phases {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),* $(,)?) => {
        /// A point between two steps. Its name is what the rig's debug hook takes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Phase { $($(#[$doc])* $variant),* }

        impl Phase {
            /// Every phase, leader's first, in the order of the exchange.
            pub const ALL: &'static [Phase] = &[$(Phase::$variant),*];

            /// Its name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Phase::$variant => $name),* }
            }
        }
    };
}

phases! {
    /// The leader's guest is stopped.
    LeaderStopped = "leader-stopped",
    /// Its device state is saved.
    LeaderSaved = "leader-saved",
    /// Its dirty set is harvested.
    LeaderHarvested = "leader-harvested",
    /// The dirty sets are exchanged.
    LeaderExchanged = "leader-exchanged",
    /// The leader has hashed its first batch.
    LeaderHashed = "leader-hashed",
    /// The divergent pages are known.
    LeaderCompared = "leader-compared",
    /// The follower was told which they are (transfer of blocks only).
    LeaderListed = "leader-listed",
    /// They are copied to the staging area.
    LeaderCopied = "leader-copied",
    /// The leader's guest runs again (early resume only).
    LeaderResumed = "leader-resumed",
    /// The digests of the follower's blocks are here and compared (transfer of blocks only).
    LeaderDigests = "leader-digests",
    /// Half of the pages are sent.
    LeaderSentHalf = "leader-sent-half",
    /// Everything is sent.
    LeaderSent = "leader-sent",
    /// The acknowledgement arrived, nothing was released yet.
    LeaderAcked = "leader-acked",
    /// The owner was told to release.
    LeaderReleased = "leader-released",
    /// The follower's guest is stopped.
    FollowerStopped = "follower-stopped",
    /// Its dirty set is harvested.
    FollowerHarvested = "follower-harvested",
    /// The dirty sets are exchanged.
    FollowerExchanged = "follower-exchanged",
    /// All hashes are sent.
    FollowerHashed = "follower-hashed",
    /// The digests of the divergent pages' blocks are sent (transfer of blocks only).
    FollowerDigests = "follower-digests",
    /// The first message of the transfer arrived.
    FollowerReceiving = "follower-receiving",
    /// The whole transfer is staged and verified.
    FollowerStaged = "follower-staged",
    /// The acknowledgement is sent: the point of no return.
    FollowerAcked = "follower-acked",
    /// Half of the pages are applied.
    FollowerAppliedHalf = "follower-applied-half",
    /// All pages are applied.
    FollowerApplied = "follower-applied",
    /// The device state is loaded.
    FollowerLoaded = "follower-loaded",
    /// The follower's guest runs again.
    FollowerResumed = "follower-resumed",
    /// A rejoin round is acknowledged, on the leader.
    LeaderRound = "leader-round",
    /// A rejoin round is written, on the follower.
    FollowerRound = "follower-round",
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.iter().copied().find(|phase| phase.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|phase| phase.name()).collect();
            format!("no syncvm phase named {name:?}; there are {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_come_back() {
        for &phase in Phase::ALL {
            assert_eq!(phase.to_string().parse(), Ok(phase));
        }
        assert!("leader-asleep".parse::<Phase>().unwrap_err().contains("leader-acked"));
    }
}

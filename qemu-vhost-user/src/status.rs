//! What `plover status` shows: one snapshot of a group, built by its reactor when somebody asks.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// The figures of one syncvm.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SyncStatus {
    /// Its number: the log index of its entry.
    pub number: u64,
    /// Pages that this side wrote.
    pub dirty_pages: u64,
    /// Pages of the union.
    pub union_pages: u64,
    /// Pages that differed.
    pub divergent_pages: u64,
    /// Bytes that crossed the wire, both ways.
    pub bytes_sent: u64,
    /// What sending every dirty page of the leader would have cost.
    pub full_transfer_bytes: u64,
    /// How long the guest stood still.
    pub guest_stop_us: u64,
    /// Phase name and its time.
    pub phases_us: Vec<(String, u64)>,
}

/// A distribution of times.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// What was timed.
    pub name: String,
    /// How many.
    pub count: u64,
    /// Median, ms.
    pub p50_ms: f64,
    /// 99th percentile, ms.
    pub p99_ms: f64,
    /// The longest, ms.
    pub max_ms: f64,
}

/// Sums over all syncvms since the daemon started.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SyncTotals {
    /// Acknowledged syncvms.
    pub count: u64,
    /// Syncvms that failed and were retried.
    pub failed: u64,
    /// Pages written by either side.
    pub dirty_pages: u64,
    /// Pages that differed.
    pub divergent_pages: u64,
    /// Bytes that crossed the wire.
    pub bytes_sent: u64,
    /// What they were about: `sets` of dirty pages, `hashes` of pages, the `list` of those that differ, `digests` of their
    /// blocks, `memory` (blocks, or whole pages), `device` state, and the `rest`.
    #[serde(default)]
    pub traffic_bytes: Vec<(String, u64)>,
    /// What full transfers would have cost.
    pub full_transfer_bytes: u64,
    /// Median guest stop.
    pub stop_ms_p50: f64,
    /// 99th percentile of the guest stop.
    pub stop_ms_p99: f64,
    /// Guest stops: each time in µs (to 1 %) and how often it occurred, ascending. Of two looks the difference tells
    /// what lay between them.
    #[serde(default)]
    pub stop_us: Vec<(u64, u64)>,
    /// The same of whole syncvms, from the stop, or the hashing ahead of it, to the acknowledgement.
    #[serde(default)]
    pub whole_us: Vec<(u64, u64)>,
    /// Where the time of led syncvms went: phase name and its sum. Those up to `resume` (whether that comes before `transfer` or
    /// not is `early_resume`'s) are what the guest stands still for.
    #[serde(default)]
    pub phases_us: Vec<(String, u64)>,
    /// Why slots ended, and how often: idle, oldest-frame, pause, guard-pressure, max-length, interval.
    pub slot_ends: std::collections::BTreeMap<String, u64>,
    /// Where the time of slots goes, part after part (leader): `run` (resume to proposal), `order` (proposal to
    /// commit), `stop` (to the stop of the guest), `sync` (to the acknowledgement), `release` (until all frames have
    /// left); and `held`: how long each frame of the guest was held.
    #[serde(default)]
    pub slot_times: Vec<Times>,
    /// Full comparisons of RAM and device state that found no difference (`verify = true`).
    pub verified: u64,
    /// Full comparisons that found one: must stay 0.
    pub diverged: u64,
}

/// The log on this node's disks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LogFigures {
    /// Bytes of the segments that are needed.
    pub disk_bytes: u64,
    /// Bytes that are not durable yet.
    pub queued_bytes: u64,
    /// Each copy with its place and how it fares.
    pub copies: Vec<(String, String)>,
    /// Why the log cannot grow, if it cannot.
    pub no_room: Option<String>,
}

/// One other replica as this one sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its node.
    pub node: String,
    /// Whether the control connection stands.
    pub connected: bool,
    /// What carries the messages: tcp, shm or rdma.
    #[serde(default)]
    pub transport: String,
    /// Time since its last sign of life; absent when there never was one.
    pub silent_ms: Option<u64>,
    /// Log entries of ours that it has not confirmed (leader only).
    pub lag_entries: u64,
    /// Whether its guest is whole, as it last said.
    pub guest_intact: bool,
    /// Why it was refused or refuses us.
    pub refusal: Option<String>,
}

/// How far a rejoin is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejoinStatus {
    /// The round; 0 covers all of RAM.
    pub round: u32,
    /// Pages of it that are done.
    pub done_pages: u64,
    /// Its pages.
    pub total_pages: u64,
    /// When this round will end, at the pace so far.
    pub left_ms: u64,
}

/// One stage of the reactor's turn.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StageStatus {
    /// uplink, fabric, log, collect, deliver, release, decide or look.
    pub name: String,
    /// Time in this stage when it found work, µs.
    pub busy_us: u64,
    /// Time in this stage when it found none, µs.
    pub idle_us: u64,
    /// How much a turn found (frames, messages or records), in powers of two: the number at place n counts turns that
    /// found 2^n to 2^(n+1) - 1. Zeros at the end are left out.
    pub sizes: Vec<u64>,
}

/// What the reactor does with its time, since the group started.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ReactorStatus {
    /// The idle strategy in use.
    pub idle: String,
    /// Time asleep, µs.
    pub asleep_us: u64,
    /// Turns that found work.
    pub busy_turns: u64,
    /// Turns that found none.
    pub idle_turns: u64,
    /// Time and batch sizes per stage.
    pub stages: Vec<StageStatus>,
    /// Sizes of proposed batches in bytes, in powers of two like `sizes`.
    pub proposal_bytes: Vec<u64>,
}

/// Where the group's frames lie.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// Size of the arena for ordered input.
    pub arena_bytes: u64,
    /// How much of it is in use, in whole chunks.
    pub arena_used_bytes: u64,
    /// How often it had no room: the uplink had to wait, or a message was kept elsewhere.
    pub arena_refusals: u64,
    /// The pages of arena and guard.
    pub pages: String,
}

/// One group on this node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct GroupStatus {
    /// The VM.
    pub vm: String,
    /// This node.
    pub node: String,
    /// leader, secondary or witness; or unreplicated, and then whatever belongs to a group is 0 or empty.
    pub role: String,
    /// Consensus view.
    pub view: u64,
    /// Who leads, if known.
    pub leader: Option<String>,
    /// Who is secondary by the committed log.
    pub secondary: Option<String>,
    /// Whether the death of the leader would lose nothing and interrupt nobody.
    pub protected: bool,
    /// Why not.
    pub unprotected_reason: Option<String>,
    /// What the local guest is: absent, prepared, running, stopped; and why, if that helps.
    pub guest: String,
    /// Whether the local guest may take over or lead.
    pub guest_intact: bool,
    /// Committed log index.
    pub commit_index: u64,
    /// Last log index.
    pub last_index: u64,
    /// Index up to which the local guest has consumed inputs.
    pub applied_index: u64,
    /// Index up to which the log has been dropped.
    pub base_index: u64,
    /// The log on this node's disks.
    #[serde(default)]
    pub log: LogFigures,
    /// Frames in the guard.
    pub held_frames: u64,
    /// Bytes in the guard.
    pub held_bytes: u64,
    /// Frames of clients that were ordered; pieces that were joined are one.
    pub frames_in: u64,
    /// Pauses between two batches of input because the secondary's guest is behind (leader).
    #[serde(default)]
    pub input_pauses: u64,
    /// Inputs since the last syncvm that the guest got only when this node took over (`mc`).
    #[serde(default)]
    pub inputs_taken_over: u64,
    /// Frames that left.
    pub frames_out: u64,
    /// Frames dropped, but not by the filter: by the uplink in either direction, or on the way in for want of buffers
    /// or of a driver.
    pub frames_dropped: u64,
    /// Rules of the uplink's filter and the frames that each decided on; the last is the default.
    #[serde(default)]
    pub filter: Vec<(String, u64)>,
    /// When the guests are made identical: vsmr, or str or mc with its interval.
    #[serde(default)]
    pub policy: String,
    /// Dirty tracker in use and why.
    pub tracker: String,
    /// How far the rejoin is that this replica takes part in.
    #[serde(default)]
    pub rejoin: Option<RejoinStatus>,
    /// The last acknowledged syncvm.
    pub last_sync: Option<SyncStatus>,
    /// Sums.
    pub totals: SyncTotals,
    /// The others.
    pub peers: Vec<PeerStatus>,
    /// The last thing that went wrong, for people.
    pub last_error: Option<String>,
    /// Microseconds the reactor was busy, and idle, since start.
    pub busy_us: u64,
    /// See `busy_us`.
    pub idle_us: u64,
    /// Where its frames lie.
    #[serde(default)]
    pub memory: MemoryStatus,
    /// Where the reactor's time goes.
    #[serde(default)]
    pub reactor: ReactorStatus,
}

impl GroupStatus {
    /// The text of `plover status`.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let protection = match (&self.unprotected_reason, self.protected) {
            (_, true) => "protected".to_owned(),
            (Some(reason), false) => format!("NOT protected: {reason}"),
            (None, false) => "NOT protected".to_owned(),
        };
        let _ = writeln!(text, "{} on {}: {}, view {}, {protection}", self.vm, self.node, self.role, self.view);
        let _ = writeln!(
            text,
            "  group     leader {}, secondary {}",
            self.leader.as_deref().unwrap_or("unknown"),
            self.secondary.as_deref().unwrap_or("none")
        );
        let _ = writeln!(text, "  guest     {}{}", self.guest, if self.guest_intact { "" } else { " (not whole)" });
        let _ = writeln!(
            text,
            "  log       committed {} of {}, applied {}, base {}",
            self.commit_index, self.last_index, self.applied_index, self.base_index
        );
        self.render_log(&mut text);
        let _ = writeln!(
            text,
            "  frames    in {}, out {}, dropped {}; held {} ({} bytes)",
            self.frames_in, self.frames_out, self.frames_dropped, self.held_frames, self.held_bytes
        );
        if self.input_pauses > 0 {
            let _ =
                writeln!(text, "  frames    {} pauses of the input, for a secondary that is behind", self.input_pauses);
        }
        if self.inputs_taken_over > 0 {
            let _ = writeln!(text, "  frames    {} inputs delivered at take-over", self.inputs_taken_over);
        }
        for (rule, frames) in self.filter.iter().filter(|_| self.filter.len() > 1) {
            let _ = writeln!(text, "  filter    {frames} frames: {rule}");
        }
        let MemoryStatus { arena_bytes, arena_used_bytes, arena_refusals, pages } = &self.memory;
        let _ = writeln!(
            text,
            "  memory    {} of {} MiB of the arena in use on {pages}, full {arena_refusals} times",
            arena_used_bytes >> 20,
            arena_bytes >> 20
        );
        self.render_reactor(&mut text);
        self.render_sync(&mut text);
        for peer in &self.peers {
            let state = if peer.connected { "connected" } else { "NOT connected" };
            let refusal = peer.refusal.as_deref().map(|why| format!("; {why}")).unwrap_or_default();
            let transport = &peer.transport;
            let silent = peer.silent_ms.map_or("never heard of".into(), |ms| format!("silent {ms} ms"));
            let _ = writeln!(
                text,
                "  peer      {}: {state} ({transport}), {silent}, lag {} entries{refusal}",
                peer.node, peer.lag_entries
            );
        }
        if let Some(error) = &self.last_error {
            let _ = writeln!(text, "  error     {error}");
        }
        text
    }

    fn render_log(&self, text: &mut String) {
        let LogFigures { disk_bytes, queued_bytes, copies, no_room } = &self.log;
        let copies: Vec<String> = copies.iter().map(|(place, state)| format!("{place} {state}")).collect();
        let list = copies.join(", ");
        let _ = writeln!(text, "  disk      {disk_bytes} bytes of log, {queued_bytes} on their way; {list}");
        if let Some(why) = no_room {
            let _ = writeln!(text, "  disk      NO ROOM: {why}");
        }
    }

    fn render_reactor(&self, text: &mut String) {
        let reactor = &self.reactor;
        let total_us = (self.busy_us + self.idle_us + reactor.asleep_us).max(1);
        let percent = |us: u64| us as f64 * 100.0 / total_us as f64;
        let stages: Vec<String> = reactor
            .stages
            .iter()
            .map(|stage| match typical_size(&stage.sizes) {
                Some(size) => format!("{} {:.1} % (~{size})", stage.name, percent(stage.busy_us)),
                None => format!("{} {:.1} %", stage.name, percent(stage.busy_us)),
            })
            .collect();
        let _ = writeln!(
            text,
            "  reactor   {}: busy {:.1} %, polling {:.1} %, asleep {:.1} %; {}",
            reactor.idle,
            percent(self.busy_us),
            percent(self.idle_us),
            percent(reactor.asleep_us),
            stages.join(", ")
        );
    }

    fn render_sync(&self, text: &mut String) {
        let totals = &self.totals;
        let _ = writeln!(
            text,
            "  syncvm    {}; {} done, {} failed, stop p50 {:.1} ms p99 {:.1} ms, {} bytes sent (full transfer: {}); tracker {}",
            self.policy,
            totals.count,
            totals.failed,
            totals.stop_ms_p50,
            totals.stop_ms_p99,
            totals.bytes_sent,
            totals.full_transfer_bytes,
            self.tracker
        );
        let ends: Vec<String> = totals.slot_ends.iter().map(|(end, count)| format!("{end} {count}")).collect();
        if !ends.is_empty() {
            let _ = writeln!(text, "  slots     ended by {}", ends.join(", "));
        }
        if totals.slot_times.iter().any(|part| part.count > 0) {
            let parts = totals.slot_times.iter();
            let parts: Vec<String> = parts
                .map(|part| format!("{} {:.1}/{:.1}/{:.1}", part.name, part.p50_ms, part.p99_ms, part.max_ms))
                .collect();
            let _ = writeln!(text, "  slot      p50/p99/max ms: {}", parts.join(", "));
        }
        if totals.count > 0 {
            let mean_ms = |us: u64| us as f64 / 1000.0 / totals.count as f64;
            let phases: Vec<String> =
                totals.phases_us.iter().map(|(name, us)| format!("{name} {:.2}", mean_ms(*us))).collect();
            let _ = writeln!(text, "  phases    mean ms: {}", phases.join(", "));
            let parts = totals.traffic_bytes.iter();
            let parts: Vec<String> = parts.map(|(name, sum)| format!("{name} {}", sum / totals.count)).collect();
            let _ = writeln!(text, "  traffic   mean bytes: {}", parts.join(", "));
        }
        if let Some(rejoin) = &self.rejoin {
            let percent = 100 * rejoin.done_pages / rejoin.total_pages.max(1);
            let _ = writeln!(
                text,
                "  rejoin    round {}: {} of {} pages ({percent} %), about {:.1} s to its end",
                rejoin.round,
                rejoin.done_pages,
                rejoin.total_pages,
                rejoin.left_ms as f64 / 1000.0
            );
        }
        if let Some(last) = &self.last_sync {
            let phases: Vec<String> = last.phases_us.iter().map(|(name, us)| format!("{name} {us}")).collect();
            let _ = writeln!(
                text,
                "  last      #{}: dirty {}, union {}, divergent {}, {} bytes, guest stopped {} us ({})",
                last.number,
                last.dirty_pages,
                last.union_pages,
                last.divergent_pages,
                last.bytes_sent,
                last.guest_stop_us,
                phases.join(", ")
            );
        }
    }
}

/// The lower end of the middle of a distribution over powers of two; nothing when it is empty.
fn typical_size(sizes: &[u64]) -> Option<u64> {
    let half = sizes.iter().sum::<u64>().div_ceil(2);
    let mut below = 0;
    let middle = sizes.iter().position(|count| {
        below += count;
        half > 0 && below >= half
    })?;
    Some(1 << middle)
}

#[cfg(test)]
mod tests {
    use super::typical_size;

    #[test]
    fn the_typical_size_is_the_median_s_power_of_two() {
        assert_eq!(typical_size(&[]), None);
        assert_eq!(typical_size(&[0, 0]), None);
        assert_eq!(typical_size(&[1]), Some(1));
        assert_eq!(typical_size(&[1, 0, 0, 5]), Some(8));
        assert_eq!(typical_size(&[3, 1, 1]), Some(1));
    }
}

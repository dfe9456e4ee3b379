//! Real deaths: kill -9 of a process that appends, thousands of times, and a file that may not grow.
//!
//! The child is this test binary again, told what to do by an environment variable. It plays a history that follows from
//! a seed, and says over a pipe how far it will have appended and how far it was told that things are durable. So the
//! parent knows all states that the log may be in after the kill: those between the two. `PLOVER_LOG_KILLS` asks
//! for more rounds; `PLOVER_LOG_SEED` repeats the choices of a run (not the moment of each kill, which is the machine's).

use std::collections::VecDeque;
use std::io::{PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{DEADLINE, Rng, SEGMENT, Scratch, append, entry, options, settle};
use crate::content::{Content, Op, Script};
use storage_log::{LegSpec, Options, Record, Recovered, Ticket, open};

const ORDER_VARIABLE: &str = "PLOVER_LOG_TEST_ORDER";
/// The history holds no states.
const NO_STATES_VARIABLE: &str = "PLOVER_LOG_TEST_NO_STATES";
/// What the short run does.
const KILLS: u64 = 2100;
/// Children at the same time.
const WORKERS: u64 = 4;

fn command(test: &str, order: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]).env(ORDER_VARIABLE, order);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn spawn(test: &str, order: &str, stdin: Stdio) -> Child {
    command(test, order).stdin(stdin).spawn().unwrap()
}

fn kill_options() -> Options {
    Options { stage_bytes: 256 << 10, ..options(SEGMENT) }
}

/// Where a log lies, as a word for the child.
fn order(seed: u64, legs: &[LegSpec]) -> String {
    let leg = |leg: &LegSpec| match leg {
        LegSpec::Dir(path) => format!("|dir|{}", path.display()),
        LegSpec::Device(path) => format!("|device|{}", path.display()),
        LegSpec::Nvme(name) => panic!("{} is for SPDK", name.display()),
    };
    format!("{seed}{}", legs.iter().map(leg).collect::<String>())
}

fn read_order() -> Option<(u64, Vec<LegSpec>)> {
    let order = std::env::var(ORDER_VARIABLE).ok()?;
    let words: Vec<&str> = order.split('|').collect();
    let leg = |pair: &[&str]| match pair {
        ["dir", path] => LegSpec::Dir(PathBuf::from(path)),
        ["device", path] => LegSpec::Device(PathBuf::from(path)),
        other => panic!("{other:?}"),
    };
    Some((words[0].parse().unwrap(), words[1..].chunks(2).map(leg).collect()))
}

/// How far the child is: steps that it may have appended, and steps that are durable.
type Progress = [u64; 2];

#[test]
#[ignore = "the child of acknowledged_records_survive_kill_9"]
fn child_appends_until_killed() {
    let Some((seed, legs)) = read_order() else { return };
    // Standard input is a pipe to the parent.
    let mut pipe = std::fs::File::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let (mut log, recovered) = open(&legs, kill_options()).unwrap();
    let mut script = Script::new(seed, Content::of(&recovered));
    let mut pace = Rng(!seed);
    let (mut steps, mut durable_steps) = (0, 0);
    let mut waiting: VecDeque<(Ticket, u64)> = VecDeque::new();
    if std::env::var_os(NO_STATES_VARIABLE).is_some() {
        script.without_states();
    }
    loop {
        let batch = [1, 1, 2, 3, 8, 30][pace.below(6) as usize];
        let mut tell = |steps: u64, durable: u64| {
            let progress: Progress = [steps, durable];
            pipe.write_all(progress.map(u64::to_le_bytes).as_flattened()).expect("the parent reads")
        };
        tell(steps + batch, durable_steps);
        for _ in 0..batch {
            let ticket = script.step().play(&mut *log);
            steps += 1;
            waiting.extend(ticket.map(|ticket| (ticket, steps)));
        }
        match pace.below(3) {
            0 => log.flush(),
            1 => {
                log.flush();
                log.poll();
            }
            _ => assert!(waiting.back().is_none_or(|(ticket, _)| settle(&mut *log, *ticket))),
        }
        while let Some((_, step)) = waiting.pop_front_if(|(ticket, _)| *ticket <= log.durable()) {
            durable_steps = step;
        }
        tell(steps, durable_steps);
    }
}

/// The next word of a child, or `None` if it has ended.
fn hear(pipe: &mut PipeReader) -> Option<Progress> {
    let mut bytes = [[0; 8]; 2];
    let limit = rustix::event::Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    let mut ready = [rustix::event::PollFd::new(pipe, rustix::event::PollFlags::IN)];
    let count = rustix::event::poll(&mut ready, Some(&limit)).unwrap();
    assert_ne!(count, 0, "a child said nothing within {DEADLINE:?}");
    // Words are shorter than PIPE_BUF: they come whole or not at all.
    pipe.read_exact(bytes.as_flattened_mut()).ok().map(|()| bytes.map(u64::from_le_bytes))
}

/// A log that dies many times.
struct Victim {
    /// Holds the directory.
    _scratch: Scratch,
    legs: Vec<LegSpec>,
    content: Content,
    /// It was in doubt when it was looked at.
    doubtful: bool,
}

impl Victim {
    fn new(rng: &mut Rng) -> Victim {
        let scratch = if rng.one_in(10) { Scratch::on_disk() } else { Scratch::new() };
        let device = |name: &str| scratch.device(name, (1 << 20) + 48 * SEGMENT);
        let legs = match rng.below(10) {
            0..5 => vec![scratch.leg("a")],
            5..7 => vec![scratch.leg("a"), scratch.leg("b")],
            7 => vec![device("c")],
            8 => vec![scratch.leg("a"), device("c")],
            _ => vec![device("c"), device("d")],
        };
        Victim { _scratch: scratch, legs, content: Content::default(), doubtful: false }
    }

    /// Starts a child, kills it, and looks at what it left. Says what was found of what it did.
    fn die_once(&mut self, rng: &mut Rng, counts: &mut Counts) {
        let seed = rng.next();
        let (mut pipe, end) = std::io::pipe().unwrap();
        let mut child = spawn("crash::child_appends_until_killed", &order(seed, &self.legs), end.into());
        let words = if rng.one_in(8) { 0 } else { rng.below(30) };
        let delay = Duration::from_micros(if words == 0 { rng.below(6000) } else { rng.below(200) });
        let mut progress: Progress = [0, 0];
        let mut ended = false;
        for _ in 0..words {
            match hear(&mut pipe) {
                Some(word) => progress = word,
                None => ended = true,
            }
        }
        let at = Instant::now() + delay;
        while Instant::now() < at {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        while let Some(word) = hear(&mut pipe) {
            progress = word;
        }
        let status = child.wait().unwrap();
        assert!(!ended && status.signal() == Some(libc::SIGKILL), "the child ended by itself: {status}");
        self.look(seed, progress, counts);
    }

    /// Opens the log and compares it with every state that it may be in.
    fn look(&mut self, seed: u64, [appended, durable]: Progress, counts: &mut Counts) {
        let (log, recovered) = open(&self.legs, kill_options()).unwrap_or_else(|error| panic!("{error}: {error:?}"));
        drop(log);
        let found = Content::of(&recovered);
        self.look_at_doubt(seed, [appended, durable], recovered.doubtful);
        let mut script = Script::new(seed, std::mem::take(&mut self.content));
        (0..durable).for_each(|_| drop(script.step()));
        let acknowledged = script.content.brief();
        let mut steps = durable;
        while script.content != found {
            assert!(
                steps < appended,
                "{}: found is none of what may be, {durable} to {appended} steps; acknowledged: {acknowledged}",
                found.brief()
            );
            script.step();
            steps += 1;
        }
        self.content = found;
        counts.kills += 1;
        counts.lost += u64::from(steps < appended);
        counts.kept += u64::from(steps > durable);
        counts.torn += u64::from(recovered.torn_bytes > 0);
    }
}

impl Victim {
    /// A death of the process alone leaves no doubt, but for one case: when the very first group of a mirrored log is on one
    /// copy only, the other one is empty, as if somebody had put a new disk in its place. A state settles it.
    fn look_at_doubt(&mut self, seed: u64, [appended, durable]: Progress, doubtful: bool) {
        let mut script = Script::new(seed, self.content.clone());
        let mut steps = (1..=appended).map(|step| (step, script.step()));
        let first_state = steps.find(|(_, op)| matches!(op, Op::State(_))).map_or(u64::MAX, |(step, _)| step);
        let is_newborn = self.legs.len() > 1 && self.content == Content::default() && durable == 0;
        if doubtful {
            assert!(is_newborn || self.doubtful, "a death of the process alone leaves no doubt: {:?}", self.legs);
            assert!(first_state > durable, "step {first_state} was a state, {durable} are durable: that settles it");
        } else {
            assert!(!self.doubtful || first_state <= appended, "nothing has settled the doubt");
        }
        self.doubtful = doubtful;
    }
}

/// What the kills hit.
#[derive(Debug, Default)]
struct Counts {
    kills: u64,
    /// Something appended and not acknowledged was lost.
    lost: u64,
    /// Something not acknowledged was found.
    kept: u64,
    torn: u64,
}

fn kill_many(seed: u64, kills: u64) -> Counts {
    let mut rng = Rng(seed);
    let mut counts = Counts::default();
    while counts.kills < kills {
        let mut victim = Victim::new(&mut rng);
        for _ in 0..=rng.below(25) {
            victim.die_once(&mut rng, &mut counts);
        }
    }
    counts
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{variable} is no number")))
}

#[test]
fn acknowledged_records_survive_kill_9() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("PLOVER_LOG_SEED").unwrap_or(now.as_nanos() as u64);
    println!("to repeat this: PLOVER_LOG_SEED={seed}");
    let kills = number("PLOVER_LOG_KILLS").unwrap_or(KILLS) / WORKERS;
    let all: Vec<Counts> = std::thread::scope(|scope| {
        let worker = |nth| scope.spawn(move || kill_many(seed.wrapping_add(nth << 32), kills));
        let workers: Vec<_> = (0..WORKERS).map(worker).collect();
        workers.into_iter().map(|worker| worker.join().expect("see above")).collect()
    });
    let sum = |of: fn(&Counts) -> u64| all.iter().map(of).sum::<u64>();
    let (killed, lost, kept) = (sum(|c| c.kills), sum(|c| c.lost), sum(|c| c.kept));
    println!("{killed} kills: {lost} lost something, {kept} kept more than was acknowledged, {} torn", sum(|c| c.torn));
    assert!(lost * 20 > killed && kept * 50 > killed, "the kills must hit the writes, or this test shows nothing");
}

/// Appends entries, no state, from a process that is killed when some are durable.
pub fn kill_without_states(legs: &[LegSpec]) {
    let (mut pipe, end) = std::io::pipe().unwrap();
    let mut command = command("crash::child_appends_until_killed", &order(1, legs));
    let mut child = command.env(NO_STATES_VARIABLE, "yes").stdin(end).spawn().unwrap();
    drop(command);
    while hear(&mut pipe).expect("it goes on until it is killed")[1] < 20 {}
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
#[ignore = "the child of a_failed_write_is_final"]
fn child_hits_a_limit() {
    let Some((limit_bytes, legs)) = read_order() else { return };
    // SAFETY: ignoring a signal installs no handler; this process runs this test only.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let limit = libc::rlimit { rlim_cur: limit_bytes, rlim_max: limit_bytes };
    // SAFETY: the pointer is to a valid rlimit and is only read.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
    assert_eq!(result, 0);
    let (mut log, _) = open(&legs, options(SEGMENT)).unwrap();
    let mut acknowledged = 0;
    for index in 1.. {
        let ticket = entry(&mut *log, index, 1, &[7; 9000]);
        if !settle(&mut *log, ticket) {
            break;
        }
        acknowledged = index;
    }
    let error = log.failed().expect("the write failed");
    assert!(!error.is_full() && error.to_string().contains(legs[0].path().to_str().unwrap()), "{error}");
    let durable = log.durable();
    assert_eq!(durable.0, acknowledged);
    // The log is over, whatever is tried.
    assert!(log.append(Record::State(b"x")).is_err());
    log.flush();
    log.poll();
    assert_eq!(log.durable(), durable);
    println!("acknowledged {acknowledged}");
}

#[test]
fn a_failed_write_is_final() {
    for half_blocks in [1, 4, 5, 16, 17, 30] {
        let dir = Scratch::new();
        let device = [dir.device("device", (1 << 20) + 8 * SEGMENT)];
        // Lays it out.
        drop(open(&device, options(SEGMENT)).unwrap());
        let limit_bytes = (1 << 20) + half_blocks * 2048;
        let mut child = command("crash::child_hits_a_limit", &order(limit_bytes, &device));
        let output = child.stderr(Stdio::inherit()).stdout(Stdio::piped()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        let (_, index) = text.split_once("acknowledged ").expect("the child reports");
        let acknowledged: usize = index.split_whitespace().next().unwrap().parse().unwrap();
        let (mut log, Recovered { entries, doubtful, .. }) = open(&device, options(SEGMENT)).unwrap();
        // A write that ends inside of a block is what drives do not do: it may count as damage.
        assert!(!doubtful || half_blocks % 2 == 1, "in doubt at {half_blocks} half blocks");
        assert!((acknowledged..=acknowledged + 1).contains(&entries.len()), "{} of {acknowledged}", entries.len());
        assert!(entries.iter().all(|entry| entry.bytes == [7; 9000]));
        let ticket = append(&mut *log, Record::State(b"goes on"));
        assert!(settle(&mut *log, ticket));
    }
}

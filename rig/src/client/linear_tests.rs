//! The linearizability checker against histories whose answer is known, and against an oracle that tries every order.

use super::linear::{Action, Operation, Verdict, check};
use super::rng::Rng;

fn op(action: Action, invoked_ns: u64, returned_ns: impl Into<Option<u64>>) -> Operation {
    Operation { client: 0, action, invoked_ns, returned_ns: returned_ns.into() }
}

fn write(value: u64, invoked_ns: u64, returned_ns: impl Into<Option<u64>>) -> Operation {
    op(Action::Write(value), invoked_ns, returned_ns)
}

fn read(value: impl Into<Option<u64>>, invoked_ns: u64, returned_ns: u64) -> Operation {
    op(Action::Read(value.into()), invoked_ns, returned_ns)
}

fn is_good(history: &[Operation]) -> bool {
    check(history) == Verdict::Linearizable
}

#[test]
fn good_histories_are_accepted() {
    assert!(is_good(&[]));
    assert!(is_good(&[read(None, 0, 1), write(1, 2, 3), read(1, 4, 5)]));
    // A concurrent read may see the old or the new value, and both in this order.
    assert!(is_good(&[write(1, 0, 1), write(2, 10, 20), read(1, 11, 13), read(2, 14, 16)]));
    // Two concurrent writes in either order.
    assert!(is_good(&[write(1, 0, 10), write(2, 0, 10), read(1, 11, 12)]));
    assert!(is_good(&[write(1, 0, 10), write(2, 0, 10), read(2, 11, 12)]));
    // An unanswered write may have happened, much later even, or not at all.
    assert!(is_good(&[write(1, 0, 1), write(2, 2, None), read(1, 3, 4), read(1, 90, 91)]));
    assert!(is_good(&[write(1, 0, 1), write(2, 2, None), read(1, 3, 4), read(2, 90, 91)]));
}

#[test]
fn bad_histories_are_refused_with_the_operations_that_contradict() {
    // A lost write.
    assert!(!is_good(&[write(1, 0, 1), read(None, 2, 3)]));
    assert!(!is_good(&[write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)]));
    // New, then old again.
    assert!(!is_good(&[write(1, 0, 1), write(2, 10, 20), read(2, 11, 13), read(1, 14, 16)]));
    // From the future, or from nowhere.
    assert!(!is_good(&[read(1, 0, 1), write(1, 2, 3)]));
    assert!(!is_good(&[read(7, 0, 1)]));
    // An unanswered write that is seen, then not.
    assert!(!is_good(&[write(1, 0, 1), write(2, 2, None), read(2, 3, 4), read(1, 5, 6)]));
    // Two readers that disagree about the order of two concurrent writes.
    let split = [write(1, 0, 10), write(2, 0, 10), read(1, 11, 12), read(2, 13, 14), read(1, 15, 16)];
    let Verdict::Violation(text) = check(&split) else {
        panic!("two orders at once were accepted");
    };
    assert!(text.contains("read 2 [") && text.contains("read 1 ["), "{text}");
}

/// Tries every order.
fn oracle(history: &[Operation]) -> bool {
    fn search(history: &[Operation], done: &mut Vec<bool>, value: Option<u64>) -> bool {
        let open = |at: usize, done: &[bool]| !done[at];
        let answered_left = (0..history.len()).any(|at| open(at, done) && history[at].returned_ns.is_some());
        if !answered_left {
            return true;
        }
        for at in 0..history.len() {
            if done[at] {
                continue;
            }
            let must_wait = (0..history.len()).any(|other| {
                open(other, done)
                    && history[other].returned_ns.is_some_and(|returned| returned < history[at].invoked_ns)
            });
            let next = match history[at].action {
                Action::Write(written) => Some(written),
                Action::Read(seen) if seen == value => value,
                Action::Read(_) => continue,
            };
            if must_wait {
                continue;
            }
            done[at] = true;
            let found = search(history, done, next);
            done[at] = false;
            if found {
                return true;
            }
        }
        false
    }
    search(history, &mut vec![false; history.len()], None)
}

/// A history in which anything may happen; short times, so that intervals touch and overlap often.
fn random_history(rng: &mut Rng, plausible: bool) -> Vec<Operation> {
    let count = 1 + rng.below(7) as u64;
    let mut current = None;
    let mut written = Vec::new();
    let mut history = Vec::new();
    for number in 1..=count {
        // Plausible histories take effect at number × 4 and overlap their neighbours; one read in ten is off by one.
        let (invoked_ns, returned_ns) = if plausible {
            (number * 4 - u64::from(rng.below(5).min(3)), number * 4 + u64::from(rng.below(8)))
        } else {
            let invoked_ns = u64::from(rng.below(12));
            (invoked_ns, invoked_ns + u64::from(rng.below(8)))
        };
        if rng.percent(50) {
            let answered = !rng.percent(20);
            history.push(write(number, invoked_ns, answered.then_some(returned_ns)));
            written.push(number);
            current = Some(number);
        } else {
            let stray = !plausible || rng.percent(10);
            let any = written.get(rng.below(written.len().max(1) as u32) as usize).copied();
            history.push(read(if stray { any } else { current }, invoked_ns, returned_ns));
        }
    }
    history
}

#[test]
fn the_checker_agrees_with_the_oracle() {
    let mut rng = Rng::new(7);
    let (mut good, mut bad) = (0, 0);
    for round in 0..60_000 {
        let history = random_history(&mut rng, round % 2 == 0);
        let expected = oracle(&history);
        assert_eq!(is_good(&history), expected, "round {round}: {history:#?} {:?}", check(&history));
        *(if expected { &mut good } else { &mut bad }) += 1;
    }
    assert!(good > 5_000 && bad > 5_000, "the loop must see both: {good} good, {bad} bad");
}

#[test]
fn a_long_history_is_checked_quickly() {
    let mut history = Vec::new();
    for number in 1..=200_000u64 {
        history.push(write(number, number * 10, number * 10 + 4));
        history.push(read(number, number * 10 + 5, number * 10 + 9));
    }
    assert!(is_good(&history));
    history.push(read(100_000, 5_000_000, 5_000_001));
    assert!(!is_good(&history), "one stale read among 400 000 operations is found");
}

//! Many seeds through the simulator, and wrong variants that it must notice.

use consensus::sim::{self, Mutant, Options, Summary};

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`: must be a number")),
        Err(_) => default,
    }
}

#[test]
fn seeds() {
    let (first, count) = (setting("PLOVER_SIM_FIRST_SEED", 1), setting("PLOVER_SIM_SEEDS", 4000));
    let trace = setting("PLOVER_SIM_TRACE", 0) != 0;
    let mut total = Summary::default();
    for seed in first..first + count {
        match sim::run(&Options { trace, ..Options::new(seed) }) {
            Ok(summary) => total.add(&summary),
            Err(violation) => panic!("{violation}"),
        }
    }
    println!("{count} seeds: {total}");
    if count >= 1000 {
        let Summary { committed, reigns, lives, syncvms, doubtful_starts, ambushes, .. } = total;
        assert!(reigns > 3 * count && committed > 200 * count && lives > 4 * count, "the seeds are too tame");
        assert!(syncvms > 50 * count && ambushes > count && 3 * doubtful_starts > count, "the seeds are too tame");
        assert!(total.whole > count / 2 && total.refused_for_lag > count, "the seeds are too brutal");
    }
}

/// The number of seeds it takes to notice a mistake.
fn seeds_to_notice(mutant: Mutant, invariant: &str, limit: u64) -> u64 {
    let noticed = |seed: &u64| match sim::run(&Options { mutant, ..Options::new(*seed) }) {
        Ok(_) => false,
        Err(violation) => {
            println!("{mutant:?}: {violation}");
            violation.what.contains(invariant)
        }
    };
    (1..=limit).find(noticed).unwrap_or_else(|| panic!("{mutant:?} went unnoticed for {limit} seeds"))
}

#[test]
fn early_acknowledgement_is_noticed() {
    seeds_to_notice(Mutant::AckBeforePersist, "I", 100);
}

#[test]
fn a_guest_that_is_not_there_is_noticed() {
    seeds_to_notice(Mutant::IntactAfterRestart, "I6", 100);
}

#[test]
fn a_majority_of_one_is_noticed() {
    seeds_to_notice(Mutant::ForgedAcknowledgement, "I2", 100);
}

#[test]
fn a_release_without_the_question_is_noticed() {
    seeds_to_notice(Mutant::ReleaseUnasked, "I3", 100);
}

#[test]
fn a_vote_from_a_wiped_disk_is_noticed() {
    seeds_to_notice(Mutant::VoteAfterWipe, "I1", 2000);
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 1..20 {
        let run = || sim::run(&Options::new(seed)).map_err(|violation| violation.to_string());
        assert_eq!(run(), run());
    }
}

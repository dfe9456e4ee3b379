//! The trackers against a real process (see `traced`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{Rng, snapshot};
use crate::traced::{Backing, PAGES, Process};
use huge_pages::HugePages;
use syncvm::hash::HashPool;
use syncvm::tracker::{Candidates, DirtyTracker, TrackerKind, choose};
use syncvm::{DirtySet, GuestRam, PAGE_BYTES, PageNumber};

fn harvest(tracker: &mut dyn DirtyTracker) -> Vec<u32> {
    harvest_of(PAGES, tracker)
}

fn harvest_of(pages: usize, tracker: &mut dyn DirtyTracker) -> Vec<u32> {
    let mut set = DirtySet::new(pages);
    let stats = tracker.harvest(&mut set).unwrap();
    assert!(stats.pages >= set.count());
    set.iter().map(|page| page.0).collect()
}

#[test]
fn the_uffd_tracker_finds_exactly_what_was_written() {
    let mut process = Process::start();
    process.write(&[1, 2]);
    let (mut tracker, choice) = process.tracker(None);
    if choice.kind != TrackerKind::Uffd {
        panic!("this kernel lacks the best tracker: {}", choice.reason);
    }
    assert_eq!(harvest(&mut *tracker), [0u32; 0], "clean at the start");
    process.write(&[0, 5, 6, 7, 2999]);
    assert_eq!(harvest(&mut *tracker), [0, 5, 6, 7, 2999]);
    assert_eq!(harvest(&mut *tracker), [0u32; 0], "reported once");
    process.write(&[5]);
    assert_eq!(harvest(&mut *tracker), [5], "protected again");
    // The backend's own writes are invisible: it records them itself.
    process.ram.write_page(PageNumber(77), &[1; PAGE_BYTES]);
    assert_eq!(harvest(&mut *tracker), [0u32; 0]);
    let mut rng = Rng(1);
    for _ in 0..20 {
        let mut pages: Vec<u32> = (0..200).map(|_| rng.below(PAGES) as u32).collect();
        process.write(&pages);
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(harvest(&mut *tracker), pages);
    }
}

#[test]
fn more_ranges_than_one_call_returns_are_all_found() {
    let mut process = Process::start();
    let (mut tracker, _) = process.tracker(Some(TrackerKind::Uffd));
    let every_other: Vec<u32> = (0..PAGES as u32).step_by(2).collect();
    process.write(&every_other);
    assert_eq!(harvest(&mut *tracker), every_other);
}

/// The completeness test of I4 that every tracker passes: copying what each harvest names, and nothing else, must end with an
/// equal memory although the process writes at random all the time. A tracker that is exact for a stopped guest only is
/// harvested between two storms.
fn no_write_is_missed(process: &mut Process, tracker: &mut dyn DirtyTracker, least_harvests: usize) {
    let mut shadow = snapshot(&process.ram);
    let mut page = [0; PAGE_BYTES];
    let (mut seen, mut harvests) = (0, 0);
    let mut copy = |tracker: &mut dyn DirtyTracker, ram: &GuestRam| {
        let mut set = DirtySet::new(ram.pages());
        tracker.harvest(&mut set).unwrap();
        for number in set.iter() {
            ram.read_page(number, &mut page);
            shadow[number.file_offset()..][..PAGE_BYTES].copy_from_slice(&page);
        }
        seen += set.count();
    };
    let live = tracker.exact_while_running();
    let start = Instant::now();
    process.command("storm 0");
    while harvests < least_harvests || start.elapsed() < Duration::from_millis(300) {
        if !live {
            process.command("calm");
        }
        copy(tracker, &process.ram);
        harvests += 1;
        if !live {
            process.command(&format!("storm {harvests}"));
        }
    }
    process.command("calm");
    copy(tracker, &process.ram);
    assert!(seen > 100, "the storm was seen: {seen}");
    assert!(shadow == snapshot(&process.ram), "a written page was missed");
}

/// The suite with this tracker over this memory, alone and with others who share the work.
fn is_complete(backing: Backing, pages: usize, kind: TrackerKind, least_harvests: usize) {
    let mut process = Process::with(backing, pages);
    process.write(&[1, 2, pages as u32 - 1]);
    let (mut tracker, choice) = process.tracker(Some(kind));
    assert_eq!((tracker.kind(), choice.reason.as_str()), (kind, "asked for by the configuration"));
    for workers in [0, 2] {
        tracker.use_pool(&Arc::new(HashPool::new(workers)));
        no_write_is_missed(&mut process, &mut *tracker, least_harvests);
    }
}

#[test]
fn the_uffd_tracker_misses_nothing_while_the_process_writes() {
    is_complete(Backing::Normal, PAGES, TrackerKind::Uffd, 50);
}

/// Three ranges (the last a short one) for three threads.
#[test]
fn a_large_guest_scanned_by_several_threads_misses_nothing() {
    is_complete(Backing::Normal, 2 * (128 << 20) / PAGE_BYTES + 5, TrackerKind::Uffd, 1);
}

#[test]
fn the_full_tracker_misses_nothing() {
    is_complete(Backing::Normal, PAGES, TrackerKind::Full, 2);
}

#[test]
fn the_soft_dirty_tracker_misses_nothing_where_the_kernel_has_it() {
    let mut process = Process::start();
    match process.try_tracker(Some(TrackerKind::SoftDirty)) {
        Err(error) => assert!(error.to_string().contains("CONFIG_MEM_SOFT_DIRTY"), "{error}"),
        Ok((mut tracker, _)) => {
            assert!(!tracker.exact_while_running());
            process.write(&(0..PAGES as u32).collect::<Vec<_>>());
            harvest(&mut *tracker);
            process.write(&[3, 1000]);
            let found = harvest(&mut *tracker);
            assert!(found.contains(&3) && found.contains(&1000));
            is_complete(Backing::Normal, PAGES, TrackerKind::SoftDirty, 20);
        }
    }
}

#[test]
fn a_guest_on_huge_pages_is_tracked_by_the_huge_page_and_misses_nothing() {
    const HUGE: usize = 8;
    const HUGE_PAGES: usize = (2 << 20) / PAGE_BYTES;
    let _reserved = match HugePages::reserve(HUGE as u64) {
        Ok(reserved) => reserved,
        Err(error) => return eprintln!("SKIPPED: no huge pages to be had here: {error}"),
    };
    let pages = HUGE * HUGE_PAGES;
    let mut process = Process::with(Backing::Huge, pages);
    let (mut tracker, choice) = process.tracker(None);
    assert_eq!(choice.kind, TrackerKind::Uffd, "{}", choice.reason);
    assert_eq!(harvest_of(pages, &mut *tracker), [0u32; 0], "clean at the start");
    let expanded = |huge: &[u32]| -> Vec<u32> {
        huge.iter().flat_map(|huge| huge * HUGE_PAGES as u32..(huge + 1) * HUGE_PAGES as u32).collect()
    };
    process.write(&[5, 511, 1024]);
    assert_eq!(harvest_of(pages, &mut *tracker), expanded(&[0, 2]));
    process.write(&[512]);
    assert_eq!(harvest_of(pages, &mut *tracker), expanded(&[1]), "reported once, and protected again");
    drop((tracker, process));
    is_complete(Backing::Huge, pages, TrackerKind::Uffd, 20);
    is_complete(Backing::Huge, pages, TrackerKind::Full, 2);
}

#[test]
fn without_a_userfaultfd_the_choice_falls_back_and_says_why() {
    let mut process = Process::start();
    process.uffd = None;
    let (tracker, choice) = process.tracker(None);
    assert_ne!(tracker.kind(), TrackerKind::Uffd);
    assert!(choice.reason.contains("not uffd: the agent handed over no userfaultfd"), "{}", choice.reason);
    let Err(error) = process.try_tracker(Some(TrackerKind::Uffd)) else {
        panic!("forcing what is missing must fail");
    };
    assert!(error.to_string().contains("no userfaultfd"), "{error}");
}

#[test]
fn tracking_that_ended_is_an_error_and_not_an_empty_harvest() {
    let mut process = Process::start();
    let (mut tracker, _) = process.tracker(Some(TrackerKind::Uffd));
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    let mut set = DirtySet::new(PAGES);
    assert!(tracker.harvest(&mut set).is_err(), "the process is gone");
    process = Process::start();
    let elsewhere = Process::start();
    let wrong = choose(Candidates {
        pid: process.child.id(),
        ram: elsewhere.ram.fd(),
        pages: PAGES,
        uffd: process.uffd.take(),
        force: Some(TrackerKind::Uffd),
    });
    assert!(wrong.err().unwrap().to_string().contains("share=on"));
}

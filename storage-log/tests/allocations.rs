//! Appending, flushing and polling allocate nothing while a segment lasts; beginning the next one costs a few messages to
//! the keeper.
//!
//! A test binary of its own, because it counts with the global allocator. The count is per thread: keeper and harness
//! allocate on others.

use std::time::Duration;

use counting_allocator::{Counting, allocations};
use storage_log::{LegSpec, Options, Record, open};

#[global_allocator]
static COUNTING: Counting = Counting;

const DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn an_append_allocates_nothing() {
    let dir = std::env::temp_dir().join(format!("plover-log-allocations-{}", std::process::id()));
    let options = Options { segment_bytes: 8 << 20, max_bytes: 64 << 20, ..Options::default() };
    let (mut log, _) = open(&[LegSpec::Dir(dir.clone())], options).unwrap();
    let payload = [7; 700];
    let mut index = 0;
    let mut commit = |records: u64| {
        let mut ticket = log.append(Record::State(&payload[..40])).unwrap();
        for _ in 0..records {
            index += 1;
            ticket = log.append(Record::Entry { index, view: 1, parts: [&payload[..9], &payload[9..]] }).unwrap();
        }
        log.flush();
        assert!(log.wait(ticket, DEADLINE));
        log.truncate_prefix(index.saturating_sub(1));
    };
    // The keeper has answered and everything has its size.
    (0..50).for_each(|round| commit(round % 9));
    let before = allocations();
    (0..400).for_each(|round| commit(1 + round % 9));
    let in_one_segment = allocations() - before;
    (0..4000).for_each(|round| commit(1 + round % 9));
    let in_several = allocations() - before - in_one_segment;
    drop(log);
    let _ = std::fs::remove_dir_all(&dir);
    assert_eq!(in_one_segment, 0, "400 commits in one segment");
    assert!(in_several < 100, "{in_several} allocations for 4000 commits in several segments");
}

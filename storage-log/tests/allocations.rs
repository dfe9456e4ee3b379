//! Appending, flushing and polling allocate nothing while a segment lasts; beginning the next one costs a few messages to
//! the keeper.
//!
//! A test binary of its own, because it counts with the global allocator. The count is per thread: keeper and harness
//! allocate on others.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use storage_log::{LegSpec, Options, Record, open};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

fn count() {
    // A thread that is being torn down has no counter any more; nobody asks for its count either.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every method passes its arguments on to `System` unchanged and returns what that returns, so that
// `System`'s own guarantees hold. Counting allocates nothing: the counter is a constant-initialised `Cell`.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System`, as everything here does, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as in `dealloc`; the caller vouches for `new_size`.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

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
    let before = ALLOCATIONS.get();
    (0..400).for_each(|round| commit(1 + round % 9));
    let in_one_segment = ALLOCATIONS.get() - before;
    (0..4000).for_each(|round| commit(1 + round % 9));
    let in_several = ALLOCATIONS.get() - before - in_one_segment;
    drop(log);
    let _ = std::fs::remove_dir_all(&dir);
    assert_eq!(in_one_segment, 0, "400 commits in one segment");
    assert!(in_several < 100, "{in_several} allocations for 4000 commits in several segments");
}

//! The end of a ring's life, which no test reaches by sending.

use std::sync::Arc;

use super::*;

const BYTES: usize = 4096;
const MESSAGE: [u8; 100] = [7; 100];

/// A ring that has turned so often that only `laps` more are left.
fn old_ring(laps: u64) -> (Producer<Arc<Heap>>, Consumer<Arc<Heap>>) {
    let memory = Arc::new(Heap::new(BYTES));
    let (mut producer, mut consumer) = (Producer::new(memory.clone()), Consumer::new(memory.clone()));
    // Laps count from 1, so this is the first line of the lap `MAX_LAP + 1 - laps`.
    let at = (MAX_LAP - laps) * producer.lines as u64;
    assert_eq!(lap(at, producer.lines), MAX_LAP + 1 - laps);
    (producer.written, producer.consumed) = (at, at);
    (consumer.read, consumer.told) = (at, at);
    memory.control().consumed.0.store(at, Ordering::Relaxed);
    (producer, consumer)
}

#[test]
fn a_ring_that_has_turned_for_the_last_time_says_so_and_loses_nothing() {
    if !module_path!().starts_with("dataplane::") {
        // The copy for loom, whose atomics exist in a model only.
        return;
    }
    let (mut producer, mut consumer) = old_ring(2);
    let (mut sent, mut received) = (0u64, 0u64);
    let mut assembly = Assembly::default();
    let end = loop {
        match producer.push(Kind::Last, &[&sent.to_le_bytes(), &MESSAGE]) {
            Ok(true) => sent += 1,
            Ok(false) => panic!("each record is taken at once"),
            Err(violation) => break violation,
        }
        assembly.clear();
        assert_eq!(consumer.take(&mut assembly), Ok(Some(Kind::Last)));
        assert_eq!(assembly.bytes(), [&received.to_le_bytes()[..], &MESSAGE].concat());
        received += 1;
    };
    assert_eq!(end, Violation::WornOut);
    // Two laps of records, each of at least the window that is used while the consumer keeps up.
    let lines = BYTES / WORD_BYTES / LINE_WORDS;
    let records = |lines: usize| 2 * (lines / record_lines(8 + MESSAGE.len())) as u64;
    let expected = records(window_lines(lines))..=records(lines);
    assert!(received == sent && expected.contains(&sent), "{sent} records instead of {expected:?}");
    // It stays so, for records of any length, and nothing comes out any more.
    assert_eq!(producer.push(Kind::Last, &[&[]]), Err(Violation::WornOut));
    assert_eq!(consumer.take(&mut assembly), Ok(None));
    assert!(end.to_string().contains(&MAX_LAP.to_string()), "{end}");
}

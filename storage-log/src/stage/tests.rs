use super::*;
use crate::block::{Content, examine, stream};
use crate::record::find;
use crate::segment::Members;

fn stage(blocks: usize) -> Stage {
    Stage::new(Box::new(vec![0u8; blocks * BLOCK_BYTES]), Chain(9))
}

fn header(number: u64) -> Header {
    Header {
        id: SegmentId { number, generation: number + 100 },
        log_id: 1,
        epoch: 1,
        members: Members(1),
        blocks: 1000,
        previous_generation: 0,
        previous_blocks: 0,
        chain: Chain(9),
        first: 1,
        doubt: false,
    }
}

/// Takes the first group as a device would: returns the stream bytes of its blocks.
fn write_first(stage: &mut Stage, disk: &mut Vec<u8>) -> Group {
    stage.complete_header(|_| {});
    let group = *stage.first_group().unwrap();
    let bytes = stage.memory()[stage.bytes_of(&group)].to_vec();
    for (block, at) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(group.start..) {
        let Content::Whole(trailer) = examine(block, at) else { panic!("block {at} is not whole") };
        assert_eq!((trailer.segment, trailer.group_start), (group.segment, group.start));
        assert_eq!(trailer.group_blocks, group.blocks);
        if at > 0 {
            disk.extend_from_slice(stream(block, trailer));
        }
    }
    stage.release();
    group
}

#[test]
fn records_come_out_as_they_went_in_across_groups_and_the_ring() {
    let (mut stage, mut disk) = (stage(16), Vec::new());
    stage.begin_segment(header(1));
    let payload = |n: u64| vec![n as u8; (n as usize * 997) % 9000];
    let mut tickets = Vec::new();
    for n in 1..=60 {
        let bytes = payload(n);
        while !stage.fits_memory(record_bytes(bytes.len())) {
            if stage.first_group().is_none() {
                stage.close();
            }
            tickets.push(write_first(&mut stage, &mut disk).ticket);
        }
        stage.append(Kind::Entry, (n, 1), &[&bytes[..bytes.len() / 2], &bytes[bytes.len() / 2..]], n);
    }
    stage.close();
    while stage.first_group().is_some() {
        tickets.push(write_first(&mut stage, &mut disk).ticket);
    }
    assert!(tickets.is_sorted() && tickets.last() == Some(&60));
    let (mut rest, mut chain) = (&disk[..], Chain(9));
    for n in 1..=60 {
        let found = find(rest, chain).unwrap();
        assert_eq!((found.index, found.payload), (n, &payload(n)[..]));
        (rest, chain) = (&rest[found.size()..], found.chain);
    }
    assert!(rest.is_empty());
    assert_eq!(chain, stage.chain());
}

#[test]
fn a_ticket_counts_only_with_the_group_that_ends_its_record() {
    let mut stage = stage(600);
    stage.begin_segment(header(1));
    stage.append(Kind::Entry, (1, 1), &[&[1; 100]], 1);
    // Longer than a group.
    stage.append(Kind::Entry, (2, 1), &[&vec![2; 300 * DATA_BYTES]], 2);
    stage.close();
    let first = write_first(&mut stage, &mut Vec::new());
    assert_eq!((first.start, u64::from(first.blocks)), (0, MAX_GROUP_BLOCKS));
    assert_eq!(first.ticket, 1, "the record goes on in the next group");
    assert_eq!(write_first(&mut stage, &mut Vec::new()).ticket, 2);
    assert!(stage.first_group().is_none());
}

#[test]
fn a_segment_ends_the_group_and_its_header_is_completed_late() {
    let (mut stage, mut disk) = (stage(32), Vec::new());
    stage.begin_segment(header(1));
    stage.append(Kind::State, (0, 0), &[b"s"], 1);
    assert_eq!(stage.segment_blocks_used(), 2);
    stage.begin_segment(header(2));
    stage.append(Kind::State, (0, 0), &[b"t"], 2);
    assert_eq!(write_first(&mut stage, &mut disk).segment.number, 1);
    assert!(stage.has_header_waiting(false));
    stage.close();
    stage.complete_header(|header| header.members = Members(2));
    let at = stage.bytes_of(stage.first_group().unwrap());
    let block: &Block = stage.memory()[at.start..at.start + BLOCK_BYTES].try_into().unwrap();
    let Content::Whole(trailer) = examine(block, 0) else { panic!("not whole") };
    assert_eq!(Header::read(block, trailer).unwrap().members, Members(2));
    assert!(!stage.has_header_waiting(true), "what is in flight cannot be completed any more");
}

#[test]
#[should_panic(expected = "runs over the end of its segment")]
fn a_record_never_leaves_its_segment() {
    let mut stage = stage(32);
    stage.begin_segment(Header { blocks: 2, ..header(1) });
    assert!(!stage.fits_segment(DATA_BYTES + 1));
    stage.append(Kind::Entry, (1, 1), &[&vec![0; DATA_BYTES]], 1);
}

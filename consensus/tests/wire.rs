//! Every message, entry and state survives the wire, and no bytes whatsoever upset the decoder. The second half
//! stands in for a fuzzer: half of its inputs are valid messages with a few bytes changed and the checksum made
//! right again, so that they get past it.

use consensus::{
    Base, Effects, Encoder, Entry, HardState, Index, Message, Payload, ReplicaId, View, Viewstamp, WireError,
};
use proptest::prelude::*;

fn view() -> impl Strategy<Value = View> {
    any::<u64>().prop_map(View)
}

fn index() -> impl Strategy<Value = Index> {
    any::<u64>().prop_map(Index)
}

fn stamp() -> impl Strategy<Value = Viewstamp> {
    (view(), index()).prop_map(|(view, index)| Viewstamp { view, index })
}

fn replica() -> impl Strategy<Value = ReplicaId> {
    (0..7u8).prop_map(ReplicaId)
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..200).prop_map(|bytes| Entry::Input(Payload::from(bytes))),
        replica().prop_map(|with| Entry::SyncVm { with }),
        (proptest::option::of(replica()), index()).prop_map(|(replica, base)| Entry::Second { replica, base }),
        replica().prop_map(|leader| Entry::Noop { leader }),
    ]
}

fn base() -> impl Strategy<Value = Base> {
    let replica = || proptest::option::of(replica());
    (index(), view(), replica(), index(), replica()).prop_map(|(index, view, second, second_base, leader)| Base {
        index,
        view,
        second,
        second_base,
        leader,
    })
}

fn entries() -> impl Strategy<Value = Vec<(View, Entry)>> {
    proptest::collection::vec((view(), entry()), 0..20)
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        view().prop_map(|view| Message::PreVote { view }),
        (view(), any::<bool>(), view())
            .prop_map(|(view, granted, promised)| { Message::PreVoteReply { view, granted, promised } }),
        (view(), any::<u64>()).prop_map(|(view, genesis_nonce)| Message::Prepare { view, genesis_nonce }),
        (view(), stamp(), index()).prop_map(|(view, last, commit)| Message::Promise { view, last, commit }),
        (view(), index()).prop_map(|(view, from)| Message::Fetch { view, from }),
        (view(), stamp(), entries()).prop_map(|(view, prev, entries)| Message::Fetched { view, prev, entries }),
        (view(), base()).prop_map(|(view, base)| Message::FetchedBase { view, base }),
        (view(), stamp(), index(), index(), entries())
            .prop_map(|(view, prev, commit, base, entries)| { Message::Accept { view, prev, commit, base, entries } }),
        (view(), index(), any::<bool>(), index()).prop_map(|(view, through, voting, consumed)| Message::AcceptOk {
            view,
            through,
            voting,
            consumed
        }),
        (view(), index(), stamp(), index())
            .prop_map(|(view, prev, have, commit)| { Message::Reject { view, prev, have, commit } }),
        (view(), base()).prop_map(|(view, base)| Message::InstallBase { view, base }),
        view().prop_map(|promised| Message::Nack { promised }),
        (view(), any::<bool>()).prop_map(|(view, handover)| Message::TakeOver { view, handover }),
        (any::<u64>(), any::<bool>()).prop_map(|(nonce, blank)| Message::Hello { nonce, blank }),
        (any::<u64>(), view(), stamp()).prop_map(|(nonce, promised, last)| Message::HelloReply {
            nonce,
            promised,
            last
        }),
    ]
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

fn seal(body: &mut Vec<u8>) {
    let checksum = crc32c::crc32c(body);
    body.extend_from_slice(&checksum.to_le_bytes());
}

proptest! {
    /// However long the pieces are that a message is summed up in.
    #[test]
    fn the_sum_is_the_crc_of_all_bytes(payloads in prop::collection::vec(0..3000usize, 0..4), fill in any::<u8>()) {
        let entry = |len: &usize| (View(1), Entry::Input(Payload::from(vec![fill; *len])));
        let entries = payloads.iter().map(entry).collect();
        let message = Message::Fetched { view: View(3), prev: Viewstamp { view: View(1), index: Index(2) }, entries };
        let mut effects = Effects::default();
        effects.messages.push((ReplicaId(1), message.clone()));
        let bytes = encoded(&message);
        let (body, sum) = bytes.split_last_chunk::<4>().unwrap();
        prop_assert_eq!(u32::from_le_bytes(*sum), crc32c::crc32c(body));
        effects.send_parts(&mut Encoder::default(), &[], |_, parts| assert_eq!(parts.concat(), bytes));
    }

    #[test]
    fn messages_survive(message in message(), before in proptest::collection::vec(any::<u8>(), 0..9)) {
        let mut bytes = before.clone();
        message.encode(&mut bytes);
        prop_assert_eq!(Message::decode(&bytes[before.len()..]), Ok(message));
    }

    /// In parts too, whichever message was sent before, and whether that was the same one.
    #[test]
    fn parts_are_what_is_encoded_in_one_piece(
        messages in proptest::collection::vec((message(), 1..4usize), 1..5),
        prefix in proptest::collection::vec(any::<u8>(), 0..9),
    ) {
        let (mut effects, mut encoder) = (Effects::default(), Encoder::default());
        let mut expected = Vec::new();
        for (message, times) in messages {
            let mut bytes = prefix.clone();
            message.encode(&mut bytes);
            for to in (0..).map(ReplicaId).take(times) {
                effects.messages.push((to, message.clone()));
                expected.push((to, bytes.clone()));
            }
        }
        let mut sent = Vec::new();
        effects.send_parts(&mut encoder, &prefix, |to, parts| sent.push((to, parts.concat())));
        prop_assert_eq!(sent, expected);
        prop_assert!(effects.messages.is_empty());
    }

    #[test]
    fn entries_survive(entry in entry()) {
        let mut bytes = Vec::new();
        entry.encode_header(&mut bytes);
        bytes.extend_from_slice(entry.payload());
        prop_assert_eq!(Entry::decode(&bytes), Ok(entry));
    }

    #[test]
    fn hard_state_survives(promised in view(), base in base(), learner: bool, void_entries: bool) {
        let state = HardState { promised, base, learner, void_entries };
        let mut bytes = Vec::new();
        state.encode(&mut bytes);
        prop_assert_eq!(HardState::decode(&bytes), Ok(state));
        bytes.pop();
        prop_assert!(HardState::decode(&bytes).is_err());
    }

    #[test]
    fn a_changed_bit_is_noticed(message in message(), at in any::<proptest::sample::Index>(), bit in 0..8u8) {
        let mut bytes = encoded(&message);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let noticed = matches!(Message::decode(&bytes), Err(WireError::Checksum { .. }));
        prop_assert!(noticed);
    }

    #[test]
    fn any_bytes_give_a_value_or_an_error(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Message::decode(&bytes);
        let _ = Entry::decode(&bytes);
        let _ = HardState::decode(&bytes);
        seal(&mut bytes);
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(encoded(&message), bytes);
        }
    }

    #[test]
    fn damaged_messages_give_a_value_or_an_error(
        message in message(),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let mut bytes = encoded(&message);
        bytes.truncate(bytes.len() - 4);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        seal(&mut bytes);
        // What is accepted has exactly one encoding, so that nothing hides in a message.
        if let Ok(message) = Message::decode(&bytes) {
            prop_assert_eq!(encoded(&message), bytes);
        }
    }
}

#[test]
fn a_huge_count_reserves_nothing() {
    let mut bytes = vec![6];
    bytes.extend_from_slice(&[0; 24]);
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    seal(&mut bytes);
    assert!(matches!(Message::decode(&bytes), Err(WireError::OutOfRange { what: "entry count", .. })));
}

//! What a peer can send over the TCP connection and write into the ring, without a device: for the fuzz target.

use super::offer::Offer;
use super::ring::{HEADER_BYTES, Header, Immediate, MIN_RING_BYTES, Receiver, Sender, Violation};

/// Immediate data, length and header.
const ARRIVAL_BYTES: usize = 8 + HEADER_BYTES;

/// An offer, and a series of completions with what they say is in the ring.
///
/// # Panics
/// On a finding.
pub fn arrivals(bytes: &[u8]) {
    if let Ok(offer) = Offer::decode(bytes) {
        assert_eq!(Offer::decode(&offer.encode()), Ok(offer), "an offer changes on its second way over the wire");
    }
    let (mut sender, mut receiver) = (Sender::new(MIN_RING_BYTES), Receiver::new(MIN_RING_BYTES));
    // Something that can be credited.
    while sender.reserve(64, false, receiver.credit()).is_some() {}
    for arrival in bytes.chunks_exact(ARRIVAL_BYTES) {
        if take(&mut sender, &mut receiver, arrival).is_err() {
            // The lane ends.
            return;
        }
        // What the lane does with what has come.
        if receiver.credit_is_due() {
            receiver.told();
        }
    }
}

fn take(sender: &mut Sender, receiver: &mut Receiver, arrival: &[u8]) -> Result<(), Violation> {
    let number = |at: usize| u32::from_le_bytes(arrival[at..at + 4].try_into().expect("four bytes"));
    let length = number(4) as usize;
    match Immediate::decode(number(0)) {
        Immediate::Credit { count } => sender.credit_by_immediate(count),
        Immediate::Record { offset } => {
            receiver.locate(offset, length)?;
            assert!(length > HEADER_BYTES && offset + length <= MIN_RING_BYTES, "{length} bytes at {offset}");
            let header = Header::decode(arrival[8..].try_into().expect("a header"));
            let before = receiver.credit();
            receiver.take(offset, length, header)?;
            assert_eq!(receiver.credit(), before + 1);
            sender.credit_by_header(header)
        }
    }
}

//! What group members tell each other besides consensus: the state of their guest.
//!
//! Shares the fabric's control lane with consensus; the first byte tells the two apart. The report is JSON: it is sent a
//! few times a second, carries the human-readable fingerprint, and must be understood across versions.

use serde::{Deserialize, Serialize};

use crate::qemu::fingerprint::Fingerprint;

/// First byte of a consensus message.
pub const KIND_CONSENSUS: u8 = 1;
/// First byte of a [`GuestReport`].
pub const KIND_REPORT: u8 = 2;

/// What a replica says about its guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct GuestReport {
    /// A QEMU is attached, passed the checks and can take part in a syncvm.
    pub attached: bool,
    /// Its guest is whole: it may take over.
    pub intact: bool,
    /// What must be equal on two replicas; absent until a QEMU is attached.
    pub fingerprint: Option<Fingerprint>,
    /// Why no QEMU is attached or why it was refused.
    pub problem: Option<String>,
}

impl GuestReport {
    /// Appends the wire form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(KIND_REPORT);
        serde_json::to_writer(out, self).expect("a report is plain data and a vector takes it");
    }

    /// Parses what follows the kind byte.
    ///
    /// # Errors
    /// When it is not a report of ours.
    pub fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = GuestReport::decode(&bytes);
        }

        #[test]
        fn a_report_survives_the_wire(attached: bool, intact: bool, problem in proptest::option::of(".*")) {
            let report = GuestReport { attached, intact, fingerprint: None, problem };
            let mut bytes = Vec::new();
            report.encode(&mut bytes);
            prop_assert_eq!(bytes[0], KIND_REPORT);
            prop_assert_eq!(GuestReport::decode(&bytes[1..]).unwrap(), report);
        }
    }
}

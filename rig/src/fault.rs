//! Faults.
/// x
pub struct Fault {}

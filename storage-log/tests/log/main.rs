//! The log against an oracle, against damage and against crashes.

mod common;
mod content;
mod crash;
mod damage;
mod oracle;
mod sample;

//! The log against an oracle, against damage and against crashes.

mod common;
mod content;
mod crash;
mod damage;
mod devices;
mod mirror;
mod oracle;
mod sample;

//! The file log against an oracle, against damage and against crashes.

mod common;
mod crash;
mod damage;
mod oracle;

//! The `plover` daemon and command line.
fn main() {}

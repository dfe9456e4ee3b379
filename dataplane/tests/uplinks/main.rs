//! Real ports of the kernel, each test in a network namespace of its own. Needs root; without it the tests say so and pass.

mod af_packet;
mod common;
mod join;
mod offload;
mod tap;

//! Both lanes of the fabric over the loopback interface.

mod bulk_lane;
mod common;
mod conformance;
mod control_lane;
mod lanes;
mod middleware;
mod security;

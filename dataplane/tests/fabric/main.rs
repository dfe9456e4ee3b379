//! Both lanes of the fabric over the loopback interface.

mod bulk_lane;
mod common;
mod control_lane;
mod security;

//! syncvm through its public interface, against fakes that fail everywhere and against a real process.

mod background;
mod common;
mod delta;
mod device;
mod exchange;
mod rejoin;
mod traced;
mod tracker;

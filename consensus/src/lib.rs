#![forbid(unsafe_code)]
//! Multi-Paxos with views as a sans-IO state machine, and its simulator.

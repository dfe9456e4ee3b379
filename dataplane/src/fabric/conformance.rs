//! What every transport must keep, as functions that a test or a plain program calls: each panics when something is wrong.
//!
//! They see a [`Bed`] only, which makes the two ends of a pair again and again. [`Loopback`] is the bed for replicas in one
//! network; a transport that needs more brings its own. Behind the feature `conformance`, because programs that run
//! replicas have no use for it.

mod bed;
mod bulk;
mod cases;

pub use bed::{Bed, End, Loopback, drive, run_child};

/// A case: its name, and what does it.
pub type Case = (&'static str, fn(&mut dyn Bed));

/// All cases. Each wants a fresh bed.
pub const CASES: &[Case] = &[
    ("order and completeness", cases::order_and_completeness),
    ("back-pressure", cases::back_pressure),
    ("wake-ups of a receiver that sleeps", cases::wake_ups),
    ("wake-ups of a sender without room", cases::wake_ups_for_room),
    ("death of the accepting side at any point", cases::death_of_the_acceptor),
    ("death of the dialing side at any point", cases::death_of_the_dialer),
    ("kill -9 inside a message", cases::kill),
    ("reconnect after a disconnect", cases::reconnect),
    ("silence", cases::silence),
    ("bulk messages of all sizes", bulk::messages),
    ("bulk deadlines and cancellation", bulk::deadlines),
    ("bulk death of either side", bulk::death),
];

//! Frames, guard, uplinks and the fabric between replicas.

//! Durable append-only log.

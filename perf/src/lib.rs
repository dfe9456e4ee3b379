//! Measuring harness.

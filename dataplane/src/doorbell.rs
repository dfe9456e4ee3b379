//! Waking a reactor only when it sleeps: the half of the sleep/wake protocol for sources in memory.
//!
//! The consumer arms the bell, looks at the source once more, and only then sleeps on the bell's descriptor. The producer
//! publishes, then rings: a system call if the bell is armed, two instructions otherwise. Each side does its store before a
//! full fence and its load after it, so at least one of them sees the other: either the producer signals, or the consumer's
//! second look finds what was published. virtio's notification suppression is the same protocol (virtio 1.2 §2.7.10).
//! loom tries every order of the two (`tests/doorbell_loom.rs`); without
//! either fence it finds the lost wake-up.

use crate::sync::{AtomicBool, Ordering, fence};

/// What a bell wakes by.
pub trait Signal {
    /// Makes the sleeper's wait end, now or when it comes to wait.
    fn signal(&self);
}

/// See the module. Any number of producers, one consumer.
#[derive(Debug)]
pub struct Doorbell<S> {
    pub(crate) armed: AtomicBool,
    pub(crate) signal: S,
}

impl<S: Signal> Doorbell<S> {
    /// A bell that is armed: its consumer has not looked at anything yet.
    pub fn over(signal: S) -> Doorbell<S> {
        Doorbell { armed: AtomicBool::new(true), signal }
    }

    /// Consumer: from here on producers signal. Sources must be looked at once more before sleeping.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Consumer: it looks by itself from here on; a signal may still come.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::Relaxed);
    }

    /// Producer: something was published.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) {
            self.signal.signal();
        }
    }
}

//! A queue from threads that may lose their CPU at any moment to one that only ever looks, and must not wait for them.
//!
//! Rejected: the channels of the standard library and crossbeam's queues. In them a writer takes its place and then fills
//! it; a reader that comes in between spins until it is filled. A reactor that runs with real-time priority on the
//! writer's own CPU thereby keeps the writer from ever going on, until the kernel lets other threads run for once: 950 ms
//! in which nothing else does on that CPU. Here the reader finds nothing at such a moment and looks again when it is
//! told to, which the writer does after it has put its item in. Not for the packet path: writers take a lock.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{TryRecvError, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

struct Shared<T> {
    queue: Mutex<Queue<T>>,
    senders: AtomicUsize,
}

struct Queue<T> {
    items: VecDeque<T>,
    capacity: usize,
    has_receiver: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Queue<T>> {
        // Whatever a holder was doing, the queue is one that somebody left whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes both ends, with room for so many items.
pub fn mailbox<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let queue = Queue { items: VecDeque::new(), capacity, has_receiver: true };
    let shared = Arc::new(Shared { queue: Mutex::new(queue), senders: AtomicUsize::new(1) });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

/// An end that items are put into.
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Sender<T> {
    /// Puts an item in. The receiver must then be told to look, by whatever wakes it.
    ///
    /// # Errors
    /// There is no room, or no receiver any more; with the item.
    pub fn send(&self, item: T) -> Result<(), TrySendError<T>> {
        let mut queue = self.0.lock();
        if !queue.has_receiver {
            return Err(TrySendError::Disconnected(item));
        }
        if queue.items.len() >= queue.capacity {
            return Err(TrySendError::Full(item));
        }
        queue.items.push_back(item);
        Ok(())
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::Relaxed);
        Sender(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.senders.fetch_sub(1, Ordering::Release);
    }
}

/// The end that looks.
pub struct Receiver<T>(Arc<Shared<T>>);

impl<T> Receiver<T> {
    /// The oldest item. Never waits: while a sender is putting one in, there is none.
    ///
    /// # Errors
    /// There is none yet, or there never will be one.
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        let mut queue = match self.0.queue.try_lock() {
            Ok(queue) => queue,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(TryRecvError::Empty),
        };
        // Under the lock: what the last sender put in before it went was there when the queue was found empty.
        let none = || match self.0.senders.load(Ordering::Acquire) {
            0 => TryRecvError::Disconnected,
            _ => TryRecvError::Empty,
        };
        queue.items.pop_front().ok_or_else(none)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        queue.has_receiver = false;
        let items = std::mem::take(&mut queue.items);
        // Theirs may be any drop: outside of the lock.
        drop(queue);
        drop(items);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_out_in_order_and_no_more_go_in_than_there_is_room_for() {
        let (sender, receiver) = mailbox(2);
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
        assert_eq!((sender.send(1), sender.send(2), sender.send(3)), (Ok(()), Ok(()), Err(TrySendError::Full(3))));
        assert_eq!((receiver.try_recv(), receiver.try_recv()), (Ok(1), Ok(2)));
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
    }

    /// With a channel of the standard library the reader would spin here until the writer goes on.
    #[test]
    fn a_reader_does_not_wait_for_a_writer_that_was_interrupted() {
        let (sender, receiver) = mailbox(2);
        sender.send(1).unwrap();
        let writing = sender.0.lock();
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
        drop(writing);
        assert_eq!(receiver.try_recv(), Ok(1));
    }

    #[test]
    fn either_end_notices_that_the_other_is_gone_and_nothing_is_lost_before() {
        let (sender, receiver) = mailbox(9);
        let other = sender.clone();
        drop(sender);
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
        other.send(7).unwrap();
        drop(other);
        assert_eq!((receiver.try_recv(), receiver.try_recv()), (Ok(7), Err(TryRecvError::Disconnected)));
        let (sender, receiver) = mailbox(9);
        let item = Arc::new(());
        sender.send(Arc::clone(&item)).unwrap();
        drop(receiver);
        assert_eq!(Arc::strong_count(&item), 1, "what nobody will take is dropped");
        assert!(matches!(sender.send(item), Err(TrySendError::Disconnected(_))));
    }

    #[test]
    fn many_writers_lose_nothing() {
        let (sender, receiver) = mailbox(usize::MAX);
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let sender = sender.clone();
                std::thread::spawn(move || (0..1_000).for_each(|item| sender.send(writer * 1_000 + item).unwrap()))
            })
            .collect();
        drop(sender);
        let mut sum = 0;
        loop {
            match receiver.try_recv() {
                Ok(item) => sum += item,
                Err(TryRecvError::Empty) => std::thread::yield_now(),
                Err(TryRecvError::Disconnected) => break,
            }
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(sum, (0..4_000).sum::<u64>());
    }
}

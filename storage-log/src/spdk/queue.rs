//! Commands in flight: a fixed table that SPDK's callbacks write into.
//!
//! SPDK calls back only from inside a poll, a reset or the freeing of its queue pair, thus on the thread that owns the
//! device. Callbacks and owner share the table through cells, so neither ever holds a unique reference to it.

use std::cell::Cell;
use std::ffi::c_void;

use spdk_sys::{Completion, Controller, QueuePair};

/// What a command does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Write,
    Read,
    Flush,
}

impl Kind {
    pub fn action(self) -> &'static str {
        match self {
            Self::Write => "a write",
            Self::Read => "a read",
            Self::Flush => "a flush",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// The device has it.
    InFlight,
    /// The device has it, and the owner was told that it failed.
    GivenUp,
    /// The device is done with it, and the owner does not know yet.
    Ended,
}

/// What the owner knows of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command {
    pub tag: u64,
    pub kind: Kind,
    pub offset_bytes: u64,
}

/// A command that ended, with NVMe's status (0: success).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub command: Command,
    pub status: u16,
}

/// One place of the table. SPDK gets a pointer to it.
#[derive(Debug)]
pub struct Slot {
    /// The table, which outlives every command.
    queue: Cell<*const Queue>,
    index: u32,
    state: Cell<State>,
    command: Cell<Command>,
}

/// The table. Its address is fixed.
#[derive(Debug)]
pub struct Queue {
    slots: Box<[Slot]>,
    /// Free places, as a stack.
    free: Box<[Cell<u32>]>,
    free_count: Cell<usize>,
    /// What has ended since the owner last looked, in that order; each still has its place, so there is room for all.
    ended: Box<[Cell<(u32, u16)>]>,
    ended_count: Cell<usize>,
    /// Commands that the device has.
    in_device: Cell<usize>,
    /// An I/O command has exceeded its time.
    timed_out: Cell<bool>,
}

const NO_COMMAND: Command = Command { tag: 0, kind: Kind::Flush, offset_bytes: 0 };

impl Queue {
    pub fn new(depth: u32) -> Box<Self> {
        let slot = |index| Slot {
            queue: Cell::new(std::ptr::null()),
            index,
            state: Cell::new(State::Free),
            command: Cell::new(NO_COMMAND),
        };
        let queue = Box::new(Self {
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).rev().map(Cell::new).collect(),
            free_count: Cell::new(depth as usize),
            ended: (0..depth).map(|_| Cell::new((0, 0))).collect(),
            ended_count: Cell::new(0),
            in_device: Cell::new(0),
            timed_out: Cell::new(false),
        });
        let address: *const Self = &raw const *queue;
        queue.slots.iter().for_each(|slot| slot.queue.set(address));
        queue
    }

    /// A place for a command, or none. The caller submits it or calls [`take_back`](Self::take_back).
    pub fn take(&self, command: Command) -> Option<&Slot> {
        let left = self.free_count.get().checked_sub(1)?;
        self.free_count.set(left);
        let slot = &self.slots[self.free[left].get() as usize];
        slot.command.set(command);
        slot.state.set(State::InFlight);
        self.in_device.set(self.in_device.get() + 1);
        Some(slot)
    }

    /// The command was not submitted.
    pub fn take_back(&self, slot: &Slot) {
        self.leave_device();
        self.release(slot);
    }

    /// Calls `f` for what has ended, in that order.
    pub fn drain(&self, mut f: impl FnMut(Ended)) -> usize {
        let count = self.ended_count.replace(0);
        for ended in &self.ended[..count] {
            let (index, status) = ended.get();
            let slot = &self.slots[index as usize];
            self.release(slot);
            f(Ended { command: slot.command.get(), status });
        }
        count
    }

    /// Takes out the end of one command, if it has ended.
    pub fn take_ended(&self, tag: u64) -> Option<Ended> {
        let ended = &self.ended[..self.ended_count.get()];
        let command = |at: &Cell<(u32, u16)>| self.slots[at.get().0 as usize].command.get();
        let found = ended.iter().position(|at| command(at).tag == tag)?;
        let (index, status) = ended[found].get();
        ended[found..].windows(2).for_each(|pair| pair[0].set(pair[1].get()));
        self.ended_count.set(ended.len() - 1);
        let slot = &self.slots[index as usize];
        self.release(slot);
        Some(Ended { command: slot.command.get(), status })
    }

    /// Whether [`drain`](Self::drain) has something.
    pub fn has_ended(&self) -> bool {
        self.ended_count.get() > 0
    }

    fn leave_device(&self) {
        let left = self.in_device.get().checked_sub(1);
        self.in_device.set(left.expect("no command ends twice"));
    }

    fn release(&self, slot: &Slot) {
        slot.state.set(State::Free);
        let count = self.free_count.get();
        self.free[count].set(slot.index);
        self.free_count.set(count + 1);
    }

    /// Calls `f` for every command in flight for which `which` says so. Their ends will not be told any more.
    pub fn give_up(&self, which: impl Fn(Command) -> bool, mut f: impl FnMut(Command)) -> usize {
        let in_flight = self.slots.iter().filter(|slot| slot.state.get() == State::InFlight);
        in_flight
            .filter(|slot| which(slot.command.get()))
            .map(|slot| {
                slot.state.set(State::GivenUp);
                f(slot.command.get());
            })
            .count()
    }

    /// Whether the device has nothing more to do.
    pub fn is_idle(&self) -> bool {
        self.in_device.get() == 0
    }

    /// Whether a command has exceeded its time since this was last asked.
    pub fn has_timed_out(&self) -> bool {
        self.timed_out.replace(false)
    }
}

impl Slot {
    /// What SPDK passes back to [`on_done`].
    pub fn context(&self) -> *mut c_void {
        (&raw const *self).cast_mut().cast()
    }

    fn end(&self, status: u16) {
        // SAFETY: `Queue::new` set it to the table that this place is part of, whose address is fixed.
        let queue = unsafe { &*self.queue.get() };
        queue.leave_device();
        match self.state.get() {
            State::GivenUp => queue.release(self),
            State::InFlight => {
                self.state.set(State::Ended);
                let count = queue.ended_count.get();
                queue.ended[count].set((self.index, status));
                queue.ended_count.set(count + 1);
            }
            State::Free | State::Ended => panic!("command {:?} ended twice", self.command.get()),
        }
    }
}

/// SPDK's callback for every command.
pub unsafe extern "C" fn on_done(io: *mut c_void, completion: *const Completion) {
    // SAFETY: `io` is the context of a place that is in flight. The table outlives all commands (`Controller` frees it last), and
    // it is only ever shared.
    let slot = unsafe { &*io.cast::<Slot>() };
    // SAFETY: SPDK passes the completion of this command.
    slot.end(unsafe { spdk_sys::plover_spdk_status(completion) });
}

/// SPDK's callback for a command that has exceeded its time.
pub unsafe extern "C" fn on_timeout(context: *mut c_void, ctrlr: *mut Controller, qpair: *mut QueuePair, _: u16) {
    if qpair.is_null() {
        // An admin command: SPDK itself waits for it in places that have no limit; a failed controller ends that.
        // SAFETY: SPDK passes the controller that it polls.
        unsafe { spdk_sys::plover_spdk_fail(ctrlr) };
    }
    // SAFETY: the context is the table, which outlives the controller's last poll.
    let queue = unsafe { &*context.cast::<Queue>() };
    queue.timed_out.set(true);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(tag: u64) -> Command {
        Command { tag, kind: Kind::Write, offset_bytes: tag * 4096 }
    }

    fn drained(queue: &Queue) -> Vec<(u64, u16)> {
        let mut all = Vec::new();
        queue.drain(|ended| all.push((ended.command.tag, ended.status)));
        all
    }

    #[test]
    fn places_run_out_and_come_back() {
        let queue = Queue::new(2);
        let (one, two) = (queue.take(write(1)).unwrap(), queue.take(write(2)).unwrap());
        assert!(queue.take(write(3)).is_none());
        two.end(7);
        assert!(queue.take(write(3)).is_none(), "the place is free when the end is known");
        assert_eq!(drained(&queue), [(2, 7)]);
        let three = queue.take(write(3)).unwrap();
        one.end(0);
        assert!(!queue.is_idle());
        three.end(0);
        assert!(queue.is_idle());
        // Each exactly once, in the order in which they ended, although 2 and 3 had the same place.
        assert_eq!(drained(&queue), [(1, 0), (3, 0)]);
        assert_eq!(drained(&queue), []);
        let four = queue.take(write(4)).unwrap();
        queue.take_back(four);
        assert!(queue.is_idle() && drained(&queue).is_empty());
    }

    #[test]
    fn one_end_is_taken_before_its_turn() {
        let queue = Queue::new(3);
        let slots = [1, 2, 3].map(|tag| queue.take(write(tag)).unwrap());
        slots.iter().for_each(|slot| slot.end(0));
        assert_eq!(queue.take_ended(9), None);
        assert_eq!(queue.take_ended(2), Some(Ended { command: write(2), status: 0 }));
        assert_eq!(queue.take_ended(2), None);
        queue.take(write(4)).unwrap().end(0);
        assert!(queue.take(write(5)).is_none());
        assert_eq!(drained(&queue), [(1, 0), (3, 0), (4, 0)]);
        assert!(!queue.has_ended());
    }

    #[test]
    fn a_late_end_of_what_was_given_up_is_silent() {
        let queue = Queue::new(2);
        let (one, two) = (queue.take(write(1)).unwrap(), queue.take(write(2)).unwrap());
        one.end(0);
        let mut told = Vec::new();
        assert_eq!(queue.give_up(|_| true, |command| told.push(command.tag)), 1);
        assert_eq!(told, [2]);
        assert_eq!(queue.give_up(|_| true, |_| ()), 0, "told once");
        assert!(!queue.is_idle(), "the device still has it");
        two.end(0);
        assert!(queue.is_idle());
        assert_eq!(drained(&queue), [(1, 0)]);
    }
}

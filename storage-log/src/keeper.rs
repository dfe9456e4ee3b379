//! The keeper: does what may block, so that the thread that appends never does. It makes places for segments ahead of
//! their use, gives old ones back, and rebuilds copies.
//!
//! Devices of the kernel have it on a thread of its own. A device that may be touched by one thread only (SPDK) has it
//! inline: its places need no metadata, so that nothing in there takes long.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use rustix::fd::OwnedFd;

use crate::LogError;
use crate::block::BLOCK_BYTES;
use crate::segment::SegmentNumber;
use crate::volume::{Access, CHUNK_BYTES, Geometry, Volume, aligned_buffer};

/// What the keeper is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Make places for a segment on all copies.
    Prepare(SegmentNumber),
    /// Give back the places of segments below.
    Release(SegmentNumber),
    /// Let go of a copy that failed.
    GiveUp(usize),
    /// Open a copy anew, and make places for these segments there.
    Reopen { leg: usize, segments: Vec<SegmentNumber> },
    /// Fill a copy with these segments, so many blocks of each, from the other copies.
    Copy { leg: usize, segments: Vec<(SegmentNumber, u32)> },
}

/// What became of it.
pub(crate) enum Reply<P> {
    /// Places by copy. One that has none failed.
    Prepared { number: SegmentNumber, places: Vec<Option<P>> },
    /// No room for a segment now.
    NoRoom { number: SegmentNumber, error: LogError },
    /// A copy cannot be used any more.
    Failed { leg: usize, error: LogError },
    /// A copy is open again, empty, with these places.
    Reopened { leg: usize, places: Vec<(SegmentNumber, P)> },
    /// A copy holds what it was to be filled with.
    Copied { leg: usize },
}

/// See the module.
pub(crate) struct Keeper<V: Volume> {
    pub specs: Vec<V::Spec>,
    pub geometry: Geometry,
    pub volumes: Vec<Option<V>>,
}

impl<V: Volume> Keeper<V> {
    fn handle(&mut self, command: Command, reply: &mut dyn FnMut(Reply<V::Place>)) {
        match command {
            Command::Prepare(number) => self.prepare(number, reply),
            Command::Release(below) => self.release(below),
            Command::GiveUp(leg) => self.volumes[leg] = None,
            Command::Reopen { leg, segments } => match self.reopen(leg, &segments) {
                Ok(places) => reply(Reply::Reopened { leg, places }),
                Err(error) => reply(Reply::Failed { leg, error }),
            },
            Command::Copy { leg, segments } => match self.copy(leg, &segments) {
                Ok(()) => reply(Reply::Copied { leg }),
                Err(error) => reply(Reply::Failed { leg, error }),
            },
        }
    }

    fn prepare(&mut self, number: SegmentNumber, reply: &mut dyn FnMut(Reply<V::Place>)) {
        let mut places = Vec::new();
        for (leg, volume) in self.volumes.iter_mut().enumerate() {
            places.push(match volume.as_mut().map(|volume| volume.prepare(number)) {
                None => None,
                Some(Ok(place)) => Some(place),
                Some(Err(error)) if error.is_full() => return reply(Reply::NoRoom { number, error }),
                Some(Err(error)) => {
                    reply(Reply::Failed { leg, error });
                    None
                }
            });
        }
        reply(Reply::Prepared { number, places });
    }

    fn release(&mut self, below: SegmentNumber) {
        for volume in self.volumes.iter_mut().flatten() {
            for number in volume.segments().into_iter().filter(|number| *number < below) {
                if let Err(error) = volume.release(number) {
                    // It costs space, and is tried again when the log is opened.
                    tracing::warn!(error = &error as &dyn std::error::Error, "an old segment is not given back");
                }
            }
        }
    }

    fn reopen(&mut self, leg: usize, segments: &[SegmentNumber]) -> Result<Vec<(SegmentNumber, V::Place)>, LogError> {
        // First: it may hold a lock.
        self.volumes[leg] = None;
        let mut volume = V::open(&self.specs[leg], self.geometry, Access::Rebuild)?;
        let places: Result<Vec<_>, _> =
            segments.iter().map(|number| volume.prepare(*number).map(|place| (*number, place))).collect();
        self.volumes[leg] = Some(volume);
        places
    }

    fn copy(&mut self, leg: usize, segments: &[(SegmentNumber, u32)]) -> Result<(), LogError> {
        for &(number, blocks) in segments {
            copy_segment(&mut self.volumes, leg, number, blocks)?;
        }
        Ok(())
    }
}

/// Copies the first `blocks` of a segment to a copy, from another one that has them.
fn copy_segment<V: Volume>(
    volumes: &mut [Option<V>],
    leg: usize,
    number: SegmentNumber,
    blocks: u32,
) -> Result<(), LogError> {
    let mut buffer = aligned_buffer(CHUNK_BYTES)?;
    let mut at = 0;
    if let Some(volume) = &mut volumes[leg] {
        volume.prepare(number)?;
    }
    while at < blocks {
        let wanted = ((blocks - at) as usize).min(buffer.len() / BLOCK_BYTES) * BLOCK_BYTES;
        let mut source = volumes.iter().enumerate().filter(|(other, _)| *other != leg).filter_map(|(_, v)| v.as_ref());
        let source = source.find(|volume| volume.segments().contains(&number));
        // Given back in the meantime: it is not needed any more.
        let Some(source) = source else { return Ok(()) };
        let read = source.read(number, at, &mut buffer[..wanted])?;
        if read == 0 {
            break;
        }
        let Some(volume) = &mut volumes[leg] else { return Ok(()) };
        volume.write(number, at, &buffer[..read * BLOCK_BYTES])?;
        at += read as u32;
    }
    match &mut volumes[leg] {
        Some(volume) => volume.sync(number),
        None => Ok(()),
    }
}

/// How the engine talks to its keeper.
pub(crate) enum Port<V: Volume> {
    /// On its own thread.
    Thread { commands: Option<Sender<Command>>, replies: Receiver<Reply<V::Place>>, thread: Option<JoinHandle<()>> },
    /// In the engine's thread.
    #[cfg_attr(not(any(test, feature = "spdk")), expect(dead_code, reason = "for devices of one thread"))]
    Inline { keeper: Keeper<V>, replies: VecDeque<Reply<V::Place>> },
}

impl<V: Volume + Send + 'static> Port<V>
where
    V::Place: Send,
    V::Spec: Send,
{
    /// Starts the keeper's thread, which signals `wake` after each reply.
    pub fn spawn(mut keeper: Keeper<V>, wake: Arc<OwnedFd>) -> std::io::Result<Port<V>> {
        let (commands, to_do) = channel();
        let (answers, replies) = channel();
        let thread = std::thread::Builder::new().name("log-keeper".to_owned()).spawn(move || {
            while let Ok(command) = to_do.recv() {
                keeper.handle(command, &mut |reply| {
                    // Nobody listens while the log is being closed.
                    let _ = answers.send(reply);
                    // EAGAIN: the counter is full, so it is readable anyway.
                    let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
                });
            }
        })?;
        Ok(Port::Thread { commands: Some(commands), replies, thread: Some(thread) })
    }
}

impl<V: Volume> Port<V> {
    pub fn send(&mut self, command: Command) {
        match self {
            Port::Thread { commands, .. } => {
                let commands = commands.as_ref().expect("only drop takes it");
                commands.send(command).expect("the keeper lives as long as the log");
            }
            Port::Inline { keeper, replies } => keeper.handle(command, &mut |reply| replies.push_back(reply)),
        }
    }

    pub fn receive(&mut self) -> Option<Reply<V::Place>> {
        match self {
            Port::Thread { replies, .. } => replies.try_recv().ok(),
            Port::Inline { replies, .. } => replies.pop_front(),
        }
    }
}

impl<V: Volume> Drop for Port<V> {
    fn drop(&mut self) {
        if let Port::Thread { commands, thread, .. } = self {
            *commands = None;
            if let Some(thread) = thread.take()
                && thread.join().is_err()
            {
                tracing::error!("the log's keeper panicked");
            }
        }
    }
}

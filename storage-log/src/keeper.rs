//! The keeper: does what may block, so that the thread that appends never does. It makes places for segments ahead of
//! their use, gives old ones back, and rebuilds copies.
//!
//! Devices of the kernel have it on a thread of its own. A device that may be touched by one thread only (SPDK) has it
//! inline: its places need no metadata, so that nothing in there takes long, and copies are made a piece per turn.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use rustix::fd::OwnedFd;

use crate::LogError;
use crate::block::BLOCK_BYTES;
use crate::segment::{Members, SegmentNumber};
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
    /// Fill a copy with these segments, so many blocks of each, from copies that have everything.
    Copy { leg: usize, sources: Members, segments: VecDeque<(SegmentNumber, u32)> },
}

/// A copy that is being filled.
struct Filling {
    leg: usize,
    sources: Members,
    /// What is left: segments, and so many blocks of each.
    segments: VecDeque<(SegmentNumber, u32)>,
    /// The next block of the first of them.
    at: u32,
    buffer: memmap2::MmapMut,
}

impl Filling {
    fn new(leg: usize, sources: Members, segments: VecDeque<(SegmentNumber, u32)>) -> Result<Filling, LogError> {
        Ok(Filling { leg, sources, segments, at: 0, buffer: aligned_buffer(CHUNK_BYTES)? })
    }

    /// Goes on to the next segment, if there is one.
    fn skip(&mut self) -> bool {
        self.at = 0;
        self.segments.pop_front();
        !self.segments.is_empty()
    }
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
    specs: Vec<V::Spec>,
    geometry: Geometry,
    volumes: Vec<Option<V>>,
    /// Segments below were given back.
    released: SegmentNumber,
    /// Copies being filled, one after the other, a piece at a time: places must not wait for that.
    fillings: VecDeque<Filling>,
}

impl<V: Volume> Keeper<V> {
    pub fn new(specs: Vec<V::Spec>, geometry: Geometry, volumes: Vec<Option<V>>) -> Keeper<V> {
        Keeper { specs, geometry, volumes, released: 0, fillings: VecDeque::new() }
    }

    fn handle(&mut self, command: Command, reply: &mut dyn FnMut(Reply<V::Place>)) {
        match command {
            Command::Prepare(number) => self.prepare(number, reply),
            Command::Release(below) => self.release(below),
            Command::GiveUp(leg) => {
                self.fillings.retain(|filling| filling.leg != leg);
                self.volumes[leg] = None;
            }
            Command::Reopen { leg, segments } => match self.reopen(leg, &segments) {
                Ok(places) => reply(Reply::Reopened { leg, places }),
                Err(error) => reply(Reply::Failed { leg, error }),
            },
            Command::Copy { leg, sources, segments } => match Filling::new(leg, sources, segments) {
                Ok(filling) => self.fillings.push_back(filling),
                Err(error) => reply(Reply::Failed { leg, error }),
            },
        }
    }

    fn is_filling(&self) -> bool {
        !self.fillings.is_empty()
    }

    /// Copies a piece, if a copy is being filled.
    fn work(&mut self, reply: &mut dyn FnMut(Reply<V::Place>)) {
        let Some(mut filling) = self.fillings.pop_front() else { return };
        let leg = filling.leg;
        match self.copy_piece(&mut filling) {
            Ok(true) => self.fillings.push_front(filling),
            Ok(false) => reply(Reply::Copied { leg }),
            Err(error) => reply(Reply::Failed { leg, error }),
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
        self.released = self.released.max(below);
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
        // Only if it is of use: otherwise its full disk would hold up the others.
        let places = places?;
        self.volumes[leg] = Some(volume);
        Ok(places)
    }

    /// Copies the next blocks, from another copy that has them. Returns whether there is more to do.
    fn copy_piece(&mut self, filling: &mut Filling) -> Result<bool, LogError> {
        let Filling { leg, sources, segments, at, buffer } = filling;
        let Some(&(number, blocks)) = segments.front() else { return Ok(false) };
        if *at == 0
            && let Some(volume) = &mut self.volumes[*leg]
        {
            volume.prepare(number)?;
        }
        let wanted = (blocks.saturating_sub(*at) as usize).min(buffer.len() / BLOCK_BYTES) * BLOCK_BYTES;
        let others = self.volumes.iter().enumerate().filter(|(other, _)| other != leg && sources.contains(*other));
        let source = others.filter_map(|(_, volume)| volume.as_ref()).find(|v| v.segments().contains(&number));
        let read = match source {
            Some(source) if wanted > 0 => source.read(number, *at, &mut buffer[..wanted])?,
            Some(_) => 0,
            // Given back in the meantime: it is not needed any more.
            None if number < self.released => return Ok(filling.skip()),
            None => {
                let path = self.volumes[*leg].as_ref().map(|volume| volume.describe(number)).unwrap_or_default();
                return Err(LogError::Incomplete { path, blocks: blocks.saturating_sub(*at) as usize });
            }
        };
        let Some(volume) = &mut self.volumes[*leg] else { return Ok(false) };
        if read > 0 {
            volume.write(number, *at, &buffer[..read * BLOCK_BYTES])?;
            *at += read as u32;
        }
        if read == 0 || *at >= blocks {
            volume.sync(number)?;
            return Ok(filling.skip());
        }
        Ok(true)
    }
}

/// How the engine talks to its keeper.
pub(crate) enum Port<V: Volume> {
    /// On its own thread.
    Thread { commands: Option<Sender<Command>>, replies: Receiver<Reply<V::Place>>, thread: Option<JoinHandle<()>> },
    /// In the engine's thread.
    Inline(Inline<V>),
}

/// A keeper without a thread.
pub(crate) struct Inline<V: Volume> {
    keeper: Keeper<V>,
    replies: VecDeque<Reply<V::Place>>,
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
            let mut reply = |reply| {
                // Nobody listens while the log is being closed.
                let _ = answers.send(reply);
                // EAGAIN: the counter is full, so it is readable anyway.
                let _ = rustix::io::write(&*wake, &1u64.to_ne_bytes());
            };
            loop {
                let next = if keeper.is_filling() { to_do.try_recv() } else { to_do.recv().map_err(Into::into) };
                match next {
                    Ok(command) => keeper.handle(command, &mut reply),
                    Err(TryRecvError::Empty) => keeper.work(&mut reply),
                    Err(TryRecvError::Disconnected) => return,
                }
            }
        })?;
        Ok(Port::Thread { commands: Some(commands), replies, thread: Some(thread) })
    }
}

impl<V: Volume> Port<V> {
    /// A keeper that works when it is asked for replies.
    #[cfg_attr(not(any(test, feature = "spdk")), expect(dead_code, reason = "for devices of one thread"))]
    pub fn inline(keeper: Keeper<V>) -> Port<V> {
        Port::Inline(Inline { keeper, replies: VecDeque::new() })
    }

    /// Whether it has something to do that goes on only when it is asked for replies.
    pub fn has_work(&self) -> bool {
        matches!(self, Port::Inline(inline) if inline.keeper.is_filling() || !inline.replies.is_empty())
    }

    pub fn send(&mut self, command: Command) {
        match self {
            Port::Thread { commands, .. } => {
                let commands = commands.as_ref().expect("only drop takes it");
                commands.send(command).expect("the keeper lives as long as the log");
            }
            Port::Inline(Inline { keeper, replies }) => keeper.handle(command, &mut |reply| replies.push_back(reply)),
        }
    }

    /// Lets a keeper without a thread do a piece of its work.
    pub fn work(&mut self) {
        if let Port::Inline(Inline { keeper, replies }) = self {
            keeper.work(&mut |reply| replies.push_back(reply));
        }
    }

    pub fn receive(&mut self) -> Option<Reply<V::Place>> {
        match self {
            Port::Thread { replies, .. } => replies.try_recv().ok(),
            Port::Inline(inline) => inline.replies.pop_front(),
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

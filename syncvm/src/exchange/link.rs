//! `Link`: a channel plus what every exchange needs from it: headers, counting, and sorting out messages that
//! belong to an exchange that was given up, or already to the next one.

use std::cmp::Ordering;
use std::io::IoSlice;
use std::time::{Duration, Instant};

use super::{Channel, ChannelError, Deadlines, SyncError, Traffic};
use crate::dirty::DirtySet;
use crate::transfer::{Abort, Header, Kind, Piece, Terms, WireError};

/// How long the courtesy of telling the peer why we gave up may take.
const ABORT_PATIENCE: Duration = Duration::from_millis(20);

pub(crate) struct Link<C> {
    pub channel: C,
    /// A message of a later exchange that arrived during this one.
    put_back: Option<(u16, Vec<u8>)>,
    message: Vec<u8>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub traffic: Traffic,
}

impl<C: Channel> Link<C> {
    pub fn new(channel: C) -> Self {
        Self {
            channel,
            put_back: None,
            message: Vec::new(),
            bytes_sent: 0,
            bytes_received: 0,
            traffic: Traffic::default(),
        }
    }

    /// Begins counting for a new exchange.
    pub fn reset_counts(&mut self) {
        self.bytes_sent = 0;
        self.bytes_received = 0;
        self.traffic = Traffic::default();
    }

    pub fn replace(&mut self, channel: C) {
        self.channel = channel;
        self.put_back = None;
    }

    pub fn send(&mut self, header: &Header, kind: Kind, parts: &[&[u8]], deadline: Instant) -> Result<(), SyncError> {
        let head = header.encode();
        let mut slices = [IoSlice::new(&head), IoSlice::new(&[]), IoSlice::new(&[]), IoSlice::new(&[])];
        assert!(parts.len() < slices.len(), "at most three parts");
        for (slot, part) in slices[1..].iter_mut().zip(parts) {
            *slot = IoSlice::new(part);
        }
        self.channel.send(kind as u16, &slices[..=parts.len()], deadline)?;
        let body: usize = parts.iter().map(|part| part.len()).sum();
        self.bytes_sent += (head.len() + body) as u64;
        self.traffic.add(kind, head.len() + body);
        Ok(())
    }

    /// Waits for a message of exactly this exchange; its body is then [`Self::body`].
    pub fn recv(&mut self, expected: &Header, deadlines: &Deadlines) -> Result<Kind, SyncError> {
        let deadline = deadlines.next();
        loop {
            let (kind, header) = self.recv_any(expected.group, deadline)?;
            match header.order().cmp(&expected.order()) {
                Ordering::Equal if kind == Kind::Abort => return Err(self.abort()?),
                Ordering::Equal => return Ok(kind),
                Ordering::Less => {}
                Ordering::Greater => {
                    self.put_back = Some((kind as u16, std::mem::take(&mut self.message)));
                    return Err(SyncError::Superseded { view: header.view, number: header.number });
                }
            }
            if Instant::now() >= deadline {
                return Err(ChannelError::Timeout.into());
            }
        }
    }

    /// Waits for any message of the group.
    pub fn recv_any(&mut self, group: u64, deadline: Instant) -> Result<(Kind, Header), SyncError> {
        let kept = self.put_back.take();
        let is_new = kept.is_none();
        let code = match kept {
            Some((code, message)) => {
                self.message = message;
                code
            }
            None => self.channel.recv(&mut self.message, deadline)?,
        };
        let (header, _) = Header::decode(&self.message)?;
        if header.group != group {
            return Err(SyncError::ForeignGroup { ours: group, theirs: header.group });
        }
        let kind = Kind::from_code(code).ok_or(WireError::Value { field: "message kind", value: code.into() })?;
        if is_new {
            self.bytes_received += self.message.len() as u64;
            self.traffic.add(kind, self.message.len());
        }
        Ok((kind, header))
    }

    /// Keeps the message just received for the next [`Self::recv`].
    pub fn put_back(&mut self, kind: Kind) {
        self.put_back = Some((kind as u16, std::mem::take(&mut self.message)));
    }

    /// Whether a message is kept for the next [`Self::recv`] and satisfies `test`.
    pub fn kept(&self, test: impl FnOnce(Kind, &Header) -> bool) -> bool {
        self.put_back.as_ref().is_some_and(|(code, message)| match (Kind::from_code(*code), Header::decode(message)) {
            (Some(kind), Ok((header, _))) => test(kind, &header),
            _ => false,
        })
    }

    /// Like [`Self::recv`], but only `wanted` will do.
    pub fn expect(
        &mut self,
        expected: &Header,
        wanted: Kind,
        name: &'static str,
        deadlines: &Deadlines,
    ) -> Result<&[u8], SyncError> {
        let got = self.recv(expected, deadlines)?;
        if got != wanted {
            return Err(SyncError::Unexpected { got, wanted: name });
        }
        Ok(self.body())
    }

    /// The body of the message received last.
    pub fn body(&self) -> &[u8] {
        self.message.get(Header::BYTES..).unwrap_or_default()
    }

    fn abort(&self) -> Result<SyncError, SyncError> {
        let abort = Abort::decode(self.body())?;
        let Abort { needs_rejoin, hash_agreed_falsely, reason } = abort;
        Ok(SyncError::PeerAborted { needs_rejoin, hash_agreed_falsely, reason })
    }

    /// Tells the peer that this side gave up, so that it need not wait for its deadline. Best effort.
    pub fn send_abort(&mut self, header: &Header, error: &SyncError) {
        if error.channel_broken() || matches!(error, SyncError::PeerAborted { .. }) {
            return;
        }
        let abort = Abort {
            needs_rejoin: error.needs_rejoin(),
            hash_agreed_falsely: error.hash_agreed_falsely(),
            reason: error.to_string(),
        };
        let deadline = Instant::now() + ABORT_PATIENCE;
        if let Err(error) = self.send(header, Kind::Abort, &[&abort.encode()], deadline) {
            tracing::debug!(%error, "the peer could not be told that the exchange was given up");
        }
    }

    /// Sends terms and a dirty set, in as many messages as it takes.
    pub fn send_set(
        &mut self,
        header: &Header,
        kind: Kind,
        terms: &Terms,
        set: &DirtySet,
        deadlines: &Deadlines,
    ) -> Result<(), SyncError> {
        let mut wire = Vec::new();
        set.encode(&mut wire);
        let terms = terms.encode();
        for piece in Piece::cut(&wire) {
            self.send(header, kind, &[&terms, &piece.head(), piece.bytes], deadlines.next())?;
        }
        Ok(())
    }

    /// Receives what [`Self::send_set`] sent and checks that both sides mean the same guest.
    pub fn recv_set(
        &mut self,
        header: &Header,
        kind: Kind,
        ours: &Terms,
        deadlines: &Deadlines,
    ) -> Result<(Terms, DirtySet), SyncError> {
        let pages = ours.ram_pages as usize;
        let mut wire = Vec::new();
        let mut first = None;
        loop {
            let body = self.expect(header, kind, "a dirty set", deadlines)?;
            let (theirs, piece) = Terms::decode(body)?;
            check_terms(ours, &theirs)?;
            if *first.get_or_insert(theirs) != theirs {
                return Err(WireError::Value { field: "terms of a piece", value: wire.len() as u64 }.into());
            }
            if piece.append_to(&mut wire, DirtySet::max_encoded_bytes(pages))? {
                return Ok((theirs, DirtySet::decode(&wire, pages)?));
            }
        }
    }

    /// Sends something long that is not a set.
    pub fn send_pieces(
        &mut self,
        header: &Header,
        kind: Kind,
        whole: &[u8],
        deadlines: &Deadlines,
    ) -> Result<(), SyncError> {
        for piece in Piece::cut(whole) {
            self.send(header, kind, &[&piece.head(), piece.bytes], deadlines.next())?;
        }
        Ok(())
    }

    /// Receives what [`Self::send_pieces`] sent.
    pub fn recv_pieces(
        &mut self,
        header: &Header,
        kind: Kind,
        name: &'static str,
        limit_bytes: usize,
        deadlines: &Deadlines,
    ) -> Result<Vec<u8>, SyncError> {
        let mut whole = Vec::new();
        loop {
            let body = self.expect(header, kind, name, deadlines)?;
            if Piece::decode(body)?.append_to(&mut whole, limit_bytes)? {
                return Ok(whole);
            }
        }
    }
}

fn check_terms(ours: &Terms, theirs: &Terms) -> Result<(), SyncError> {
    let (ours, theirs) = (ours.ram_pages, theirs.ram_pages);
    if ours != theirs {
        return Err(SyncError::Mismatch { what: "the number of RAM pages", ours, theirs });
    }
    Ok(())
}

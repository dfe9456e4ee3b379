//! The bulk connection as syncvm's channel.

use std::io::IoSlice;
use std::time::Instant;

use dataplane::fabric::bulk::{BulkError, BulkLink};
use syncvm::exchange::{Channel, ChannelError};

/// A [`BulkLink`], or none yet: then every call fails as if the peer were gone.
#[derive(Debug, Default)]
pub struct BulkChannel(pub Option<BulkLink>);

impl Channel for BulkChannel {
    fn send(&mut self, kind: u16, parts: &[IoSlice<'_>], deadline: Instant) -> Result<(), ChannelError> {
        let link = self.0.as_mut().ok_or(ChannelError::Closed)?;
        link.send(kind, parts, deadline).map_err(|error| channel_error(&error))
    }

    fn recv(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<u16, ChannelError> {
        let link = self.0.as_mut().ok_or(ChannelError::Closed)?;
        link.recv(buf, deadline).map_err(|error| channel_error(&error))
    }
}

fn channel_error(error: &BulkError) -> ChannelError {
    if error.is_timeout() {
        ChannelError::Timeout
    } else if error.is_cancelled() || error.is_peer_lost() {
        ChannelError::Closed
    } else {
        ChannelError::Io(std::io::Error::other(error.to_string()))
    }
}

//! The asking side of the control socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Request, Response};

/// Why the daemon gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("{path}: no daemon answers ({source}); is `plover run` running with this configuration?")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The daemon took longer than it may, or hung up.
    #[error("{path}: the daemon did not answer: {source}")]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The answer is not one of ours: the two versions differ.
    #[error("{path}: the daemon's answer is not understood ({reason}); is it another version?")]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// The parser's words.
        reason: String,
    },
}

/// Asks the daemon behind `path` one thing and waits at most `timeout` for the answer.
///
/// # Errors
/// When the daemon cannot be reached or does not answer in time.
pub fn request(path: &Path, request: &Request, timeout: Duration) -> Result<Response, ControlError> {
    let no_answer = |source| ControlError::NoAnswer { path: path.to_owned(), source };
    let mut stream =
        UnixStream::connect(path).map_err(|source| ControlError::Unreachable { path: path.to_owned(), source })?;
    stream.set_read_timeout(Some(timeout)).map_err(no_answer)?;
    stream.set_write_timeout(Some(timeout)).map_err(no_answer)?;
    let mut line = serde_json::to_string(request).expect("a request is plain data");
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(no_answer)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).map_err(no_answer)?;
    serde_json::from_str(&answer)
        .map_err(|error| ControlError::Garbled { path: path.to_owned(), reason: error.to_string() })
}

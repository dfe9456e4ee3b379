//! What can go wrong in the test bed. One enum for the crate: nobody reacts to the differences, people read them.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Result of everything in this crate that touches the machine.
pub type Result<T, E = RigError> = std::result::Result<T, E>;

/// Every variant says what was tried, where, and what to do if something can be done.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// Namespaces and mounts need privileges.
    #[error("the test bed makes network namespaces and mounts, so it needs root; start it again with sudo")]
    NotRoot,
    /// A part that `cargo xtask setup` makes is not there.
    #[error("{} is missing; run «cargo xtask setup»", path.display())]
    NotSetUp {
        /// The missing file.
        path: PathBuf,
    },
    /// A program under test has not been built.
    #[error("{name} is not built; run «cargo build --workspace», with --release for demo and measurements")]
    NotBuilt {
        /// Its file name.
        name: String,
    },
    /// A system call or file operation failed.
    #[error("{what}")]
    Io {
        /// What was tried, and on what.
        what: String,
        /// The reason.
        source: io::Error,
    },
    /// A tool such as ip, nft or tc failed.
    #[error("«{line}» failed: {said}")]
    Tool {
        /// The command line with its input.
        line: String,
        /// What it printed.
        said: String,
    },
    /// Something did not happen in time.
    #[error("gave up after {waited:?} waiting for {what}{hint}")]
    Deadline {
        /// What was awaited.
        what: String,
        /// How long.
        waited: Duration,
        /// Where to look, beginning with a separator; or empty.
        hint: String,
    },
    /// A process ended when it should not have.
    #[error("{name} ended ({status}) while waiting for {what}; its log {} ends with:\n{tail}", log.display())]
    Ended {
        /// The process's name.
        name: String,
        /// How it ended.
        status: String,
        /// What was awaited.
        what: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// Another error with what the cluster said of itself at that time.
    #[error("{0}")]
    Explained(String),
}

/// Gives an I/O error the words that it lacks.
pub(crate) trait Context<T> {
    /// `what` is «cannot …».
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| RigError::Io { what: what(), source: error.into() })
    }
}

/// An error with all its reasons in one line, for those that can only be printed.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut reason = error.source();
    while let Some(error) = reason {
        text += &format!(": {error}");
        reason = error.source();
    }
    text
}

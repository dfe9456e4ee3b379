//! The files a user writes: `node.toml` (this host) and `vms/NAME.toml` (one VM group each).
//!
//! Every field has a default that works unless only the user can know it; an unknown key is an error, because a misspelt
//! safety setting that is silently ignored is worse than a daemon that does not start. Errors name file, line and field.

mod filter;
mod node;
mod uplink;
mod vm;

use std::path::{Path, PathBuf};

pub use node::{DEFAULT_FABRIC_KEY, HugePages, Idle, NodeConfig, Scheduling};
pub use uplink::{Uplink, UplinkKind};
pub use vm::{
    Degraded, HashKind, MemoryBackend, Mode, Policy, ReplicaConfig, SocketSide, SyncPolicy, TrackerChoice, VmConfig,
};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: cannot be read: {source}; check the path and its permissions")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is not what the format asks for. `message` carries line, column and the offending key.
    #[error("{path}: {message}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// The parser's words, with the line.
        message: String,
    },
    /// The key between the nodes.
    #[error("fabric_key: {0}")]
    Key(#[from] dataplane::fabric::KeyError),
    /// A value is understood but makes no sense.
    #[error("{path}: {field}: {message}")]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// What is wrong and what to write instead.
        message: String,
    },
}

/// Reads and parses one TOML file.
fn read_toml<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
    toml::from_str(&text).map_err(|error| ConfigError::Syntax { path: path.to_owned(), message: error.to_string() })
}

/// Shorthand for an [`ConfigError::Invalid`].
fn invalid(path: &Path, field: &str, message: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { path: path.to_owned(), field: field.to_owned(), message: message.into() }
}

/// Six hexadecimal bytes with colons.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part =
            parts.next().filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests;

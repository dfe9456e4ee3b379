//! Who may speak on the fabric, and how its bytes are kept from everybody else.
//!
//! Guest memory crosses the fabric, so a connection is encrypted and both sides prove that they hold the nodes'
//! common key, unless the user switched that off on every node. The handshake is Noise (`NNpsk0`): fresh
//! Diffie-Hellman keys on each connection, mixed with the key, so a recorded handshake is worth nothing, and a key
//! that is stolen later opens no recorded traffic. All of this module is without I/O.
//!
//! Rejected: mutual TLS (certificates to issue and renew, for three hosts that one person owns, and a parser of
//! X.509 in front of everything), and a cipher of our own over the raw keys (some 10 % faster than the library's
//! transport, which copies once more; both are far above what a link or the kernel's TCP can carry).

mod cipher;
mod handshake;
mod key;

pub(super) use cipher::{Cipher, MAX_PLAIN_BYTES, Parts, Records, sealed_bytes};
pub(super) use handshake::{Accept, Dialer, Greeted, encode_answer};
pub use key::{FabricKey, KeyError};

/// What protects the connections of a node. All nodes must agree.
#[derive(Debug, Clone)]
pub enum Security {
    /// Peers prove that they hold the key, and everything but RDMA payload is encrypted.
    Encrypted(FabricKey),
    /// Nothing: whoever reaches the port can read, forge and impersonate.
    Insecure,
}

//! What each side tells the other over the authenticated TCP connection before they connect over RDMA.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub const TOKEN_BYTES: usize = 32;
/// Changed with the layout below, the records' or the counts of `ring.rs`.
const VERSION: u16 = 1;

/// A secret of one set-up. Whoever shows it was told it over the authenticated connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; TOKEN_BYTES]);

impl Token {
    /// Whether the private data of a connection begins with it. Takes as long for any bytes.
    pub fn opens(&self, private: &[u8]) -> bool {
        let Some(shown) = private.get(..TOKEN_BYTES) else { return false };
        self.0.iter().zip(shown).fold(0, |differences, (ours, theirs)| differences | (ours ^ theirs)) == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Where this side waits for the connection; port 0 if it makes it.
    pub listens: SocketAddr,
    /// The other side has to show it.
    pub token: Token,
    /// Where this side's ring is in its memory.
    pub ring_address: u64,
    /// The ring's key.
    pub rkey: u32,
    /// The ring's size.
    pub ring_bytes: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    version: U16,
    port: U16,
    ring_bytes: U32,
    rkey: U32,
    ring_address: U64,
    /// IPv4 addresses are mapped ones.
    address: [u8; 16],
    token: [u8; TOKEN_BYTES],
}

/// Why an offer makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadOffer {
    /// Not as long as offers are.
    #[error("its offer has {bytes} bytes, not {}", size_of::<Wire>())]
    Length {
        /// Its length.
        bytes: usize,
    },
    /// Of another version of this program.
    #[error("its offer is of version {version}, ours of {VERSION}; run the same version on all nodes")]
    Version {
        /// Its version.
        version: u16,
    },
}

impl Offer {
    /// As sent.
    pub fn encode(&self) -> Vec<u8> {
        let address = match self.listens.ip() {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        let wire = Wire {
            version: VERSION.into(),
            port: self.listens.port().into(),
            ring_bytes: self.ring_bytes.into(),
            rkey: self.rkey.into(),
            ring_address: self.ring_address.into(),
            address: address.octets(),
            token: self.token.0,
        };
        wire.as_bytes().to_vec()
    }

    /// As received.
    ///
    /// # Errors
    /// [`BadOffer`].
    pub fn decode(bytes: &[u8]) -> Result<Offer, BadOffer> {
        let wire = Wire::ref_from_bytes(bytes).map_err(|_| BadOffer::Length { bytes: bytes.len() })?;
        if wire.version != VERSION {
            return Err(BadOffer::Version { version: wire.version.get() });
        }
        let address = Ipv6Addr::from(wire.address).to_canonical();
        Ok(Offer {
            listens: SocketAddr::new(address, wire.port.get()),
            token: Token(wire.token),
            ring_address: wire.ring_address.get(),
            rkey: wire.rkey.get(),
            ring_bytes: wire.ring_bytes.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{BadOffer, Offer, TOKEN_BYTES, Token};
    use proptest::prelude::*;

    fn offer(listens: &str) -> Offer {
        let token = Token(std::array::from_fn(|at| at as u8 + 1));
        Offer {
            listens: listens.parse().unwrap(),
            token,
            ring_address: 0x7f00_0020_0000,
            rkey: 77,
            ring_bytes: 1 << 20,
        }
    }

    #[test]
    fn offers_lead_back() {
        for listens in ["10.0.0.1:4791", "[2001:db8::7]:1", "[::]:0"] {
            assert_eq!(Offer::decode(&offer(listens).encode()), Ok(offer(listens)));
        }
        let mut other = offer("10.0.0.1:1").encode();
        other[0] = 9;
        assert_eq!(Offer::decode(&other), Err(BadOffer::Version { version: 9 }));
    }

    #[test]
    fn only_the_whole_token_opens() {
        let token = offer("10.0.0.1:1").token;
        let mut private = [0; 56];
        private[..TOKEN_BYTES].copy_from_slice(&token.0);
        assert!(token.opens(&private) && token.opens(&private[..TOKEN_BYTES]));
        assert!(!token.opens(&private[..TOKEN_BYTES - 1]) && !token.opens(&[]));
        for at in 0..TOKEN_BYTES {
            let mut wrong = private;
            wrong[at] ^= 1;
            assert!(!token.opens(&wrong), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_offer_or_none(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(offer) = Offer::decode(&bytes) {
                prop_assert_eq!(Offer::decode(&offer.encode()), Ok(offer));
            }
        }

        #[test]
        fn any_bytes_of_the_right_length_are_read(mut bytes in prop::collection::vec(any::<u8>(), size_of::<super::Wire>())) {
            (bytes[0], bytes[1]) = (1, 0);
            let offer = Offer::decode(&bytes).unwrap();
            prop_assert_eq!(Offer::decode(&offer.encode()), Ok(offer));
        }
    }
}

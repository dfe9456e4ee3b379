//! Names of keys and contents of values: every write carries a value that no other write of the run carries.
//!
//! A value is the writer's token (connection, generation, sequence) as 16 hexadecimal digits, repeated until the value's
//! size is reached, so that a damaged byte anywhere in it is noticed as well. All fields have fixed width: encoding one
//! operation is a few copies and no formatting.

use std::fmt;

/// Bytes of a key's name: `RRRRRRRR:CCC:GGG:KKKKK`.
pub const KEY_BYTES: usize = 8 + 1 + 3 + 1 + 3 + 1 + 5;
/// Hexadecimal digits of a token; the smallest value size.
pub const TOKEN_BYTES: usize = 16;
/// Connections and generations per connection that a token can name.
pub const MAX_CONNECTIONS: u16 = 0xfff;
/// Keys per connection that a key's name can hold.
pub const MAX_KEYS: u32 = 0xf_ffff;
const SEQUENCE_BITS: u32 = 40;

/// Identity of one write: connection (12 bits), its generation (12), sequence number in it (40, from 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

impl Token {
    /// # Panics
    /// If a field does not fit: the caller checks its parameters before the run.
    pub fn new(connection: u16, generation: u16, sequence: u64) -> Token {
        assert!(connection <= MAX_CONNECTIONS && generation <= MAX_CONNECTIONS);
        assert!(sequence < 1 << SEQUENCE_BITS);
        Token(u64::from(connection) << 52 | u64::from(generation) << SEQUENCE_BITS | sequence)
    }

    /// Position of the write among those of its connection and generation.
    pub fn sequence(self) -> u64 {
        self.0 & ((1 << SEQUENCE_BITS) - 1)
    }

    fn digits(self) -> [u8; TOKEN_BYTES] {
        let mut digits = [0; TOKEN_BYTES];
        hex(&mut digits, self.0);
        digits
    }

    /// Appends the value of `size` bytes that this write stores.
    pub fn write_value(self, size: usize, out: &mut Vec<u8>) {
        let digits = self.digits();
        let whole = size / TOKEN_BYTES;
        for _ in 0..whole {
            out.extend_from_slice(&digits);
        }
        out.extend_from_slice(&digits[..size % TOKEN_BYTES]);
    }

    /// Whether `bytes` are exactly the value of `size` bytes that this write stored.
    pub fn is_value(self, bytes: &[u8], size: usize) -> bool {
        let digits = self.digits();
        bytes.len() == size && bytes.chunks(TOKEN_BYTES).all(|chunk| *chunk == digits[..chunk.len()])
    }

    /// The write that stored `bytes`, if they begin with a token.
    pub fn of_value(bytes: &[u8]) -> Option<Token> {
        let digits = std::str::from_utf8(bytes.get(..TOKEN_BYTES)?).ok()?;
        u64::from_str_radix(digits, 16).ok().map(Token)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connection = self.0 >> 52;
        let generation = self.0 >> SEQUENCE_BITS & 0xfff;
        write!(f, "write {} of connection {connection} generation {generation}", self.sequence())
    }
}

/// A key's name; `run` keeps runs against one server apart.
pub fn key_name(run: u32, connection: u16, generation: u16, key: u32) -> [u8; KEY_BYTES] {
    let mut name = [b':'; KEY_BYTES];
    hex(&mut name[..8], u64::from(run));
    hex(&mut name[9..12], u64::from(connection));
    hex(&mut name[13..16], u64::from(generation));
    hex(&mut name[17..], u64::from(key));
    name
}

/// Fills `out` with the lowest hexadecimal digits of `number`.
pub fn hex(out: &mut [u8], mut number: u64) {
    for digit in out.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_names_its_write_and_shows_any_damaged_byte() {
        let token = Token::new(63, 2, 123_456_789);
        for size in [16, 17, 64, 100] {
            let mut value = Vec::new();
            token.write_value(size, &mut value);
            assert_eq!(value.len(), size);
            assert_eq!(Token::of_value(&value), Some(token));
            assert!(token.is_value(&value, size));
            assert!(!Token::new(63, 2, 123_456_790).is_value(&value, size));
            assert!(!token.is_value(&value[..size - 1], size));
            for at in 0..size {
                value[at] ^= 1;
                assert!(!token.is_value(&value, size), "byte {at} of {size}");
                value[at] ^= 1;
            }
        }
    }

    #[test]
    fn key_names_have_fixed_width() {
        assert_eq!(&key_name(0xdead_beef, 63, 1, 0x1234), b"deadbeef:03f:001:01234");
    }

    #[test]
    fn a_foreign_value_has_no_token() {
        assert_eq!(Token::of_value(b"hello"), None);
        assert_eq!(Token::of_value(b"hello, this is not hexadecimal"), None);
    }
}

//! A total reader for little-endian wire forms: it never panics and never reads beyond its input.

use thiserror::Error;

/// Why bytes from a peer were refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The message ends before the named field.
    #[error("message from peer ends before its {0}")]
    Short(&'static str),
    /// Bytes are left after the last field.
    #[error("message from peer has {0} bytes too many")]
    Trailing(usize),
    /// A field has a value that no correct peer sends.
    #[error("message from peer has an impossible {field}: {value}")]
    Value {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
}

/// Reads fields from the front of a byte slice.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, bytes: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        if bytes > self.0.len() {
            return Err(WireError::Short(field));
        }
        let (front, rest) = self.0.split_at(bytes);
        self.0 = rest;
        Ok(front)
    }

    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, field)?);
        Ok(array)
    }

    pub fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        Ok(self.array::<1>(field)?[0])
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// LEB128, at most 10 bytes.
    pub fn varint(&mut self, field: &'static str) -> Result<u64, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(field)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(WireError::Value { field, value: bits });
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::Value { field, value })
    }

    pub fn end(&self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::Trailing(self.0.len())) }
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

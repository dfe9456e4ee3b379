//! The Redis protocol (RESP2) as far as a checking client needs it: encode commands, parse one reply.
//!
//! The parser is total: any byte string gives a reply, «not yet complete» or an error, within the given limits, and never
//! a panic. Arrays and RESP3 types are refused, because no command that we send is answered with one, so such an
//! answer is a fault of the server that has to be seen.

use thiserror::Error;

/// Longest status, error or integer line that is accepted, in bytes.
pub const MAX_LINE_BYTES: usize = 4096;

/// One complete answer of the server, borrowed from the receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply<'a> {
    /// `+OK`
    Simple(&'a [u8]),
    /// `-ERR …`
    Error(&'a [u8]),
    /// `:1`
    Integer(i64),
    /// `$3 abc`
    Bulk(&'a [u8]),
    /// `$-1`: there is no such key.
    Nil,
}

/// The server's bytes are not a reply that this client can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RespError {
    /// The first byte names no reply type of ours.
    #[error("reply starts with byte {0:#04x}, which is no RESP2 status, error, integer or bulk string")]
    UnknownType(u8),
    /// A line without an end within [`MAX_LINE_BYTES`].
    #[error("reply line is longer than {MAX_LINE_BYTES} bytes")]
    LineTooLong,
    /// The number after `:` or `$` is no number.
    #[error("reply has a malformed number")]
    BadNumber,
    /// The server announces more than the client asked for.
    #[error("reply announces {announced} bytes, limit is {limit}")]
    BulkTooLong {
        /// Announced length in bytes.
        announced: u64,
        /// What the caller accepts, in bytes.
        limit: usize,
    },
    /// The bytes after a bulk string are not CR LF.
    #[error("bulk string does not end with CR LF")]
    BadTerminator,
}

/// Parses the first reply in `input`.
///
/// Returns the reply and how many bytes it took, or `None` if more bytes are needed.
///
/// # Errors
/// [`RespError`] when no continuation of `input` could be an acceptable reply.
pub fn parse(input: &[u8], max_bulk_bytes: usize) -> Result<Option<(Reply<'_>, usize)>, RespError> {
    let Some(&kind) = input.first() else {
        return Ok(None);
    };
    if !matches!(kind, b'+' | b'-' | b':' | b'$') {
        return Err(RespError::UnknownType(kind));
    }
    let Some(line) = line(&input[1..])? else {
        return Ok(None);
    };
    let used = 1 + line.len() + 2;
    match kind {
        b'+' => Ok(Some((Reply::Simple(line), used))),
        b'-' => Ok(Some((Reply::Error(line), used))),
        b':' => Ok(Some((Reply::Integer(number(line)?), used))),
        _ => bulk(input, used, number(line)?, max_bulk_bytes),
    }
}

fn bulk(input: &[u8], start: usize, announced: i64, limit: usize) -> Result<Option<(Reply<'_>, usize)>, RespError> {
    if announced == -1 {
        return Ok(Some((Reply::Nil, start)));
    }
    let announced = u64::try_from(announced).map_err(|_| RespError::BadNumber)?;
    if announced > limit as u64 {
        return Err(RespError::BulkTooLong { announced, limit });
    }
    let end = start + announced as usize;
    match input.get(end..end + 2) {
        None => Ok(None),
        Some(b"\r\n") => Ok(Some((Reply::Bulk(&input[start..end]), end + 2))),
        Some(_) => Err(RespError::BadTerminator),
    }
}

/// The bytes before the first CR LF.
fn line(input: &[u8]) -> Result<Option<&[u8]>, RespError> {
    // Lines here are a few bytes («OK», «64»), so a plain loop beats a vectorised search.
    let window = &input[..input.len().min(MAX_LINE_BYTES + 2)];
    for (at, &byte) in window.iter().enumerate() {
        if byte == b'\r' && window.get(at + 1) == Some(&b'\n') {
            return Ok(Some(&window[..at]));
        }
    }
    if input.len() >= MAX_LINE_BYTES + 2 {
        return Err(RespError::LineTooLong);
    }
    Ok(None)
}

fn number(digits: &[u8]) -> Result<i64, RespError> {
    let (negative, digits) = match digits {
        [b'-', rest @ ..] => (true, rest),
        rest => (false, rest),
    };
    if digits.is_empty() || digits.len() > 18 {
        return Err(RespError::BadNumber);
    }
    let mut value = 0i64;
    for &digit in digits {
        if !digit.is_ascii_digit() {
            return Err(RespError::BadNumber);
        }
        value = value * 10 + i64::from(digit - b'0');
    }
    Ok(if negative { -value } else { value })
}

/// Appends one command with its arguments to `out`.
pub fn command(out: &mut Vec<u8>, arguments: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", arguments.len()).as_bytes());
    for argument in arguments {
        out.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        out.extend_from_slice(argument);
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::rng::Rng;

    #[test]
    fn every_reply_type_is_parsed_and_counted() {
        for (bytes, reply) in [
            (&b"+OK\r\n"[..], Reply::Simple(b"OK")),
            (b"-ERR no\r\n", Reply::Error(b"ERR no")),
            (b":-42\r\n", Reply::Integer(-42)),
            (b"$3\r\na\r\n\r\n", Reply::Bulk(b"a\r\n")),
            (b"$0\r\n\r\n", Reply::Bulk(b"")),
            (b"$-1\r\n", Reply::Nil),
        ] {
            let mut longer = bytes.to_vec();
            longer.extend_from_slice(b"+next");
            assert_eq!(parse(&longer, 64), Ok(Some((reply, bytes.len()))));
        }
    }

    #[test]
    fn every_prefix_of_a_reply_asks_for_more() {
        for bytes in [&b"+OK\r\n"[..], b":17\r\n", b"$5\r\nhello\r\n", b"$-1\r\n"] {
            for cut in 0..bytes.len() {
                assert_eq!(parse(&bytes[..cut], 64), Ok(None), "{cut} bytes of {bytes:?}");
            }
        }
    }

    #[test]
    fn faulty_answers_are_refused_with_their_reason() {
        assert_eq!(parse(b"*1\r\n", 64), Err(RespError::UnknownType(b'*')));
        assert_eq!(parse(b"$x\r\n", 64), Err(RespError::BadNumber));
        assert_eq!(parse(b"$-2\r\n", 64), Err(RespError::BadNumber));
        assert_eq!(parse(b"$\r\n", 64), Err(RespError::BadNumber));
        assert_eq!(parse(b"$65\r\n", 64), Err(RespError::BulkTooLong { announced: 65, limit: 64 }));
        assert_eq!(parse(b"$1\r\nabc", 64), Err(RespError::BadTerminator));
        assert_eq!(parse(&[b'+'; 2 * MAX_LINE_BYTES], 64), Err(RespError::LineTooLong));
    }

    #[test]
    fn no_byte_string_panics_or_claims_more_than_it_has() {
        let alphabet = b"+-:$*\r\n0123456789a";
        let mut rng = Rng::new(1);
        for _ in 0..200_000 {
            let length = rng.below(24) as usize;
            let bytes: Vec<u8> = (0..length).map(|_| alphabet[rng.below(alphabet.len() as u32) as usize]).collect();
            if let Ok(Some((_, used))) = parse(&bytes, 16) {
                assert!(used <= bytes.len() && used >= 3, "{bytes:?} used {used}");
            }
        }
    }

    #[test]
    fn commands_are_arrays_of_bulk_strings() {
        let mut out = Vec::new();
        command(&mut out, &[b"GET", b"k\r\n1"]);
        assert_eq!(out, b"*2\r\n$3\r\nGET\r\n$4\r\nk\r\n1\r\n");
    }
}

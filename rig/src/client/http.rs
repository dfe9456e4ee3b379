//! Readiness of a web server: GET / is answered with status 200.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longest answer that is read, in bytes.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Gets `/` and returns its body.
///
/// # Errors
/// The server cannot be reached, does not answer in time, or answers with another status than 200.
pub fn get(address: SocketAddr, timeout: Duration) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: plover\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
    body(answer)
}

fn body(mut answer: Vec<u8>) -> io::Result<Vec<u8>> {
    let head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let status = answer.get(..12).filter(|line| line.starts_with(b"HTTP/1.")).map(|line| &line[9..12]);
    match (head, status) {
        (Some(head), Some(b"200")) => Ok(answer.split_off(head + 4)),
        _ => {
            let line = answer.split(|&byte| byte == b'\r').next().unwrap_or_default();
            Err(io::Error::other(format!("GET / was answered with {:?}", String::from_utf8_lossy(line))))
        }
    }
}

//! Readiness of a memcached server: a value that was set can be got.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Sets a value and gets it back.
///
/// # Errors
/// The server cannot be reached, does not answer in time, or answers something else.
pub fn probe(address: SocketAddr, timeout: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    exchange(&mut stream, b"set plover:probe 0 60 5\r\nready\r\n", b"STORED\r\n")?;
    exchange(&mut stream, b"get plover:probe\r\n", b"VALUE plover:probe 0 5\r\nready\r\nEND\r\n")
}

fn exchange(stream: &mut TcpStream, request: &[u8], expected: &[u8]) -> io::Result<()> {
    stream.write_all(request)?;
    let mut answer = vec![0; expected.len()];
    stream.read_exact(&mut answer)?;
    if answer == expected {
        return Ok(());
    }
    Err(io::Error::other(format!("memcached answered {:?}", String::from_utf8_lossy(&answer))))
}

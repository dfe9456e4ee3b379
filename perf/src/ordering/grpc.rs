//! The calls of etcd that are needed, over HTTP/2 with as many in flight as wanted.
//!
//! Own few lines over `h2` instead of a whole gRPC client: every microsecond that the driver burns, etcd lacks,
//! since both share the CPUs; and the three messages have one or two fields each. Rejected: etcd's JSON gateway,
//! which has the server translate every request to gRPC.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

/// For one call of this module.
const DEADLINE: Duration = Duration::from_secs(120);
const WINDOW_BYTES: u32 = 1 << 20;

/// A client of one etcd node.
pub struct Client {
    runtime: Runtime,
    connections: Vec<SendRequest<Bytes>>,
    addr: SocketAddr,
}

/// What a node says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its own id.
    pub member: u64,
    /// The id of the leader that it knows; 0 if it knows none.
    pub leader: u64,
}

impl Client {
    /// Connects `connections` times.
    ///
    /// # Errors
    /// Nobody answers there.
    pub fn connect(addr: SocketAddr, connections: usize) -> Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let connect = async {
            let mut senders = Vec::new();
            for _ in 0..connections {
                let stream = TcpStream::connect(addr).await?;
                stream.set_nodelay(true)?;
                let mut builder = h2::client::Builder::new();
                builder.initial_window_size(WINDOW_BYTES).initial_connection_window_size(WINDOW_BYTES);
                let (sender, connection) = builder.handshake(stream).await?;
                // Ends with the last sender; its errors reach the calls.
                tokio::spawn(connection);
                senders.push(sender);
            }
            Ok(senders)
        };
        let connections: Vec<SendRequest<Bytes>> = block_on(&runtime, connect)?;
        Ok(Client { runtime, connections, addr })
    }

    /// Asks the node for its status.
    pub fn status(&self) -> Result<Status> {
        let answer = self.call("etcdserverpb.Maintenance/Status", Bytes::new())?;
        let member = number(bytes_field(&answer, 1)?, 2)?;
        Ok(Status { member, leader: number(&answer, 4)? })
    }

    /// The revision of the store, which counts puts, and the value of `key`; empty if there is none.
    pub fn get(&self, key: &[u8]) -> Result<(u64, Vec<u8>)> {
        let answer = self.call("etcdserverpb.KV/Range", message(&[(1, key)]))?;
        let revision = number(bytes_field(&answer, 1)?, 3)?;
        let pair = bytes_field(&answer, 2)?;
        Ok((revision, bytes_field(pair, 5)?.to_vec()))
    }

    /// Puts `value` under each of `keys` in turn, `puts` times in all, with `in_flight` calls under way.
    ///
    /// # Errors
    /// A call failed.
    pub fn put_many(&self, puts: u64, in_flight: usize, keys: &[Vec<u8>], value: &[u8]) -> Result<()> {
        let path = "etcdserverpb.KV/Put";
        let messages: Arc<[Bytes]> = keys.iter().map(|key| framed(&message(&[(1, key), (2, value)]))).collect();
        let next = Arc::new(AtomicU64::new(0));
        let uri = self.uri(path);
        let work = async {
            let mut tasks: JoinSet<Result<()>> = JoinSet::new();
            for task in 0..in_flight {
                let sender = self.connections[task % self.connections.len()].clone();
                let (messages, next, uri) = (Arc::clone(&messages), Arc::clone(&next), uri.clone());
                tasks.spawn(async move {
                    loop {
                        let put = next.fetch_add(1, Ordering::Relaxed);
                        if put >= puts {
                            return Ok(());
                        }
                        let message = messages[put as usize % messages.len()].clone();
                        unary(&sender, &uri, message).await?;
                    }
                });
            }
            while let Some(ended) = tasks.join_next().await {
                ended??;
            }
            Ok(())
        };
        block_on(&self.runtime, work)
    }

    fn call(&self, path: &str, message: Bytes) -> Result<Bytes> {
        let uri = self.uri(path);
        block_on(&self.runtime, unary(&self.connections[0], &uri, framed(&message)))
    }

    fn uri(&self, path: &str) -> http::Uri {
        format!("http://{}/{path}", self.addr).parse().expect("an address and a path make a URI")
    }
}

fn block_on<T>(runtime: &Runtime, work: impl Future<Output = Result<T>>) -> Result<T> {
    let limited = runtime.block_on(async { tokio::time::timeout(DEADLINE, work).await });
    limited.with_context(|| format!("etcd did not answer within {} s", DEADLINE.as_secs()))?
}

/// One call: a message there, a message back, a status of 0.
async fn unary(sender: &SendRequest<Bytes>, uri: &http::Uri, framed: Bytes) -> Result<Bytes> {
    let mut sender = sender.clone().ready().await?;
    let request = Request::post(uri.clone()).header("content-type", "application/grpc").header("te", "trailers");
    let (response, mut stream) = sender.send_request(request.body(())?, false)?;
    stream.send_data(framed, true)?;
    let (head, mut body) = response.await?.into_parts();
    let mut answer = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        answer.extend_from_slice(&chunk);
    }
    match body.trailers().await? {
        Some(trailers) => check_status(&trailers)?,
        None => check_status(&head.headers)?,
    }
    ensure!(answer.len() >= 5 && answer[0] == 0, "an answer of {} bytes without a message", answer.len());
    let length = u32::from_be_bytes(answer[1..5].try_into().expect("4 bytes")) as usize;
    answer.advance(5);
    ensure!(answer.len() == length, "an answer of {} bytes that says {length}", answer.len());
    Ok(answer.freeze())
}

fn check_status(headers: &HeaderMap) -> Result<()> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("none");
    let status = text("grpc-status");
    ensure!(status == "0", "etcd answered with status {status}: {}", text("grpc-message"));
    Ok(())
}

/// A message behind gRPC's five bytes: not compressed, and its length.
fn framed(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(message);
    framed.freeze()
}

/// A protobuf message of fields that hold bytes.
fn message(fields: &[(u8, &[u8])]) -> Bytes {
    let mut message = BytesMut::new();
    for &(field, value) in fields {
        assert!(field < 16 && value.len() < 128, "the field number and the length take one byte each");
        message.put_u8(field << 3 | 2);
        message.put_u8(value.len() as u8);
        message.put_slice(value);
    }
    message.freeze()
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The first field of that number; `None` if the message has none.
fn field(mut message: &[u8], wanted: u64) -> Result<Option<Value<'_>>> {
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut message)?),
            2 => {
                let length = usize::try_from(varint(&mut message)?)?;
                let (value, rest) = message.split_at_checked(length).context("a protobuf field is cut off")?;
                message = rest;
                Value::Bytes(value)
            }
            other => bail!("a protobuf field of type {other}, which etcd does not use here"),
        };
        if key >> 3 == wanted {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// A field that is a number; 0, protobuf's default, if it is not there.
fn number(message: &[u8], wanted: u64) -> Result<u64> {
    match field(message, wanted)? {
        Some(Value::Number(number)) => Ok(number),
        Some(Value::Bytes(_)) => bail!("protobuf field {wanted} is not a number"),
        None => Ok(0),
    }
}

/// A field that is bytes or a message; empty if it is not there.
fn bytes_field(message: &[u8], wanted: u64) -> Result<&[u8]> {
    match field(message, wanted)? {
        Some(Value::Bytes(bytes)) => Ok(bytes),
        Some(Value::Number(_)) => bail!("protobuf field {wanted} is a number"),
        None => Ok(&[]),
    }
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().context("a protobuf number is cut off")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    bail!("a protobuf number of more than ten bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_are_read_as_they_are_written() {
        let inner = message(&[(1, b"key"), (5, b"value")]);
        let mut outer = message(&[(2, &inner)]).to_vec();
        // Field 4, 300 as protobuf's documentation has it.
        outer.extend([4 << 3, 0xAC, 0x02]);
        assert_eq!(number(&outer, 4).unwrap(), 300);
        assert_eq!(bytes_field(bytes_field(&outer, 2).unwrap(), 5).unwrap(), b"value");
        assert_eq!(number(&outer, 9).unwrap(), 0);
        assert!(number(&outer, 2).is_err() && bytes_field(&outer, 4).is_err());
        assert_eq!(framed(b"ab")[..], [0, 0, 0, 0, 2, b'a', b'b']);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..60), wanted in 0u64..8) {
            if let Ok(Some(Value::Bytes(found))) = field(&bytes, wanted) {
                prop_assert!(found.len() < bytes.len());
            }
        }
    }
}

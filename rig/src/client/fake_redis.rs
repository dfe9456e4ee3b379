//! A Redis server of one map for tests, which can be told to do wrong.
//!
//! One thread per connection and one lock over everything: commands have a total order, so «the 100th command» means something.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What goes wrong. Commands and SETs are counted from 1 over all connections.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// This SET is acknowledged and not stored.
    pub forget_set: Option<u64>,
    /// The connection is closed instead of doing this command.
    pub close_before: Option<u64>,
    /// The connection is closed after doing this command, instead of answering it.
    pub close_after: Option<u64>,
    /// Nothing is answered for so long from this command on.
    pub pause: Option<(u64, Duration)>,
    /// This command is refused.
    pub refuse: Option<u64>,
    /// The connection of this command gets no answers any more.
    pub go_silent: Option<u64>,
    /// From this command on, GET shows the first value that the key ever had.
    pub stale_from: Option<u64>,
    /// Answers leave in pieces of so many bytes.
    pub piece_bytes: Option<usize>,
}

#[derive(Default)]
struct State {
    values: HashMap<Vec<u8>, Vec<u8>>,
    first_values: HashMap<Vec<u8>, Vec<u8>>,
    commands: u64,
    sets: u64,
}

struct Shared {
    faults: Faults,
    state: Mutex<State>,
    stop: AtomicBool,
}

/// A running server; it ends when dropped.
pub struct FakeRedis {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl FakeRedis {
    /// Starts one on a free loopback port.
    pub fn start(faults: Faults) -> FakeRedis {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port is free");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared { faults, state: Mutex::default(), stop: AtomicBool::new(false) });
        let accepting = shared.clone();
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = accepting.clone();
                std::thread::spawn(move || serve(&stream, &shared));
            }
        });
        FakeRedis { address, shared, acceptor: Some(acceptor) }
    }
}

impl Drop for FakeRedis {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the acceptor, which then sees the flag.
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().expect("the acceptor does not panic");
        }
    }
}

enum Outcome {
    Answer(Vec<u8>),
    Close,
    Silence,
}

fn serve(stream: &TcpStream, shared: &Shared) {
    stream.set_nodelay(true).expect("a TCP socket takes TCP_NODELAY");
    let mut input = BufReader::new(stream);
    let mut output = Vec::new();
    let mut silent = false;
    while let Some(command) = read_command(&mut input) {
        match execute(&command, shared) {
            Outcome::Answer(answer) => output.extend_from_slice(&answer),
            Outcome::Silence => silent = true,
            Outcome::Close => {
                send(stream, &output, shared.faults.piece_bytes);
                return;
            }
        }
        // Like the real one: answer when nothing more has arrived.
        if input.buffer().is_empty() && !silent {
            send(stream, &output, shared.faults.piece_bytes);
            output.clear();
        }
    }
}

fn send(mut stream: &TcpStream, output: &[u8], piece_bytes: Option<usize>) {
    for piece in output.chunks(piece_bytes.unwrap_or(usize::MAX)) {
        if stream.write_all(piece).is_err() {
            // The client is gone; the next read ends the connection.
            return;
        }
    }
}

fn read_command(input: &mut impl BufRead) -> Option<Vec<Vec<u8>>> {
    let first = read_line(input)?;
    let Some(count) = first.strip_prefix('*') else {
        return Some(vec![first.into_bytes()]);
    };
    let count: usize = count.parse().expect("the client sends a count");
    let mut arguments = Vec::new();
    for _ in 0..count {
        let length = read_line(input)?;
        let length: usize = length.strip_prefix('$')?.parse().expect("the client sends a length");
        let mut bytes = vec![0; length + 2];
        input.read_exact(&mut bytes).ok()?;
        assert_eq!(bytes.split_off(length), b"\r\n", "an argument ends with CR LF");
        arguments.push(bytes);
    }
    Some(arguments)
}

fn read_line(input: &mut impl BufRead) -> Option<String> {
    let mut line = String::new();
    let count = input.read_line(&mut line).ok()?;
    (count > 0).then(|| line.trim_end().to_owned())
}

fn execute(command: &[Vec<u8>], shared: &Shared) -> Outcome {
    let faults = &shared.faults;
    let mut state = shared.state.lock().expect("no server thread panics with the lock");
    state.commands += 1;
    let now = Some(state.commands);
    if let Some((at, pause)) = faults.pause
        && Some(at) == now
    {
        // Holding the lock holds everybody up; the pause is the fault itself, nothing waits for an event here.
        std::thread::sleep(pause);
    }
    if faults.close_before == now {
        return Outcome::Close;
    }
    if faults.go_silent == now {
        return Outcome::Silence;
    }
    if faults.refuse == now {
        return Outcome::Answer(b"-OOM command not allowed\r\n".to_vec());
    }
    let answer = apply(command, &mut state, faults);
    if faults.close_after == now { Outcome::Close } else { Outcome::Answer(answer) }
}

fn apply(command: &[Vec<u8>], state: &mut State, faults: &Faults) -> Vec<u8> {
    let words: Vec<&[u8]> = command.iter().map(Vec::as_slice).collect();
    match words.as_slice() {
        [b"SET", key, value] => {
            state.sets += 1;
            if faults.forget_set != Some(state.sets) {
                state.first_values.entry(key.to_vec()).or_insert_with(|| value.to_vec());
                state.values.insert(key.to_vec(), value.to_vec());
            }
            b"+OK\r\n".to_vec()
        }
        [b"GET", key] => {
            let stale = faults.stale_from.is_some_and(|from| state.commands >= from);
            let values = if stale { &state.first_values } else { &state.values };
            match values.get(*key) {
                None => b"$-1\r\n".to_vec(),
                Some(value) => {
                    let mut answer = format!("${}\r\n", value.len()).into_bytes();
                    answer.extend_from_slice(value);
                    answer.extend_from_slice(b"\r\n");
                    answer
                }
            }
        }
        [b"PING"] => b"+PONG\r\n".to_vec(),
        _ => b"-ERR unknown command\r\n".to_vec(),
    }
}

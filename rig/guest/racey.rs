//! A guest program whose result depends on how its threads interleave.
//!
//! Threads mix values of a shared array without locks: every load and store is atomic by itself, but the
//! read-modify-write as a whole is not, so lost updates and the order of the threads decide the outcome. After each
//! round the signature of the array is appended to a file. Two guests that run by themselves soon have
//! different files; two replicas that syncvm keeps equal have the same file at every sync point. (The classic
//! «racey» of the deterministic-execution literature, without its undefined behaviour.)
//!
//! `racey THREADS ROUNDS FILE`, ROUNDS 0 = until the file has 64 MiB. A server on port 7000 takes one command per line:
//! `status` answers «rounds R bytes B fnv64 H», `file OFFSET` answers «bytes N» and then the file from OFFSET on.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::Barrier;

const PORT: u16 = 7000;
const CELLS: usize = 64;
const STEPS_PER_ROUND: u32 = 200_000;
const MAX_FILE_BYTES: u64 = 64 << 20;

static CELL: [AtomicU32; CELLS] = [const { AtomicU32::new(0) }; CELLS];

fn mix(a: u32, b: u32) -> u32 {
    a.rotate_left(5).wrapping_mul(0x9e37_79b1) ^ b.wrapping_add(0x7f4a_7c15)
}

/// One thread's share of a round: walk through the array by values that other threads change meanwhile.
fn race(me: u32) {
    let mut at = me;
    for _ in 0..STEPS_PER_ROUND {
        let here = &CELL[at as usize % CELLS];
        let next = &CELL[(at >> 8) as usize % CELLS];
        let mixed = mix(here.load(Relaxed), next.load(Relaxed).wrapping_add(me));
        here.store(mixed, Relaxed);
        at = mixed;
    }
}

fn signature() -> u64 {
    let words = CELL.iter().map(|cell| cell.load(Relaxed));
    words.fold(0xcbf2_9ce4_8422_2325, |hash, word| (hash ^ u64::from(word)).wrapping_mul(0x100_0000_01b3))
}

fn fnv64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn answer(command: &str, path: &str, out: &mut TcpStream) -> std::io::Result<()> {
    let mut words = command.split_whitespace();
    let mut bytes = Vec::new();
    let mut file = File::open(path)?;
    match (words.next(), words.next()) {
        (Some("status"), None) => {
            file.read_to_end(&mut bytes)?;
            let rounds = bytes.iter().filter(|&&byte| byte == b'\n').count();
            writeln!(out, "rounds {rounds} bytes {} fnv64 {:016x}", bytes.len(), fnv64(&bytes))
        }
        (Some("file"), Some(offset)) => {
            let Ok(offset) = offset.parse() else { return writeln!(out, "error: OFFSET must be a number") };
            file.seek(SeekFrom::Start(offset))?;
            file.read_to_end(&mut bytes)?;
            writeln!(out, "bytes {}", bytes.len())?;
            out.write_all(&bytes)
        }
        _ => writeln!(out, "error: commands are «status» and «file OFFSET»"),
    }
}

fn serve(mut stream: TcpStream, path: &str) -> std::io::Result<()> {
    for line in BufReader::new(stream.try_clone()?).lines() {
        answer(&line?, path, &mut stream)?;
    }
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, threads, rounds, path] = &arguments[..] else { panic!("usage: racey THREADS ROUNDS FILE") };
    let threads: u32 = threads.parse().expect("THREADS must be a number");
    let rounds: u64 = rounds.parse().expect("ROUNDS must be a number");
    let mut output = OpenOptions::new().create(true).append(true).open(path).expect("cannot open FILE");
    let listener = TcpListener::bind(("0.0.0.0", PORT)).expect("port 7000 must be free");
    let served_path = path.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let path = served_path.clone();
            // A client that goes away is no reason to stop racing.
            std::thread::spawn(move || drop(serve(stream, &path)));
        }
    });
    let barrier = Barrier::new(threads as usize + 1);
    std::thread::scope(|scope| {
        for me in 0..threads {
            let barrier = &barrier;
            scope.spawn(move || loop {
                barrier.wait();
                race(me);
                barrier.wait();
            });
        }
        let mut written_bytes = 0;
        for round in 0.. {
            if (rounds > 0 && round >= rounds) || written_bytes >= MAX_FILE_BYTES {
                loop {
                    std::thread::park();
                }
            }
            barrier.wait();
            barrier.wait();
            let line = format!("{:016x}\n", signature());
            output.write_all(line.as_bytes()).expect("cannot append to FILE");
            written_bytes += line.len() as u64;
        }
    });
}

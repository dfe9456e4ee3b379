//! vhost-user messages: any sequence of requests with any payloads and descriptors, as a broken QEMU might send it.
//!
//! An input is a sequence of records: request, flags, number of descriptors, length, and that many bytes of payload. Flags:
//! bit 0 asks for a reply, bit 1 passes RAM instead of eventfds, bit 2 lets the header lie about the length, bit 3 sends the
//! payload without a header, bit 4 moves frames afterwards.

use std::time::Duration;

use crate::guest::{Guest, MAX_FDS, event, memory, repeat};

const RAM_BYTES: u64 = 1 << 20;
const RECORD_HEADER_BYTES: usize = 4;

pub(crate) fn run(input: &[u8]) {
    let ram = memory(RAM_BYTES);
    let signal = event();
    let mut guest = Guest::connect();
    let mut rest = input;
    while let Some((&[request, flags, fds, length], tail)) = rest.split_first_chunk::<RECORD_HEADER_BYTES>() {
        let (payload, tail) = tail.split_at(usize::from(length).min(tail.len()));
        rest = tail;
        let fds = usize::from(fds) % (MAX_FDS + 1);
        let fds = if flags & 2 == 0 { repeat(&signal, fds) } else { repeat(&ram, fds) };
        if flags & 8 == 0 {
            let lie = if flags & 4 == 0 { 0 } else { u32::from(length) };
            guest.send(request.into(), flags & 1 != 0, payload.len() as u32 + lie, payload, &fds);
        } else {
            guest.send_bytes(payload, &fds);
        }
        guest.turn(Duration::ZERO);
        if flags & 16 != 0 {
            guest.traffic(usize::from(length) * 8);
        }
    }
    guest.close();
}

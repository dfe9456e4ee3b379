//! What daemon and agent say to each other: messages over a `SOCK_SEQPACKET` unix socket, so that the kernel keeps message
//! boundaries and file descriptors travel with the message that they belong to. All have a fixed size but
//! [`Request::Written`] and [`Request::Vcpus`], which are followed by records.
//!
//! The daemon asks, the agent answers each request with exactly one [`Response`]; a request that cannot be read
//! ends the connection. All fields are little endian.

/// Version of this protocol and of the clock page; daemon and agent must agree exactly.
pub const PROTOCOL_VERSION: u32 = 2;
/// First four bytes of every message.
pub const MAGIC: u32 = u32::from_le_bytes(*b"PLVA");
/// Length of a request without records.
pub const REQUEST_BYTES: usize = 16;
/// Length of one record behind a request.
pub const RECORD_BYTES: usize = 16;
/// How many records one request can have.
pub const MAX_RECORDS: usize = 2048;
/// Length of the longest request.
pub const MAX_REQUEST_BYTES: usize = REQUEST_BYTES + MAX_RECORDS * RECORD_BYTES;
/// Length of a response.
pub const RESPONSE_BYTES: usize = 32;
/// Environment variable that names the socket the agent listens on; without it the agent does nothing.
pub const SOCKET_VARIABLE: &str = "PLOVER_AGENT_SOCKET";

/// What the daemon wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Who are you? Answered with version, process id and whether QEMU exports the yank functions.
    Hello,
    /// Create a userfaultfd in QEMU's address space and send it along with the answer.
    Userfaultfd,
    /// Register QEMU's migration yank instance (needed before every `xen-load-devices-state`).
    Yank,
    /// Start a sampler and send its clock page (see [`crate::clock_page`]) along with the answer.
    Clocks,
    /// The daemon has written these parts of the stopped guest's RAM: forget what was derived from their old content.
    Written,
    /// Give these vCPUs of the stopped guest another common state.
    Vcpus,
}

/// A part of QEMU's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenRange {
    /// Where it begins.
    pub address: u64,
    /// How long it is.
    pub bytes: u64,
}

impl WrittenRange {
    fn encode(self) -> [u8; RECORD_BYTES] {
        (u128::from(self.address) | u128::from(self.bytes) << 64).to_le_bytes()
    }

    fn decode(record: [u8; RECORD_BYTES]) -> WrittenRange {
        let both = u128::from_le_bytes(record);
        WrittenRange { address: both as u64, bytes: (both >> 64) as u64 }
    }
}

/// What QEMU keeps of a vCPU whatever its architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuCommon {
    /// It waits for an interrupt.
    pub halted: bool,
    /// Kinds of interrupts that wait, a bit each.
    pub interrupts: u32,
}

/// One vCPU's common state, as it is and as it is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuChange {
    /// QEMU's number of it.
    pub index: u16,
    /// Now: what is there must be this, or nothing is changed.
    pub was: VcpuCommon,
    /// Then.
    pub becomes: VcpuCommon,
}

impl VcpuChange {
    fn encode(self) -> [u8; RECORD_BYTES] {
        let flags = u128::from(self.was.halted) << 32 | u128::from(self.becomes.halted) << 33;
        let interrupts = u128::from(self.was.interrupts) << 64 | u128::from(self.becomes.interrupts) << 96;
        (u128::from(self.index) | flags | interrupts).to_le_bytes()
    }

    fn decode(record: [u8; RECORD_BYTES]) -> VcpuChange {
        let all = u128::from_le_bytes(record);
        VcpuChange {
            index: all as u16,
            was: VcpuCommon { halted: all >> 32 & 1 == 1, interrupts: (all >> 64) as u32 },
            becomes: VcpuCommon { halted: all >> 33 & 1 == 1, interrupts: (all >> 96) as u32 },
        }
    }
}

impl Request {
    const ALL: [Request; 6] =
        [Request::Hello, Request::Userfaultfd, Request::Yank, Request::Clocks, Request::Written, Request::Vcpus];

    /// Number of this request on the wire.
    pub const fn code(self) -> u32 {
        match self {
            Request::Hello => 1,
            Request::Userfaultfd => 2,
            Request::Yank => 3,
            Request::Clocks => 4,
            Request::Written => 5,
            Request::Vcpus => 6,
        }
    }

    /// The message's bytes, without records.
    pub fn encode(self) -> [u8; REQUEST_BYTES] {
        let mut writer = FieldWriter::new([0; REQUEST_BYTES]);
        writer.put(MAGIC).put(self.code());
        writer.bytes
    }

    /// The bytes of [`Request::Written`] with its ranges; `None` if there are too many.
    pub fn encode_written(ranges: &[WrittenRange]) -> Option<Vec<u8>> {
        Self::encode_records(Request::Written, ranges.iter().map(|range| range.encode()))
    }

    /// The bytes of [`Request::Vcpus`] with its changes; `None` if there are too many.
    pub fn encode_vcpus(changes: &[VcpuChange]) -> Option<Vec<u8>> {
        Self::encode_records(Request::Vcpus, changes.iter().map(|change| change.encode()))
    }

    fn encode_records(request: Request, records: impl ExactSizeIterator<Item = [u8; RECORD_BYTES]>) -> Option<Vec<u8>> {
        let count = u32::try_from(records.len()).ok().filter(|_| records.len() <= MAX_RECORDS)?;
        let mut writer = FieldWriter::new([0; REQUEST_BYTES]);
        writer.put(MAGIC).put(request.code()).put(count);
        let mut bytes = writer.bytes.to_vec();
        records.for_each(|record| bytes.extend(record));
        Some(bytes)
    }

    /// Reads a message; `None` for wrong length, wrong magic, an unknown request or non-zero reserved bytes.
    pub fn decode(bytes: &[u8]) -> Option<Request> {
        let (header, records) = bytes.split_at_checked(REQUEST_BYTES)?;
        let mut fields = Fields::new(header);
        if fields.next()? != MAGIC {
            return None;
        }
        let code = fields.next()?;
        let count = usize::try_from(fields.next()?).ok()?;
        let request = Self::ALL.into_iter().find(|request| request.code() == code)?;
        let most = if matches!(request, Request::Written | Request::Vcpus) { MAX_RECORDS } else { 0 };
        let whole = count <= most && records.len() == count.saturating_mul(RECORD_BYTES);
        (whole && fields.next()? == 0).then_some(request)
    }

    /// The ranges of a [`Request::Written`] that was decoded.
    pub fn ranges(bytes: &[u8]) -> impl Iterator<Item = WrittenRange> {
        records(bytes).map(WrittenRange::decode)
    }

    /// The changes of a [`Request::Vcpus`] that was decoded.
    pub fn vcpus(bytes: &[u8]) -> impl Iterator<Item = VcpuChange> + Clone {
        records(bytes).map(VcpuChange::decode)
    }
}

fn records(bytes: &[u8]) -> impl Iterator<Item = [u8; RECORD_BYTES]> + Clone {
    let records = bytes.get(REQUEST_BYTES..).unwrap_or_default();
    records.chunks_exact(RECORD_BYTES).filter_map(|record| record.try_into().ok())
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Done,
    /// The yank instance was registered already: as good as done.
    Already,
    /// A system call failed; the response's `errno` says how.
    Failed,
    /// This process does not export what the request needs.
    Unsupported,
}

impl Status {
    const ALL: [Status; 4] = [Status::Done, Status::Already, Status::Failed, Status::Unsupported];

    const fn code(self) -> u32 {
        match self {
            Status::Done => 0,
            Status::Already => 1,
            Status::Failed => 2,
            Status::Unsupported => 3,
        }
    }
}

/// The agent's answer. Version, process and symbols are in every answer, so that hello needs no special form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The request that is answered.
    pub request: Request,
    /// How it ended.
    pub status: Status,
    /// The system call's error number if `status` is [`Status::Failed`], otherwise 0.
    pub errno: u32,
    /// The agent's [`PROTOCOL_VERSION`].
    pub version: u32,
    /// QEMU's process id as QEMU sees it (a PID namespace may make it differ from the daemon's view).
    pub pid: u32,
    /// Whether this process exports QEMU's `yank_register_instance`.
    pub has_yank: bool,
}

impl Response {
    /// The message's bytes.
    pub fn encode(&self) -> [u8; RESPONSE_BYTES] {
        let mut writer = FieldWriter::new([0; RESPONSE_BYTES]);
        writer
            .put(MAGIC)
            .put(self.request.code())
            .put(self.status.code())
            .put(self.errno)
            .put(self.version)
            .put(self.pid)
            .put(u32::from(self.has_yank));
        writer.bytes
    }

    /// Reads a message; `None` if it is not one. The version is not judged here, so that the reader can name it.
    pub fn decode(bytes: &[u8]) -> Option<Response> {
        let bytes: &[u8; RESPONSE_BYTES] = bytes.try_into().ok()?;
        let mut fields = Fields::new(bytes);
        if fields.next()? != MAGIC {
            return None;
        }
        let request = fields.next()?;
        let status = fields.next()?;
        Some(Response {
            request: Request::ALL.into_iter().find(|known| known.code() == request)?,
            status: Status::ALL.into_iter().find(|known| known.code() == status)?,
            errno: fields.next()?,
            version: fields.next()?,
            pid: fields.next()?,
            has_yank: match fields.next()? {
                0 => false,
                1 => true,
                _ => return None,
            },
        })
    }
}

/// Writes u32 fields one after the other; what does not fit is dropped (lengths are constants, tests cover them).
struct FieldWriter<const N: usize> {
    bytes: [u8; N],
    next: usize,
}

impl<const N: usize> FieldWriter<N> {
    fn new(bytes: [u8; N]) -> Self {
        FieldWriter { bytes, next: 0 }
    }

    fn put(&mut self, field: u32) -> &mut Self {
        if let Some(place) = self.bytes.chunks_exact_mut(4).nth(self.next) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        self.next = self.next.saturating_add(1);
        self
    }
}

/// Reads u32 fields one after the other.
struct Fields<'a> {
    chunks: std::slice::ChunksExact<'a, u8>,
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Fields { chunks: bytes.chunks_exact(4) }
    }
}

impl Iterator for Fields<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.chunks.next()?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_request_and_response_survives_the_wire() {
        for request in Request::ALL {
            assert_eq!(Request::decode(&request.encode()), Some(request));
            for status in Status::ALL {
                let response = Response {
                    request,
                    status,
                    errno: 38,
                    version: PROTOCOL_VERSION,
                    pid: u32::MAX,
                    has_yank: status == Status::Done,
                };
                assert_eq!(Response::decode(&response.encode()), Some(response));
            }
        }
    }

    #[test]
    fn a_request_with_wrong_magic_length_or_reserved_bytes_is_refused() {
        let good = Request::Yank.encode();
        for place in 0..REQUEST_BYTES {
            let mut bad = good;
            if let Some(byte) = bad.get_mut(place) {
                *byte ^= 0x80;
            }
            assert_eq!(Request::decode(&bad), None, "byte {place}");
        }
        assert_eq!(Request::decode(good.split_last().map_or(&[], |(_, rest)| rest)), None);
    }

    #[test]
    fn what_was_written_survives_the_wire_and_nothing_else_has_ranges() {
        let range = |at: u64| WrittenRange { address: at << 44, bytes: at };
        for count in [0, 1, 7, MAX_RECORDS] {
            let ranges: Vec<WrittenRange> = (1..=count as u64).map(range).collect();
            let message = Request::encode_written(&ranges).unwrap_or_default();
            assert_eq!(Request::decode(&message), Some(Request::Written));
            assert!(Request::ranges(&message).eq(ranges), "{count}");
            assert!(message.len() <= MAX_REQUEST_BYTES);
            assert_eq!(Request::decode(&[&message[..], &[0]].concat()), None, "one byte more");
            assert_eq!(Request::decode(message.split_last().map_or(&[], |(_, rest)| rest)), None, "one byte less");
        }
        let vcpu = |halted, interrupts| VcpuCommon { halted, interrupts };
        let changes = [(7, vcpu(true, 0), vcpu(false, 2)), (u16::MAX, vcpu(false, u32::MAX), vcpu(true, 1 << 31))];
        let changes = changes.map(|(index, was, becomes)| VcpuChange { index, was, becomes });
        let message = Request::encode_vcpus(&changes).unwrap_or_default();
        assert_eq!(Request::decode(&message), Some(Request::Vcpus));
        assert!(Request::vcpus(&message).eq(changes));
        assert_eq!(Request::encode_written(&vec![range(1); MAX_RECORDS.saturating_add(1)]), None);
        let mut other = Request::encode_written(&[range(1)]).unwrap_or_default();
        if let Some(code) = other.get_mut(4..8) {
            code.copy_from_slice(&Request::Yank.code().to_le_bytes());
        }
        assert_eq!(Request::decode(&other), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_refused_or_a_message(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(request) = Request::decode(&bytes) {
                let again = Request::encode_records(request, records(&bytes).collect::<Vec<_>>().into_iter());
                prop_assert_eq!(again, Some(bytes.clone()));
            }
            if let Some(response) = Response::decode(&bytes) {
                prop_assert_eq!(Response::decode(&response.encode()), Some(response));
            }
        }

        #[test]
        fn arbitrary_requests_with_the_right_magic_never_alias(code in any::<u32>(), rest in any::<u64>()) {
            let mut bytes = Request::Hello.encode();
            bytes[4..8].copy_from_slice(&code.to_le_bytes());
            bytes[8..].copy_from_slice(&rest.to_le_bytes());
            let known = (1..=6).contains(&code) && rest == 0;
            prop_assert_eq!(Request::decode(&bytes).is_some(), known);
        }
    }
}

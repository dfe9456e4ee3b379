//! What daemon and agent say to each other: messages over a `SOCK_SEQPACKET` unix socket, so that the kernel keeps message
//! boundaries and file descriptors travel with the message that they belong to. All have a fixed size, but some requests
//! are followed by records, and a refusal by its reason.
//!
//! The daemon asks, the agent answers each request with exactly one [`Response`]; a request that cannot be read ends
//! the connection. Requests carry a tag, so that the late answer of one that was given up is not taken for the next
//! one's. All fields are little endian.

use std::ffi::{CStr, CString};
use std::path::Path;

/// Version of this protocol and of the clock page; daemon and agent must agree exactly.
pub const PROTOCOL_VERSION: u32 = 3;
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
/// Where in a request its tag is.
const TAG: std::ops::Range<usize> = 12..16;
/// Length of a response without a reason.
pub const RESPONSE_BYTES: usize = 32;
/// The longest reason of a refusal; the rest is cut off.
pub const MAX_REASON_BYTES: usize = 512;
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
    /// Stop the guest, as the monitor's `stop`.
    Stop,
    /// Let it run, as `cont`.
    Cont,
    /// Write the state of its devices to a file, as `xen-save-devices-state`.
    Save,
    /// Read it from a file, as [`Request::Yank`] and `xen-load-devices-state`.
    Load,
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
    const ALL: [Request; 10] = [
        Request::Hello,
        Request::Userfaultfd,
        Request::Yank,
        Request::Clocks,
        Request::Written,
        Request::Vcpus,
        Request::Stop,
        Request::Cont,
        Request::Save,
        Request::Load,
    ];

    /// Number of this request on the wire.
    pub const fn code(self) -> u32 {
        match self {
            Request::Hello => 1,
            Request::Userfaultfd => 2,
            Request::Yank => 3,
            Request::Clocks => 4,
            Request::Written => 5,
            Request::Vcpus => 6,
            Request::Stop => 7,
            Request::Cont => 8,
            Request::Save => 9,
            Request::Load => 10,
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

    /// The bytes of [`Request::Save`] or [`Request::Load`] with the path of the file; `None` if it is too long or
    /// contains a zero byte.
    pub fn encode_path(self, path: &Path) -> Option<Vec<u8>> {
        use std::os::unix::ffi::OsStrExt;
        let path = CString::new(path.as_os_str().as_bytes()).ok()?;
        let chunks = path.as_bytes_with_nul().chunks(RECORD_BYTES);
        Self::encode_records(
            self,
            chunks.map(|chunk| {
                let mut record = [0; RECORD_BYTES];
                record.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
                record
            }),
        )
    }

    /// The path of a [`Request::Save`] or [`Request::Load`] that was decoded.
    pub fn path(bytes: &[u8]) -> Option<&CStr> {
        CStr::from_bytes_until_nul(bytes.get(REQUEST_BYTES..)?).ok()
    }

    /// Gives a message its tag.
    pub fn set_tag(message: &mut [u8], tag: u32) {
        if let Some(place) = message.get_mut(TAG) {
            place.copy_from_slice(&tag.to_le_bytes());
        }
    }

    /// The tag of a message that was decoded.
    pub fn tag(message: &[u8]) -> u32 {
        message.get(TAG).and_then(|tag| tag.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    fn has_records(self) -> bool {
        matches!(self, Request::Written | Request::Vcpus | Request::Save | Request::Load)
    }

    fn encode_records(request: Request, records: impl ExactSizeIterator<Item = [u8; RECORD_BYTES]>) -> Option<Vec<u8>> {
        let count = u32::try_from(records.len()).ok().filter(|_| records.len() <= MAX_RECORDS)?;
        let mut writer = FieldWriter::new([0; REQUEST_BYTES]);
        writer.put(MAGIC).put(request.code()).put(count);
        let mut bytes = writer.bytes.to_vec();
        records.for_each(|record| bytes.extend(record));
        Some(bytes)
    }

    /// Reads a message; `None` for wrong length, wrong magic, or an unknown request.
    pub fn decode(bytes: &[u8]) -> Option<Request> {
        let (header, records) = bytes.split_at_checked(REQUEST_BYTES)?;
        let mut fields = Fields::new(header);
        if fields.next()? != MAGIC {
            return None;
        }
        let code = fields.next()?;
        let count = usize::try_from(fields.next()?).ok()?;
        let request = Self::ALL.into_iter().find(|request| request.code() == code)?;
        let most = if request.has_records() { MAX_RECORDS } else { 0 };
        let whole = count <= most && records.len() == count.saturating_mul(RECORD_BYTES);
        whole.then_some(request)
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
    /// QEMU refused; its reason follows.
    Refused,
}

impl Status {
    const ALL: [Status; 5] = [Status::Done, Status::Already, Status::Failed, Status::Unsupported, Status::Refused];

    const fn code(self) -> u32 {
        match self {
            Status::Done => 0,
            Status::Already => 1,
            Status::Failed => 2,
            Status::Unsupported => 3,
            Status::Refused => 4,
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
    /// The request's tag.
    pub tag: u32,
}

impl Response {
    /// The message's bytes, without a reason.
    pub fn encode(&self) -> [u8; RESPONSE_BYTES] {
        let mut writer = FieldWriter::new([0; RESPONSE_BYTES]);
        writer
            .put(MAGIC)
            .put(self.request.code())
            .put(self.status.code())
            .put(self.errno)
            .put(self.version)
            .put(self.pid)
            .put(u32::from(self.has_yank))
            .put(self.tag);
        writer.bytes
    }

    /// The message's bytes, with the reason of a [`Status::Refused`].
    pub fn encode_with(&self, reason: &str) -> Vec<u8> {
        let reason = reason.as_bytes();
        [&self.encode(), reason.get(..MAX_REASON_BYTES).unwrap_or(reason)].concat()
    }

    /// The reason of a refusal that was decoded.
    pub fn reason(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes.get(RESPONSE_BYTES..).unwrap_or_default()).into_owned()
    }

    /// Reads a message; `None` if it is not one. The version is not judged here, so that the reader can name it.
    pub fn decode(bytes: &[u8]) -> Option<Response> {
        let (bytes, reason) = bytes.split_at_checked(RESPONSE_BYTES)?;
        let mut fields = Fields::new(bytes);
        if fields.next()? != MAGIC {
            return None;
        }
        let request = fields.next()?;
        let status = fields.next()?;
        let status = Status::ALL.into_iter().find(|known| known.code() == status)?;
        let longest = if status == Status::Refused { MAX_REASON_BYTES } else { 0 };
        if reason.len() > longest {
            return None;
        }
        Some(Response {
            request: Request::ALL.into_iter().find(|known| known.code() == request)?,
            status,
            errno: fields.next()?,
            version: fields.next()?,
            pid: fields.next()?,
            has_yank: match fields.next()? {
                0 => false,
                1 => true,
                _ => return None,
            },
            tag: fields.next()?,
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
                    tag: 77,
                };
                assert_eq!(Response::decode(&response.encode()), Some(response));
                let refusal = response.encode_with("because");
                let expected = (status == Status::Refused).then_some(response);
                assert_eq!((Response::decode(&refusal), Response::reason(&refusal).as_str()), (expected, "because"));
                let endless = response.encode_with(&"x".repeat(9_000));
                assert_eq!((Response::decode(&endless), endless.len()), (expected, RESPONSE_BYTES + MAX_REASON_BYTES));
            }
        }
    }

    #[test]
    fn a_request_with_wrong_magic_or_length_is_refused_and_its_tag_is_free() {
        let mut good = Request::Yank.encode();
        Request::set_tag(&mut good, 0x1234_5678);
        assert_eq!((Request::decode(&good), Request::tag(&good)), (Some(Request::Yank), 0x1234_5678));
        for place in 0..TAG.start {
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

    #[test]
    fn a_path_survives_the_wire() {
        for length in [1, 15, 16, 17, 300] {
            let path = "p".repeat(length);
            let message = Request::Save.encode_path(Path::new(&path)).unwrap_or_default();
            assert_eq!(Request::decode(&message), Some(Request::Save));
            assert_eq!(Request::path(&message).map(CStr::to_bytes), Some(path.as_bytes()));
        }
        assert_eq!(Request::Load.encode_path(Path::new("a\0b")), None);
        assert_eq!(Request::Load.encode_path(Path::new(&"p".repeat(MAX_RECORDS * RECORD_BYTES))), None);
        assert_eq!(Request::path(&Request::Load.encode()), None, "no path at all");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_refused_or_a_message(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(request) = Request::decode(&bytes) {
                let mut again = Request::encode_records(request, records(&bytes).collect::<Vec<_>>().into_iter());
                Request::set_tag(again.as_deref_mut().unwrap_or_default(), Request::tag(&bytes));
                prop_assert_eq!(again, Some(bytes.clone()));
            }
            if let Some(response) = Response::decode(&bytes) {
                let again = response.encode_with(&Response::reason(&bytes));
                prop_assert_eq!(Response::decode(&again), Some(response));
            }
        }

        #[test]
        fn arbitrary_requests_with_the_right_magic_never_alias(code in any::<u32>(), rest in any::<u64>()) {
            let mut bytes = Request::Hello.encode();
            bytes[4..8].copy_from_slice(&code.to_le_bytes());
            bytes[8..].copy_from_slice(&rest.to_le_bytes());
            // The tag is free, and no records follow.
            let known = (1..=10).contains(&code) && rest as u32 == 0;
            prop_assert_eq!(Request::decode(&bytes).is_some(), known);
        }
    }
}

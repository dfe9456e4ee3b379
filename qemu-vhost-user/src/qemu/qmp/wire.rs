//! QMP's messages: one JSON object per line (QEMU docs/interop/qmp-spec.rst).

use serde::Deserialize;
use serde_json::Value;

/// What QEMU sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// First line of a connection.
    Greeting(Version),
    /// A command succeeded.
    Return {
        /// The id that the command carried.
        id: Option<u64>,
        /// What it returned.
        value: Value,
    },
    /// A command failed.
    Failure {
        /// The id that the command carried; absent if QEMU could not read the command.
        id: Option<u64>,
        /// QEMU's error class (`CommandNotFound`, `GenericError` …).
        class: String,
        /// QEMU's text.
        description: String,
    },
    /// Something happened in the VM.
    Event(Event),
}

/// QEMU's version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, Deserialize)]
pub struct Version {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
    /// The distribution's name for its build; empty for a build without one.
    pub package: String,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)?;
        if self.package.is_empty() { Ok(()) } else { write!(f, " ({})", self.package) }
    }
}

/// An event of the VM.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// What happened, if it is one of the events that concern a group.
    pub kind: EventKind,
    /// Microseconds since 1970 on QEMU's host; 0 if QEMU could not tell.
    pub timestamp_us: u64,
}

/// The events that a group's owner acts on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The VM was shut down; QEMU exits unless run with `-no-shutdown`.
    Shutdown {
        /// Whether the guest asked for it (power-off from inside).
        guest: bool,
        /// `guest-shutdown`, `host-signal`, `host-qmp-quit`, `guest-panic` …
        reason: String,
    },
    /// The VM was reset.
    Reset {
        /// Whether the guest asked for it (reboot from inside).
        guest: bool,
        /// `guest-reset`, `host-qmp-system-reset` …
        reason: String,
    },
    /// The guest's CPUs stopped.
    Stop,
    /// The guest's CPUs run.
    Resume,
    /// The guest reported its own crash through a pvpanic device.
    GuestPanicked {
        /// What QEMU did: `pause`, `poweroff`, `run`.
        action: String,
    },
    /// Any other event, by QEMU's name.
    Other(String),
}

/// Why a line is not a message.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Not JSON, or not an object of QMP's forms.
    #[error("not a QMP message ({0})")]
    Json(#[from] serde_json::Error),
    /// An object, but neither greeting, return, error nor event.
    #[error("a QMP message of unknown form")]
    UnknownForm,
}

#[derive(Deserialize)]
struct RawMessage {
    #[serde(rename = "QMP")]
    greeting: Option<RawGreeting>,
    #[serde(rename = "return", default, deserialize_with = "present")]
    value: Option<Value>,
    error: Option<RawError>,
    event: Option<String>,
    #[serde(default)]
    data: RawEventData,
    timestamp: Option<RawTimestamp>,
    id: Option<Value>,
}

/// `"return": null` is a return; without this serde would take it for an absent field.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

#[derive(Deserialize)]
struct RawGreeting {
    version: RawVersion,
}

#[derive(Deserialize)]
struct RawVersion {
    qemu: RawTriple,
    #[serde(default)]
    package: String,
}

#[derive(Deserialize)]
struct RawTriple {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Deserialize)]
struct RawError {
    class: String,
    desc: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawEventData {
    guest: bool,
    reason: String,
    action: String,
}

#[derive(Deserialize)]
struct RawTimestamp {
    seconds: i64,
    microseconds: i64,
}

/// Reads one line.
///
/// # Errors
/// If it is not a QMP message.
pub fn parse_line(line: &[u8]) -> Result<Message, WireError> {
    let raw: RawMessage = serde_json::from_slice(line)?;
    let id = raw.id.as_ref().and_then(Value::as_u64);
    if let Some(greeting) = raw.greeting {
        return Ok(Message::Greeting(greeting.version.into()));
    }
    if let Some(error) = raw.error {
        return Ok(Message::Failure { id, class: error.class, description: error.desc });
    }
    if let Some(value) = raw.value {
        return Ok(Message::Return { id, value });
    }
    let name = raw.event.ok_or(WireError::UnknownForm)?;
    let timestamp_us = raw.timestamp.map_or(0, RawTimestamp::into_us);
    Ok(Message::Event(Event { kind: raw.data.kind(name), timestamp_us }))
}

/// Reads the answer of `query-version`.
///
/// # Errors
/// If the value has another form.
pub fn parse_version(value: Value) -> Result<Version, WireError> {
    Ok(serde_json::from_value::<RawVersion>(value)?.into())
}

impl From<RawVersion> for Version {
    fn from(raw: RawVersion) -> Version {
        let RawTriple { major, minor, micro } = raw.qemu;
        Version { major, minor, micro, package: raw.package }
    }
}

impl RawTimestamp {
    /// QEMU sends -1 when it could not read its clock.
    fn into_us(self) -> u64 {
        let seconds = u64::try_from(self.seconds).unwrap_or(0);
        let microseconds = u64::try_from(self.microseconds).unwrap_or(0);
        seconds.saturating_mul(1_000_000).saturating_add(microseconds)
    }
}

impl RawEventData {
    fn kind(self, name: String) -> EventKind {
        match name.as_str() {
            "SHUTDOWN" => EventKind::Shutdown { guest: self.guest, reason: self.reason },
            "RESET" => EventKind::Reset { guest: self.guest, reason: self.reason },
            "STOP" => EventKind::Stop,
            "RESUME" => EventKind::Resume,
            "GUEST_PANICKED" => EventKind::GuestPanicked { action: self.action },
            _ => EventKind::Other(name),
        }
    }
}

/// Splits a stream of bytes into lines without copying what is complete more than once.
#[derive(Default)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// Bytes before this were searched for a line end already.
    searched: usize,
}

impl LineBuffer {
    /// Adds received bytes.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes that are waiting for their line's end.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes the next whole line, without its end and without blank lines.
    pub fn next_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let end = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
            let Some(end) = end else {
                self.searched = self.bytes.len();
                return None;
            };
            let end = self.searched + end;
            let rest = self.bytes.split_off(end + 1);
            let mut line = std::mem::replace(&mut self.bytes, rest);
            self.searched = 0;
            while line.last().is_some_and(u8::is_ascii_whitespace) {
                line.pop();
            }
            if !line.is_empty() {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(line: &str) -> Message {
        parse_line(line.as_bytes()).expect(line)
    }

    #[test]
    fn the_greeting_gives_the_version() {
        let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10},
            "package": "Debian 1:10.0.2+ds-2~bpo12+1"}, "capabilities": ["oob"]}}"#;
        let Message::Greeting(version) = parsed(greeting) else { panic!("not a greeting") };
        assert_eq!((version.major, version.minor, version.micro), (10, 0, 2));
        assert_eq!(version.to_string(), "10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)");
    }

    #[test]
    fn replies_keep_their_id() {
        assert_eq!(parsed(r#"{"return": {}, "id": 7}"#), Message::Return { id: Some(7), value: serde_json::json!({}) });
        assert_eq!(parsed(r#"{"return": null, "id": 8}"#), Message::Return { id: Some(8), value: Value::Null });
        let failure = parsed(r#"{"id": 9, "error": {"class": "CommandNotFound", "desc": "no such command"}}"#);
        assert_eq!(
            failure,
            Message::Failure { id: Some(9), class: "CommandNotFound".into(), description: "no such command".into() }
        );
    }

    #[test]
    fn events_that_matter_are_told_apart() {
        let event = |line| match parsed(line) {
            Message::Event(event) => event,
            other => panic!("{other:?}"),
        };
        let shutdown = event(
            r#"{"timestamp": {"seconds": 2, "microseconds": 3}, "event": "SHUTDOWN",
                "data": {"guest": true, "reason": "guest-shutdown"}}"#,
        );
        assert_eq!(shutdown.kind, EventKind::Shutdown { guest: true, reason: "guest-shutdown".into() });
        assert_eq!(shutdown.timestamp_us, 2_000_003);
        assert_eq!(
            event(r#"{"event": "STOP", "timestamp": {"seconds": -1, "microseconds": -1}}"#).kind,
            EventKind::Stop
        );
        let other = event(r#"{"event": "RTC_CHANGE", "data": {"offset": 1, "qom-path": "/machine"}}"#);
        assert_eq!(other.kind, EventKind::Other("RTC_CHANGE".into()));
    }

    #[test]
    fn objects_of_no_known_form_are_refused() {
        for line in ["{}", "[]", "1", "", "{\"id\": 1}", "{\"event\": 5}", "{\"return\": 1", "\u{fffd}"] {
            assert!(parse_line(line.as_bytes()).is_err(), "{line}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_line(&bytes);
        }

        #[test]
        fn arbitrary_json_like_text_never_panics(text in r#"\{("(return|error|event|id|QMP|data)": ?(\{\}|null|[0-9]{1,20}|"[a-z]*"),? ?){0,4}\}"#) {
            let _ = parse_line(text.as_bytes());
        }

        #[test]
        fn lines_do_not_depend_on_how_bytes_arrive(
            lines in proptest::collection::vec("[a-z{}]{1,20}", 0..10),
            cuts in proptest::collection::vec(1usize..7, 1..20),
        ) {
            let stream = lines.iter().map(|line| format!("{line}\r\n")).collect::<String>().into_bytes();
            let mut buffer = LineBuffer::default();
            let mut found = Vec::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                rest = later;
                buffer.extend(now);
                while let Some(line) = buffer.next_line() {
                    found.push(String::from_utf8(line).unwrap());
                }
            }
            prop_assert_eq!(found, lines);
            prop_assert!(buffer.is_empty());
        }
    }
}

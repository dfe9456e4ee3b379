//! The answering side: one thread that takes requests and passes each to the group it is about.
//!
//! A group's reactor answers between two turns of its loop; this thread waits for it with a deadline, so a reactor that
//! hangs shows as an error here and not as a command line that never returns.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dataplane::mailbox::{Receiver, Sender, mailbox};
use dataplane::wait::Bell;

use super::{MAX_REQUEST_BYTES, Request, Response};

/// How long a group may take to answer a question about its state.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a planned failover or a forced syncvm may take.
const ACTION_TIMEOUT: Duration = Duration::from_secs(30);

/// A request on its way to a group's reactor.
#[derive(Debug)]
pub struct GroupRequest {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes; may come later than the next turn.
    pub reply: mpsc::Sender<Response>,
}

/// How to reach the reactor of one group.
#[derive(Debug, Clone)]
pub struct GroupHandle {
    /// The reactor's mailbox.
    pub sender: Sender<GroupRequest>,
    /// Wakes the reactor.
    pub wake: Arc<Bell>,
}

impl GroupHandle {
    /// A mailbox and its receiving end.
    pub fn new(wake: Arc<Bell>) -> (Self, Receiver<GroupRequest>) {
        let (sender, receiver) = mailbox(usize::MAX);
        (Self { sender, wake }, receiver)
    }

    fn ask(&self, request: &Request) -> Response {
        let timeout = match request {
            Request::Status { .. } | Request::CrashPoint { .. } => STATUS_TIMEOUT,
            _ => ACTION_TIMEOUT,
        };
        let (reply, answer) = mpsc::channel();
        if self.sender.send(GroupRequest { request: request.clone(), reply }).is_err() {
            return Response::Refused("the group is restarting; see the daemon's log and try again".into());
        }
        self.wake.ring();
        match answer.recv_timeout(timeout) {
            Ok(response) => response,
            Err(RecvTimeoutError::Timeout) => {
                Response::Refused(format!("the group gave no answer within {} s", timeout.as_secs()))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Response::Refused("the group restarted meanwhile; see the daemon's log and try again".into())
            }
        }
    }
}

/// The groups that can be asked; a group that restarts replaces its handle.
pub type GroupHandles = Arc<Mutex<BTreeMap<String, GroupHandle>>>;

/// The listening socket and its thread.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
}

impl ControlServer {
    /// Listens on `path`, which only root may use.
    ///
    /// # Errors
    /// When a living daemon already listens there, or the socket cannot be made.
    pub fn start(path: &Path, groups: GroupHandles) -> std::io::Result<Self> {
        if UnixStream::connect(path).is_ok() {
            return Err(std::io::Error::new(
                std::io::ErrorKind::AddrInUse,
                format!("{}: another daemon listens there; stop it or give this one its own run_dir", path.display()),
            ));
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        std::thread::Builder::new().name("plover-control".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                let groups = groups.clone();
                // A thread each: a failover that takes seconds must not keep `status` waiting.
                let served =
                    std::thread::Builder::new().name("plover-request".into()).spawn(move || serve(stream, &groups));
                if let Err(error) = served {
                    tracing::warn!(%error, "no thread for a control request");
                }
            }
        })?;
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn serve(stream: UnixStream, groups: &GroupHandles) {
    let deadline = Some(Duration::from_secs(5));
    if stream.set_read_timeout(deadline).and(stream.set_write_timeout(deadline)).is_err() {
        return;
    }
    let mut line = String::new();
    let read = BufReader::new(&stream).take(MAX_REQUEST_BYTES as u64).read_line(&mut line);
    let response = match read {
        Ok(_) => match serde_json::from_str::<Request>(&line) {
            Ok(request) => answer(&request, groups),
            Err(error) => Response::Refused(format!("the request is not understood: {error}")),
        },
        Err(_) => return,
    };
    let mut text = serde_json::to_string(&response).expect("a response is plain data");
    text.push('\n');
    let _ = (&stream).write_all(text.as_bytes());
}

fn answer(request: &Request, groups: &GroupHandles) -> Response {
    let known: BTreeMap<String, GroupHandle> = groups.lock().expect("no holder of this lock panics").clone();
    if let Some(vm) = request.vm() {
        return match known.get(vm) {
            Some(group) => group.ask(request),
            None => {
                let names: Vec<&str> = known.keys().map(String::as_str).collect();
                Response::Refused(format!("this node has no VM {vm:?}; it has {}", names.join(", ")))
            }
        };
    }
    let mut all = Vec::new();
    for group in known.values() {
        match group.ask(request) {
            Response::Status(groups) => all.extend(groups),
            other => return other,
        }
    }
    Response::Status(all)
}

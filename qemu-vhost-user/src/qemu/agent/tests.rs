//! The client against the agent's own server, here in the test's process instead of QEMU's.

use super::*;
use plover_agent::server::Server;
use std::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(10);

struct Rig {
    directory: PathBuf,
}

impl Rig {
    fn new(name: &str) -> Rig {
        let directory = std::env::temp_dir().join(format!("plover-agent-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("make the test's directory");
        Rig { directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("agent.sock")
    }

    fn serve(&self) {
        Server::bind(&self.socket()).and_then(Server::start).expect("serve");
    }

    fn connect(&self) -> AgentClient {
        AgentClient::connect(&self.socket(), Instant::now() + PATIENCE).expect("connect")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Waits for a sample that satisfies `wanted`.
fn sample_where(clocks: &VcpuClocks, wanted: impl Fn(&ClockSample) -> bool) -> ClockSample {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(sample) = clocks.read().filter(&wanted) {
            return sample;
        }
        std::thread::yield_now();
    }
    panic!("no such sample within {PATIENCE:?}; the last one is {:?}", clocks.read());
}

#[test]
fn hello_tells_who_serves_and_that_this_is_not_qemu() {
    use std::os::unix::fs::PermissionsExt;
    let rig = Rig::new("hello");
    rig.serve();
    let mode = std::fs::metadata(rig.socket()).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = rig.connect();
    assert_eq!(client.hello().expect("hello"), Hello { pid: std::process::id(), has_yank: false });
    assert_eq!(client.peer_pid().expect("peer"), std::process::id() as i32);
    let error = client.register_yank().expect_err("a test exports no yank functions");
    assert!(matches!(error, AgentError::NoYank) && !error.is_disconnected(), "{error}");
}

#[test]
fn a_userfaultfd_arrives_ready_for_the_api_handshake() {
    let rig = Rig::new("uffd");
    rig.serve();
    let fd = match rig.connect().take_userfaultfd() {
        Ok(fd) => fd,
        Err(error @ AgentError::Failed { .. }) if !rustix::process::geteuid().is_root() => {
            assert!(error.to_string().contains("CAP_SYS_PTRACE"), "{error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let name = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd))).expect("readlink");
    assert_eq!(name.to_str(), Some("anon_inode:[userfaultfd]"));
    let flags = rustix::fs::fcntl_getfl(&fd).expect("flags");
    assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
}

#[test]
fn a_new_connection_supersedes_the_old_one() {
    let rig = Rig::new("supersede");
    rig.serve();
    let mut old = rig.connect();
    let mut new = rig.connect();
    let error = old.hello().expect_err("the old connection is over");
    assert!(error.is_disconnected(), "{error}");
    new.hello().expect("the new one is served");
    drop(new);
    rig.connect().hello().expect("and the agent accepts again");
}

#[test]
fn a_stale_socket_is_replaced_and_another_file_is_not() {
    let rig = Rig::new("stale");
    drop(std::os::unix::net::UnixListener::bind(rig.socket()).expect("a dead process's socket"));
    rig.serve();
    rig.connect().hello().expect("hello");
    let file = rig.directory.join("precious");
    std::fs::write(&file, "data").expect("write");
    assert!(Server::bind(&file).is_err());
    assert_eq!(std::fs::read(&file).expect("still there"), b"data");
}

#[test]
fn a_garbled_request_ends_the_connection_only() {
    let rig = Rig::new("garbled");
    rig.serve();
    let mut client = rig.connect();
    rustix::net::send(&client.socket, b"GET / HTTP/1.1\r\n", SendFlags::NOSIGNAL).expect("send");
    assert!(client.hello().expect_err("closed").is_disconnected());
    rig.connect().hello().expect("the agent lives on");
}

#[test]
fn a_process_that_exports_nothing_cannot_be_stopped_through_the_agent() {
    let rig = Rig::new("control");
    rig.serve();
    let mut client = rig.connect();
    let file = rig.directory.join("state");
    let refused = [
        client.stop(PATIENCE),
        client.cont(PATIENCE),
        client.save_devices_state(&file, PATIENCE),
        client.load_devices_state(&file, PATIENCE),
    ];
    assert!(refused.iter().all(|one| one.as_ref().is_err_and(AgentError::is_unsupported)), "{refused:?}");
    client.hello().expect("the connection is as before");
}

#[test]
fn the_late_answer_of_a_request_that_was_given_up_is_skipped() {
    let rig = Rig::new("late");
    rig.serve();
    let mut client = rig.connect();
    // As if this client had sent it and stopped waiting.
    let mut message = Request::Stop.encode();
    Request::set_tag(&mut message, u32::MAX);
    rustix::net::send(&client.socket, &message, SendFlags::NOSIGNAL).expect("send");
    assert_eq!(client.hello().expect("hello").pid, std::process::id());
}

#[test]
fn clocks_count_vcpu_threads_only_while_wanted() {
    let rig = Rig::new("clocks");
    rig.serve();
    let mut client = rig.connect();
    let clocks = client.clocks().expect("clocks");
    assert_eq!(clocks.read(), None);
    let (stop, stopped) = mpsc::channel::<()>();
    let vcpu = std::thread::Builder::new()
        .name("CPU 0/TEST".into())
        .spawn(move || {
            let mut sum = 0u64;
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                sum = std::hint::black_box(sum.wrapping_mul(31) + 1);
            }
        })
        .expect("spawn");
    clocks.set_period_us(DEFAULT_PERIOD_US);
    let first = sample_where(&clocks, |sample| sample.cpu_ns > 0);
    assert_eq!(first.vcpus, 1);
    let busy = sample_where(&clocks, |sample| sample.cpu_ns >= first.cpu_ns + 5_000_000);
    assert!(busy.at_ns - first.at_ns >= 5_000_000, "one thread cannot work more than time passes");
    assert!(busy.sequence > first.sequence);
    stop.send(()).expect("stop");
    vcpu.join().expect("join");

    clocks.set_period_us(0);
    // Asleep: the sample that was being taken may still come, then the sequence stands still until it is woken.
    let asleep = sample_where(&clocks, |sample| sample.sequence >= busy.sequence);
    client.hello().expect("hello");
    let later = clocks.read().expect("the last sample stays");
    assert!(later.sequence <= asleep.sequence + 1, "{asleep:?} {later:?}");
    clocks.set_period_us(MAX_PERIOD_US);
    let woken = sample_where(&clocks, |sample| sample.sequence > later.sequence && sample.vcpus == 0);
    assert!(woken.at_ns > later.at_ns);
}

#[test]
fn no_agent_is_an_error_with_the_remedy() {
    let error = AgentClient::connect(Path::new("/nonexistent/agent.sock"), Instant::now()).err().expect("nobody there");
    let text = error.to_string();
    assert!(text.contains("/nonexistent/agent.sock") && text.contains("LD_PRELOAD"), "{text}");
}

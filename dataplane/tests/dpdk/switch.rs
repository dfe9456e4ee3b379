//! virtio-user towards a switch's vhost-user port; DPDK's own testpmd with net_vhost stands in for Open vSwitch. It forwards
//! everything back to the only port that it has.

use crate::common::receive;
use crate::open;
use crate::packet::{finished, udp};
use dataplane::VNET_HEADER_BYTES;
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::uplink::dpdk::{Dpdk, DpdkError};
use dataplane::uplink::filter::Filter;
use dataplane::uplink::{Intake, OffloadFlags, Uplink};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// A testpmd that ends with the test, and its folder with it.
struct Switch {
    process: Child,
    directory: PathBuf,
}

impl Switch {
    /// It listens on the socket, or connects to it.
    fn start(name: &str, is_client: bool) -> Option<Switch> {
        let directory = std::env::temp_dir().join(format!("plover-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let device = format!("net_vhost0,iface={}/port.sock,client={}", directory.display(), u8::from(is_client));
        let process = Command::new("dpdk-testpmd")
            // Two threads that share all cores.
            .args(["--no-huge", "--no-shconf", "-m", "128", "--no-pci", "--no-telemetry", "--lcores", "(0,1)@0"])
            .args(["--vdev", &device, "--", "--total-num-mbufs=2048", "--forward-mode=io", "--auto-start"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match process {
            Ok(process) => Some(Switch { process, directory }),
            Err(error) => {
                eprintln!("skipped: dpdk-testpmd cannot be started ({error}); Debian has it in the package dpdk");
                None
            }
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("port.sock")
    }

    fn await_socket(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.socket().exists() {
            assert!(self.process.try_wait().unwrap().is_none(), "testpmd ended");
            assert!(Instant::now() < deadline, "testpmd does not listen after 30 s");
            // Looked at now and then: there is nothing to wait on.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Sends numbered frames until the last one that was sent comes back; nothing is on its way then.
fn await_forwarding(port: &mut dyn Uplink) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let (mut batch, mut filter) = (BatchBuilder::new(MIN_BATCH_BYTES), Filter::default());
    for number in 1u64.. {
        assert!(Instant::now() < deadline, "nothing comes back after 30 s");
        let mut probe = [0; VNET_HEADER_BYTES + 60];
        probe[VNET_HEADER_BYTES + 14..][..8].copy_from_slice(&number.to_le_bytes());
        assert!(port.send(&probe).unwrap());
        port.flush().unwrap();
        let patience = Instant::now() + Duration::from_millis(20);
        while Instant::now() < patience {
            port.recv_burst(&mut Intake::new(&mut batch, &mut filter), 64).unwrap();
            if batch::frames(&batch.finish()).unwrap().any(|frame| frame == probe) {
                return;
            }
        }
    }
}

#[test]
fn frames_cross_a_switch_that_listens() {
    let Some(mut switch) = Switch::start("listens", false) else { return };
    switch.await_socket();
    let mut port = open(&format!("net_virtio_user0,path={}", switch.socket().display()), Some(MAC));
    await_forwarding(&mut port);
    assert!(port.is_link_up());
    for csum in [false, true] {
        port.set_offload(OffloadFlags { csum, ..OffloadFlags::default() }).unwrap();
        for bytes in [0, 1, 500, 1472] {
            let payload: Vec<u8> = (0..bytes).map(|i| (i * 37 % 251) as u8).collect();
            let frame = udp([[2, 0, 0, 0, 0, 1], MAC], [[10, 0, 0, 1], [10, 0, 0, 2]], [1000, 2000], &payload);
            assert!(port.send(&frame).unwrap());
            port.flush().unwrap();
            // Whoever computed the checksum: the port, the switch, or our own code for a frame that came without.
            let back = receive(&mut port);
            assert_eq!(back[VNET_HEADER_BYTES..], finished(&frame)[VNET_HEADER_BYTES..]);
            assert!(csum || back[..VNET_HEADER_BYTES] == [0; VNET_HEADER_BYTES]);
        }
    }
    // A turn's output in bursts, in order.
    let frames: Vec<Vec<u8>> = (0..200u8).map(|i| [vec![0; VNET_HEADER_BYTES + 14], vec![i; 50]].concat()).collect();
    for frame in &frames {
        assert!(port.send(frame).unwrap());
    }
    port.flush().unwrap();
    for frame in &frames {
        assert!(receive(&mut port) == *frame);
    }
}

#[test]
fn a_switch_that_goes_away_costs_frames_and_not_the_port() {
    let Some(mut switch) = Switch::start("goes", false) else { return };
    switch.await_socket();
    let mut port = open(&format!("net_virtio_user1,path={}", switch.socket().display()), None);
    await_forwarding(&mut port);
    drop(switch);
    let deadline = Instant::now() + Duration::from_secs(10);
    while port.drops().full == 0 {
        assert!(Instant::now() < deadline, "the port took everything for 10 s: {:?}", port.drops());
        port.send(&[0; VNET_HEADER_BYTES + 60]).unwrap();
        port.flush().unwrap();
        port.discard_burst(64).unwrap();
    }
}

#[test]
fn a_port_that_listens_waits_for_its_switch_but_not_for_ever() {
    let Some(switch) = Switch::start("calls", true) else { return };
    let name = format!("net_virtio_user2,path={},server=1", switch.socket().display());
    let mut port = open(&name, None);
    await_forwarding(&mut port);
    drop(port);
    drop(switch);
    let directory = std::env::temp_dir().join(format!("plover-alone-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let name = format!("net_virtio_user3,path={}/port.sock,server=1", directory.display());
    let error = Dpdk::open(&name, None).unwrap_err();
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(matches!(error, DpdkError::NoPort { .. }), "{error}");
}

//! scratch
use dataplane::fabric::*;
use dataplane::wait::*;
use std::net::*;
use std::sync::Arc;
use std::sync::atomic::*;
use std::time::Instant;

struct End { fabric: PeerFabric, poller: Arc<Poller>, peer: PeerId, ready: Vec<Ready>, received: Vec<u8> }
impl End {
    fn new(l: &Listener, rs: Vec<Replica>, me: u8) -> End {
        let config = FabricConfig { silence_timeout_us: 600_000_000, replace_after_us: 600_000_000, ping_us: 60_000_000, ..FabricConfig::default() };
        let port = l.register("perf", rs, PeerId(me)).unwrap();
        let poller = Arc::new(Poller::new().unwrap());
        let fabric = PeerFabric::new(config, port.control, poller.clone(), 1000, now_us()).unwrap();
        End { fabric, poller, peer: PeerId(1 - me), ready: vec![], received: vec![] }
    }
    fn step(&mut self) {
        self.poller.wait(Some(100), &mut self.ready).unwrap();
        self.fabric.poll(now_us(), &mut |_| {});
    }
}
fn ends() -> ([Listener; 2], [End; 2]) {
    let bind = |name: &str| Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), NodeIdentity::new(name).unwrap(), Security::Encrypted(FabricKey::generate().unwrap())).unwrap();
    let key = FabricKey::generate().unwrap(); let _ = key; let _ = bind;
    let sec = Security::Insecure;
    let b = |name: &str| Listener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), NodeIdentity::new(name).unwrap(), sec.clone()).unwrap();
    let ls = [b("node0"), b("node1")];
    let rs: Vec<Replica> = (0..2u8).map(|i| Replica { id: PeerId(i), node: format!("node{i}"), addr: ls[i as usize].local_addr(), transports: vec![Transport::Shm] }).collect();
    let mut e = [End::new(&ls[0], rs.clone(), 0), End::new(&ls[1], rs, 1)];
    while !(e[0].fabric.is_connected(PeerId(1)) && e[1].fabric.is_connected(PeerId(0))) { e[0].step(); e[1].step(); }
    (ls, e)
}
#[repr(align(128))] #[derive(Default)] struct Line(AtomicU64);
#[derive(Default)] struct Shared { mode: AtomicU8, line: Line }
fn pin(c: usize) { unsafe { let mut s: libc::cpu_set_t = std::mem::zeroed(); libc::CPU_SET(c, &mut s); assert_eq!(libc::sched_setaffinity(0, size_of_val(&s), &s), 0); } }
fn poll_one(e: &mut End, now: u64) -> bool { let End { fabric, received, .. } = e; let mut came = false; fabric.poll_lanes(now, &mut |ev| if let FabricEvent::Message { bytes, .. } = ev { received.clear(); received.extend_from_slice(bytes); came = true; }); came }
fn main() {
    let rounds: usize = std::env::args().nth(1).map_or(20, |a| a.parse().unwrap());
    // own work: both ends in one thread
    { let (_l, [mut a, mut b]) = ends(); pin(0); let now = now_us();
      for len in [30, 64, 300] { let m = vec![7u8; len]; let mut best = f64::MAX;
        for _ in 0..50 { let t = Instant::now(); for _ in 0..2000 { a.fabric.send(a.peer, &[&m]).unwrap(); while !poll_one(&mut b, now) {} let End{fabric, received, peer, ..} = &mut b; fabric.send(*peer, &[received]).unwrap(); while !poll_one(&mut a, now) {} } best = best.min(t.elapsed().as_nanos() as f64 / 2000.0); }
        println!("one thread, {len} bytes: {best:.1} ns for both sides, pacing included"); } }
    let (_l, [mut a, mut b]) = ends();
    let sh = Arc::new(Shared::default()); let s2 = sh.clone();
    let echo = std::thread::spawn(move || { pin(1); let (mut answered, mut polls, mut now) = (0, 0u64, now_us());
        loop { match s2.mode.load(Ordering::Acquire) {
            1 => { polls += 1; if polls % 4096 == 0 { now = now_us(); }
                let received = &mut b.received;
                b.fabric.poll_lanes(now, &mut |ev| if let FabricEvent::Message { bytes, .. } = ev { received.extend_from_slice(bytes) });
                if !b.received.is_empty() { b.fabric.send(b.peer, &[&b.received]).unwrap(); b.received.clear(); } }
            2 => { let n = s2.line.0.load(Ordering::Acquire); if n % 2 == 1 && n != answered { answered = n; s2.line.0.store(n + 1, Ordering::Release); } }
            3 => return,
            _ => {} }
            std::hint::spin_loop(); } });
    pin(0);
    let mut trips = 0u64;
    let mut window = |mode: u8, a: &mut End, len: usize, now: u64| -> f64 {
        sh.mode.store(mode, Ordering::Release);
        let mut m = vec![0xa5u8; len]; let mut ts = vec![];
        for _ in 0..250 { let t = Instant::now(); for _ in 0..200 { trips += 1;
            if mode == 1 { m[..8].copy_from_slice(&trips.to_le_bytes()); a.fabric.send(a.peer, &[&m]).unwrap();
                let mut came = None; loop { a.fabric.poll_lanes(now, &mut |ev| came = Some(matches!(ev, FabricEvent::Message { bytes, .. } if bytes == m))); if came.is_some() { break; } std::hint::spin_loop(); } assert_eq!(came, Some(true)); }
            else { let n = 2 * trips + 1; sh.line.0.store(n, Ordering::Release); while sh.line.0.load(Ordering::Acquire) != n + 1 { std::hint::spin_loop(); } } }
            ts.push(t.elapsed().as_nanos() as f64 / 200.0); }
        sh.mode.store(0, Ordering::Release); ts.sort_by(f64::total_cmp); ts[ts.len() / 2] };
    for len in [30usize, 64, 112] { let mut r = vec![]; let (mut xs, mut ys) = (vec![], vec![]);
        for i in 0..rounds { let now = now_us(); let (x, y); if i % 2 == 0 { x = window(1, &mut a, len, now); y = window(2, &mut a, len, now); } else { y = window(2, &mut a, len, now); x = window(1, &mut a, len, now); } if i > 1 { r.push(x / y); xs.push(x); ys.push(y); } }
        for v in [&mut r, &mut xs, &mut ys] { v.sort_by(f64::total_cmp); }
        let q = |v: &Vec<f64>, p: f64| v[((v.len() - 1) as f64 * p) as usize];
        println!("{len} bytes: {:.2} x ({:.2}..{:.2}), {:.1} ns against {:.1} ns", q(&r, 0.5), q(&r, 0.25), q(&r, 0.75), q(&xs, 0.5), q(&ys, 0.5)); }
    sh.mode.store(3, Ordering::Release); echo.join().unwrap();
}

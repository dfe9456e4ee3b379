//! Debug: brings a protected guest up and waits.
use std::io::Read;
use rig::*;
fn main() {
    let bed = Testbed::new().unwrap();
    let mut options = ClusterOptions::new(Service::Redis, std::env::args().nth(1).unwrap().into());
    options.policy = std::env::args().nth(2).unwrap_or_default().replace(';', "\n");
    let cluster = Cluster::new(&bed, options).unwrap();
    cluster.start_all().unwrap();
    println!("dir {} client ns {}", bed.directory().display(), bed.client().namespace().name());
    for h in bed.hosts() { println!("{} {}", h.name(), cluster.config_path(h).display()); }
    match cluster.wait_protected(Deadline::after_secs(40)) { Ok(h) => println!("protected, leader {}", h.name()), Err(e) => println!("{e}") }
    let _ = std::io::stdin().read(&mut [0; 1]);
}

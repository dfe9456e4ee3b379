//! The libFuzzer binary: `PLOVER_FUZZ_TARGET` names the target, the rest of the command line is libFuzzer's.
//! Started by `cargo xtask fuzz`.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<fuzz::Target> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("PLOVER_FUZZ_TARGET").expect("PLOVER_FUZZ_TARGET names the target");
        *fuzz::TARGETS.iter().find(|target| target.name == name).expect("a target of fuzz::TARGETS")
    });
    (target.run)(data);
});

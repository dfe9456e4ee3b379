//! Plays `tests/transcripts/*.txt` and compares with the output that they hold. `UPDATE_TRANSCRIPTS=1` rewrites it.

use std::fs;
use std::path::PathBuf;

#[test]
fn transcripts() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts");
    let update = std::env::var_os("UPDATE_TRANSCRIPTS").is_some();
    let mut played = 0;
    for file in fs::read_dir(&folder).expect("the folder is part of the repository") {
        let path = file.expect("a readable folder").path();
        let golden = fs::read_to_string(&path).expect("a readable transcript");
        let now = consensus::sim::play(&golden).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if update {
            fs::write(&path, &now).expect("a writable transcript");
        } else if let Some((line, (old, new))) =
            golden.lines().zip(now.lines()).enumerate().find(|(_, (old, new))| old != new)
        {
            panic!(
                "{} line {}:\n  was {old}\n  now {new}\nIf that is meant: UPDATE_TRANSCRIPTS=1 cargo test -p consensus --test transcripts",
                path.display(),
                line + 1
            );
        } else {
            assert_eq!(golden, now, "{}: the lengths differ", path.display());
        }
        played += 1;
    }
    assert!(played >= 10, "only {played} transcripts in {}", folder.display());
}

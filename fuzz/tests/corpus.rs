//! Every input that fuzzing found worth keeping, replayed: findings stay regression tests.

use std::path::Path;

#[test]
fn every_input_of_every_corpus_passes() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in fuzz::TARGETS {
        let directory = corpora.join(target.name);
        let inputs = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let mut replayed = 0;
        for input in inputs {
            let path = input.unwrap().path();
            println!("{}", path.display());
            (target.run)(&std::fs::read(&path).unwrap());
            replayed += 1;
        }
        assert!(replayed > 0, "the corpus of {} is empty", target.name);
    }
}

#[test]
fn a_corpus_belongs_to_a_target() {
    for corpus in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")).unwrap() {
        let name = corpus.unwrap().file_name().into_string().unwrap();
        assert!(fuzz::TARGETS.iter().any(|target| target.name == name), "no target is called {name}");
    }
}

//! A checking client as a process of its own, started by the test bed inside a network namespace.
//!
//! `rig-client JOB PARAMETERS` with the parameters as JSON (`{}` for all defaults); the lines on stdin and stdout are described in
//! `rig::client::protocol`. Exit status: 0 reported, 1 could not do its job, 2 wrong arguments, 3 the parent is gone, 4 ended by
//! its deadline.

use std::process::ExitCode;
use std::time::Duration;

use rig::client::control::{Control, Mouth};
use rig::client::job;
use rig::client::protocol::{Job, Output};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, parameters] = arguments.as_slice() else {
        eprintln!("usage: rig-client redis-load|registers|ping|verify-redis|probe PARAMETERS-AS-JSON");
        return ExitCode::from(2);
    };
    let job = match Job::from_arguments(name, parameters) {
        Ok(job) => job,
        Err(error) => {
            eprintln!("rig-client: {name} {parameters}: {error}");
            return ExitCode::from(2);
        }
    };
    let mut control = Control::from_stdin(Duration::from_millis(job.deadline_ms()));
    let mouth = Mouth::stdout();
    let result = job::run(&job, &mut control, &mut |output| mouth.say(output));
    let status = ExitCode::from(u8::from(result.is_err()));
    mouth.say(match result {
        Ok(report) => Output::Report(Box::new(report)),
        Err(error) => Output::Failed { error },
    });
    mouth.close();
    status
}

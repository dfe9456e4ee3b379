//! `plover`: the daemon and the command line. Parsing and exit codes; the work is in the library.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the configuration cannot be used, 4 the daemon refused, 5 the log is whole
//! but its end is in doubt.

mod log;

use std::ffi::OsString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use dataplane::fabric::FabricKey;
use qemu_vhost_user::config::{DEFAULT_FABRIC_KEY, NodeConfig, VmConfig};
use qemu_vhost_user::control::{Request, Response};
use qemu_vhost_user::node::SocketOverride;
use qemu_vhost_user::{control, device, launch, node};

/// Longest time that the command line waits for the daemon: a planned failover includes a syncvm.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(40);

#[derive(Debug, Parser)]
#[command(name = "plover", version, about = "Fault tolerance for virtual machines on stock QEMU")]
struct Cli {
    /// Print what this vhost-user backend can do, as JSON, and exit.
    #[arg(long)]
    print_capabilities: bool,
    /// The node's configuration.
    #[arg(long, global = true, default_value = "/etc/plover/node.toml")]
    config: PathBuf,
    #[command(flatten)]
    socket: SocketArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

/// QEMU's conventions for backend programs (docs/interop/vhost-user.rst).
#[derive(Debug, Args)]
struct SocketArgs {
    /// Listen for QEMU on this vhost-user socket (one VM only).
    #[arg(long, conflicts_with = "fd", global = true)]
    socket_path: Option<PathBuf>,
    /// Speak vhost-user on this inherited socket, connected or listening (one VM only).
    #[arg(long, global = true)]
    fd: Option<RawFd>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground until SIGTERM.
    Run,
    /// Print the QEMU arguments and environment for this replica of a VM.
    QemuArgs {
        /// The VM.
        vm: String,
    },
    /// Start QEMU with those arguments and your own.
    Launch {
        /// The VM.
        vm: String,
        /// More arguments for QEMU.
        #[arg(last = true)]
        qemu: Vec<OsString>,
    },
    /// Show role, protection, last syncvm, log and peers.
    Status {
        /// The VM; all when absent.
        vm: Option<String>,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Planned: the secondary takes over after one last syncvm.
    Failover {
        /// The VM.
        vm: String,
    },
    /// One syncvm now.
    Sync {
        /// The VM.
        vm: String,
    },
    /// All guests of the group are lost: boot this node's guest afresh.
    ColdStart {
        /// The VM.
        vm: String,
    },
    /// Write a fresh key for the traffic between the nodes. Copy the file to all nodes.
    Keygen {
        /// A new file; never overwritten.
        #[arg(default_value = DEFAULT_FABRIC_KEY)]
        path: PathBuf,
    },
    /// Look at a VM's log on this node's disks; the daemon must not run.
    Log {
        #[command(subcommand)]
        what: LogCommand,
    },
    /// Tests: arm a crash point of syncvm (needs debug_hooks = true).
    #[command(hide = true)]
    CrashPoint {
        /// The VM.
        vm: String,
        /// A phase's name.
        phase: String,
        /// kill-daemon, kill-qemu, kill-both or freeze-daemon.
        action: String,
    },
}

#[derive(Debug, Subcommand)]
enum LogCommand {
    /// Say whether it is whole, and what it holds. Exit code 0: whole; 1: damaged; 5: a replica would have to ask the others.
    Check {
        /// The VM.
        vm: String,
    },
    /// Print every record.
    Dump {
        /// The VM.
        vm: String,
        /// Also print the frames of inputs, in hexadecimal.
        #[arg(long)]
        frames: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.print_capabilities {
        println!("{}", device::capabilities_json());
        return ExitCode::SUCCESS;
    }
    let has_socket = cli.socket.socket_path.is_some() || cli.socket.fd.is_some();
    let command = match cli.command {
        Some(command) => command,
        None if has_socket => Command::Run,
        None => {
            eprintln!("plover: no command; see plover --help");
            return ExitCode::from(2);
        }
    };
    // Needs no configuration, which may well be written later.
    if let Command::Keygen { path } = command {
        return keygen(&path);
    }
    let config = match NodeConfig::load(&cli.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("plover: {error}");
            return ExitCode::from(3);
        }
    };
    match execute(command, config, cli.socket, &cli.config) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("plover: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command, config: NodeConfig, socket: SocketArgs, path: &Path) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run => {
            start_log();
            node::check_privileges()?;
            let security = match config.security() {
                Ok(security) => security,
                Err(error) => {
                    tracing::error!("{error}");
                    return Ok(ExitCode::from(3));
                }
            };
            node::run(config, security, socket.into_override()?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Keygen { .. } => unreachable!("done before the configuration is read"),
        Command::QemuArgs { vm } => {
            println!("{}", launch::command_text(&config, vm_of(&config, &vm, path)?));
            Ok(ExitCode::SUCCESS)
        }
        Command::Launch { vm, qemu } => Err(launch::exec(&config, vm_of(&config, &vm, path)?, &qemu).into()),
        Command::Status { vm, json } => ask(&config, &Request::Status { vm }, json),
        Command::Failover { vm } => ask(&config, &Request::Failover { vm }, false),
        Command::Sync { vm } => ask(&config, &Request::Sync { vm }, false),
        Command::ColdStart { vm } => ask(&config, &Request::ColdStart { vm }, false),
        Command::Log { what: LogCommand::Check { vm } } => {
            log::check(&config, vm_of(&config, &vm, path)?, &mut std::io::stdout().lock())
        }
        Command::Log { what: LogCommand::Dump { vm, frames } } => {
            log::dump(&config, vm_of(&config, &vm, path)?, frames, &mut std::io::stdout().lock())
        }
        Command::CrashPoint { vm, phase, action } => ask(&config, &Request::CrashPoint { vm, phase, action }, false),
    }
}

fn keygen(path: &Path) -> ExitCode {
    match FabricKey::create(path) {
        Ok(_) => {
            let path = path.display();
            println!(
                "wrote {path}: copy it to the same place on all nodes, readable by root only, and start plover anew"
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("plover: {error}");
            ExitCode::FAILURE
        }
    }
}

impl SocketArgs {
    fn into_override(self) -> anyhow::Result<SocketOverride> {
        let fd = match self.fd {
            // SAFETY: fcntl only looks at the number.
            Some(fd) if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 => {
                anyhow::bail!("--fd {fd}: no such open descriptor was inherited")
            }
            // SAFETY: the descriptor is open (checked), above stdio, and by the convention of `--fd` ours alone.
            Some(fd) => Some(unsafe { OwnedFd::from_raw_fd(fd) }),
            None => None,
        };
        Ok(SocketOverride { path: self.socket_path, fd })
    }
}

fn vm_of<'a>(config: &'a NodeConfig, name: &str, path: &Path) -> anyhow::Result<&'a VmConfig> {
    config.vms.get(name).ok_or_else(|| {
        let known: Vec<&str> = config.vms.keys().map(String::as_str).collect();
        anyhow::anyhow!("{} has no VM {name:?}; it has {}", path.display(), known.join(", "))
    })
}

fn ask(config: &NodeConfig, request: &Request, json: bool) -> anyhow::Result<ExitCode> {
    match control::request(&config.control_socket(), request, ANSWER_TIMEOUT)? {
        Response::Status(groups) if json => println!("{}", serde_json::to_string_pretty(&groups)?),
        Response::Status(groups) => groups.iter().for_each(|group| print!("{}", group.render())),
        Response::Done(text) => println!("{text}"),
        Response::Refused(text) => {
            eprintln!("plover: {text}");
            return Ok(ExitCode::from(4));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PLOVER_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

//! The daemon: arguments into library calls, nothing else.

#[path = "common/keys.rs"]
mod keys;
#[path = "vdblk/known.rs"]
mod known;
#[path = "common/plugins.rs"]
mod plugins;
#[path = "common/usage.rs"]
mod usage;

use clap::{ArgAction, CommandFactory, Parser, ValueEnum};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use vdblk::daemon::{self, Config, Socket};
use vdblk::format::Format;
use vdblk::io::EngineKind;
use vdblk::limits;
use vdblk::vd::{CacheMode, ImageSpec};

const ENDS: &str = "Signals: SIGTERM and SIGINT end it in order, SIGKILL loses nothing that was \
                    acknowledged. SIGHUP: the file of a raw image has been made longer; the guest is told the disk's \
                    new size.\nExit status: 0 it ended as it was asked to, 1 an error, with one line on standard error, \
                    2 wrong usage.\nSizes and offsets in messages are bytes. README.md has the commands of the \
                    virtual machine monitors.";

/// The name in messages.
const PROGRAM: &str = "vdblk";

/// Serves a virtual disk image, with its snapshots, as a vhost-user-blk device.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 110, after_help = ENDS)]
struct Args {
    /// Listen on a unix socket of this name, which is made; a stale one is replaced. Without this and --fd the socket
    /// is systemd's
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,
    /// Use this inherited socket, listening or connected: the number of its descriptor
    #[arg(long, value_name = "N")]
    fd: Option<i32>,
    /// Permissions of the socket file, octal, 0 to 777
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = octal)]
    socket_mode: u32,
    /// Group of the socket file: a name of /etc/group or a number [default: this process's]
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// Print what this back-end can do, as QEMU's conventions ask, and exit
    #[arg(long, action = ArgAction::SetTrue)]
    print_capabilities: bool,
    /// Print the completions of these options for a shell, and exit
    #[arg(long, value_name = "SHELL", exclusive = true)]
    completions: Option<clap_complete::Shell>,
    /// Print the man page, and exit
    #[arg(long, exclusive = true)]
    manpage: bool,

    /// The image to serve: a file, or a block device with --format raw
    #[arg(long, value_name = "FILE", required_unless_present_any = ["print_capabilities", "medium", "vbox"])]
    blk_file: Option<PathBuf>,
    #[command(flatten)]
    known: known::Known,
    /// Its format: raw, vdi, vmdk, vhd, vhdx, qcow2, qcow, qed, parallels, dmg or cue [default: what extension and contents agree on; the extension .raw says raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Show the image as it was at this internal snapshot (its name, else its number; vdimg info lists them); with
    /// --read-only
    #[arg(long, value_name = "NAME|ID", requires = "read_only")]
    snapshot: Option<String>,
    /// A parent of the image, base first (repeatable). Those that are not named are searched by UUID: in the folders of
    /// --parent-dir, then, if none was named, in the image's own; each with the folders below it, and of one called
    /// Snapshots the one above too
    #[arg(long, value_name = "FILE[,format=F]", value_parser = ImageSpec::parse)]
    parent: Vec<ImageSpec>,
    /// A folder to search parents in that are not named; see --parent (repeatable)
    #[arg(long, value_name = "DIR", value_parser = usage::existing_dir)]
    parent_dir: Vec<PathBuf>,
    /// Take a parent although it is not the one the image names
    #[arg(long)]
    allow_parent_mismatch: bool,
    /// Write to the image although another image in its folder is based on it
    #[arg(long)]
    allow_write_to_parent: bool,
    /// Open images that describe disks of this host (VMDK: full and partitioned devices)
    #[arg(long)]
    allow_raw_device: bool,
    /// Write into this differencing VDI; the image itself stays as it is. It is made if it is not there; an overlay of
    /// this image is gone on with, and any other file refused
    #[arg(long, value_name = "FILE", conflicts_with = "read_only")]
    overlay: Option<PathBuf>,
    /// Remember in this file which image the disk is served from, across live snapshots and merges: it is made if it is not there, and
    /// where it is, the image it names is served in place of --blk-file's, whose record it must be
    #[arg(long, value_name = "FILE", requires = "blk_file", conflicts_with_all = ["read_only", "overlay", "snapshot"])]
    record: Option<PathBuf>,
    /// Keep blocks of what is below the image that is written (of --read-only: of all) in this cache image, which vdimg
    /// create-cache makes; for slow storage and packed images. It is used by one disk at a time, and begins empty after a crash
    #[arg(long, value_name = "FILE")]
    cache_image: Option<PathBuf>,
    #[command(flatten)]
    keys: keys::Keys,
    #[command(flatten)]
    _plugins: plugins::Plugins,
    /// Take no changes; several may serve an image so at a time
    #[arg(long)]
    read_only: bool,
    /// Seconds to wait for a lock that another process holds, 0 or more
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    lock_wait: u64,

    /// Request queues the device offers, 1 to 64 [default: one per host CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(limits::MAX_QUEUES)))]
    num_queues: Option<u16>,
    /// Largest ring a front-end may set up, in entries: a power of two from 16 to 1024
    #[arg(long, value_name = "N", default_value_t = limits::MAX_QUEUE_SIZE, value_parser = queue_size)]
    queue_size: u16,
    /// none: past the page cache; writeback: a flush of the guest makes durable; writethrough: every write is synced;
    /// unsafe: flushes are ignored
    #[arg(long, value_enum, default_value_t = Cache::Writeback)]
    cache: Cache,
    /// unmap: discards give space back to the file system; ignore: they are not offered
    #[arg(long, value_enum, default_value_t = Discard::Unmap)]
    discard: Discard,
    /// The serial number the guest sees, at most 20 bytes [default: as VirtualBox makes it from the base's UUID]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    serial: Option<String>,
    /// How files are read and written; auto: io_uring where it is allowed, else threads
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    io_engine: Engine,
    /// Microseconds to poll for further requests before sleeping, 0 to 1000
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=i64::from(limits::MAX_POLL_MICROS)))]
    poll_us: u32,

    /// End when the front-end disconnects, instead of listening again
    #[arg(long)]
    once: bool,
    /// On SIGTERM, also wait until everything is on disk
    #[arg(long)]
    flush_on_exit: bool,
    /// What to log on standard error: this and what is more severe
    #[arg(long, value_enum, default_value_t = LogLevel::Info)]
    log_level: LogLevel,
    /// How to log: lines for people or JSON objects, a line each
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cache {
    None,
    Writeback,
    Writethrough,
    Unsafe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Discard {
    Unmap,
    Ignore,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    Auto,
    #[value(name = "io_uring")]
    IoUring,
    Threads,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn octal(s: &str) -> Result<u32, String> {
    u32::from_str_radix(s, 8)
        .ok()
        .filter(|m| *m <= 0o777)
        .ok_or_else(|| "an octal mode up to 777".to_string())
}

fn queue_size(s: &str) -> Result<u16, String> {
    let (min, max) = (limits::MIN_QUEUE_SIZE, limits::MAX_QUEUE_SIZE);
    let n: Option<u16> = s.parse().ok();
    n.filter(|n| n.is_power_of_two() && (min..=max).contains(n))
        .ok_or_else(|| format!("a power of two from {min} to {max}"))
}

fn serial(s: &str) -> Result<String, String> {
    if s.len() <= 20 { Ok(s.to_string()) } else { Err("at most 20 bytes".to_string()) }
}

impl Args {
    fn config(self) -> Config {
        Config {
            socket: match (self.socket_path, self.fd) {
                (Some(path), _) => Socket::Path { path, mode: self.socket_mode, group: self.socket_group },
                (None, Some(fd)) => Socket::Inherited(fd),
                (None, None) => Socket::Activated,
            },
            image: ImageSpec { path: self.blk_file.unwrap_or_default(), format: self.format },
            snapshot: self.snapshot,
            parents: self.parent,
            parent_dirs: self.parent_dir,
            allow_parent_mismatch: self.allow_parent_mismatch,
            allow_write_to_parent: self.allow_write_to_parent,
            allow_raw_device: self.allow_raw_device,
            cache_image: self.cache_image,
            keys: self.keys.files(),
            record: self.record,
            overlay: self.overlay,
            read_only: self.read_only,
            lock_wait: Duration::from_secs(self.lock_wait),
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            cache: match self.cache {
                Cache::None => CacheMode::None,
                Cache::Writeback => CacheMode::Writeback,
                Cache::Writethrough => CacheMode::Writethrough,
                Cache::Unsafe => CacheMode::Unsafe,
            },
            discard: self.discard == Discard::Unmap,
            serial: self.serial,
            engine: match self.io_engine {
                Engine::Auto => EngineKind::Auto,
                Engine::IoUring => EngineKind::IoUring,
                Engine::Threads => EngineKind::Threads,
            },
            poll: Duration::from_micros(u64::from(self.poll_us)),
            once: self.once,
            flush_on_exit: self.flush_on_exit,
        }
    }

    fn start_logging(&self) {
        let level = match self.log_level {
            LogLevel::Error => tracing::Level::ERROR,
            LogLevel::Warn => tracing::Level::WARN,
            LogLevel::Info => tracing::Level::INFO,
            LogLevel::Debug => tracing::Level::DEBUG,
            LogLevel::Trace => tracing::Level::TRACE,
        };
        let log = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::stderr().is_terminal())
            // A log that cannot be written would be told of on stderr, that is in itself, and end the thread.
            .log_internal_errors(false)
            .with_target(false);
        match self.log_format {
            LogFormat::Text => log.init(),
            LogFormat::Json => log.json().init(),
        }
    }
}

fn main() -> ExitCode {
    // QEMU's conventions: this option alone decides, whatever stands beside it.
    if std::env::args_os().skip(1).any(|a| a == "--print-capabilities") {
        return ended(print_capabilities());
    }
    if let Err(e) = plugins::load(&|what| usage::tell(PROGRAM, what)) {
        return ended(Err(e));
    }
    let args = match arguments() {
        Ok(args) => args,
        Err(e) => return usage::refuse(PROGRAM, &e),
    };
    if args.completions.is_some() || args.manpage {
        return ended(print_page(args.completions));
    }
    args.start_logging();
    let known = args.known.clone();
    ended(known.serve(args.config()))
}

fn ended(result: vdblk::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            usage::tell(PROGRAM, &e.to_string());
            ExitCode::FAILURE
        }
    }
}

fn print_capabilities() -> vdblk::Result<()> {
    let printed = writeln!(std::io::stdout(), "{}", daemon::CAPABILITIES);
    printed.map_err(|e| vdblk::Error::io("print what this back-end can do", e))
}

/// The completions for a shell, or the man page: from the same definitions as the command line.
fn print_page(shell: Option<clap_complete::Shell>) -> vdblk::Result<()> {
    let mut page = Vec::new();
    let made = match shell {
        Some(shell) => {
            clap_complete::generate(shell, &mut Args::command(), PROGRAM, &mut page);
            Ok(())
        }
        None => clap_mangen::Man::new(Args::command()).render(&mut page),
    };
    let printed = made.and_then(|()| std::io::stdout().write_all(&page));
    printed.map_err(|e| vdblk::Error::io("print the page", e))
}

/// The arguments, if they make sense by themselves.
fn arguments() -> Result<Args, clap::Error> {
    let args = Args::try_parse()?;
    let prints = args.manpage || args.completions.is_some();
    if !prints && args.socket_path.is_none() && args.fd.is_none() && std::env::var_os("LISTEN_FDS").is_none()
    {
        let what =
            "no socket was given: pass --socket-path PATH or --fd N, or start it by a systemd socket unit";
        return Err(Args::command().error(clap::error::ErrorKind::MissingRequiredArgument, what));
    }
    Ok(args)
}

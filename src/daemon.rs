//! The daemon: opens a disk, listens, serves, and leaves everything in order.

mod overlay;
mod recorded;

use crate::error::{Error, ErrorKind, Result};
use crate::filter::KeyFiles;
use crate::format::Format;
use crate::io::{EngineKind, make_engine};
use crate::job::human_bytes;
use crate::limits;
use crate::live::LiveDisk;
use crate::vd::{CacheMode, Channel, Disk, DiskOptions, ImageSpec, OpenDisk, OpenedDisk, open_disk};
use crate::vhost::{Device, Endpoint, Resize, ServeOptions, SocketFile, SocketOptions, serve};
use crate::virtio::{DeviceShape, Geometry};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What QEMU's conventions want to hear from `--print-capabilities`.
pub const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}"#;

/// Where front-ends reach us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A socket file we make.
    Path {
        /// Its name.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// Its group: a name or a number.
        group: Option<String>,
    },
    /// A descriptor we were started with, listening or connected.
    Inherited(i32),
    /// What systemd hands over (`LISTEN_FDS`).
    Activated,
}

/// Everything a daemon is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where front-ends reach us.
    pub socket: Socket,
    /// The image.
    pub image: ImageSpec,
    /// The internal snapshot of it that is shown; `None`: what it is now.
    pub snapshot: Option<String>,
    /// Its parents, base first; empty: searched.
    pub parents: Vec<ImageSpec>,
    /// Where parents are searched.
    pub parent_dirs: Vec<PathBuf>,
    /// A wrong parent is taken all the same.
    pub allow_parent_mismatch: bool,
    /// An image may be written although another is based on it.
    pub allow_write_to_parent: bool,
    /// Images may describe disks of this host.
    pub allow_raw_device: bool,
    /// A cache image for those of the images that nobody writes.
    pub cache_image: Option<PathBuf>,
    /// Password and key store of an encrypted disk.
    pub keys: KeyFiles,
    /// Where it is written down which image the disk is served from, across live changes of its chain; made if it is not there.
    pub record: Option<PathBuf>,
    /// A diff that takes the writes; made if it is not there.
    pub overlay: Option<PathBuf>,
    /// No changes.
    pub read_only: bool,
    /// How long to wait for locks.
    pub lock_wait: Duration,
    /// Queues; `None`: one per CPU.
    pub num_queues: Option<u16>,
    /// Largest ring.
    pub queue_size: u16,
    /// Use of the page cache.
    pub cache: CacheMode,
    /// Discards are offered.
    pub discard: bool,
    /// For GET_ID; `None`: made from the base image's UUID.
    pub serial: Option<String>,
    /// Which engine.
    pub engine: EngineKind,
    /// How long to poll.
    pub poll: Duration,
    /// End with the first front-end.
    pub once: bool,
    /// Sync at the end.
    pub flush_on_exit: bool,
}

/// Serves a disk until a signal, or as long as the configuration says.
///
/// # Errors
/// With one line that says what to do. Nothing is lost: what was acknowledged is with the kernel.
pub fn run(config: &Config) -> Result<()> {
    run_with(config, |_| ())
}

/// The same; `told` gets the disk, whose chain can be changed from then on, when front-ends can be served.
///
/// # Errors
/// As [`run`].
pub fn run_with(config: &Config, told: impl FnOnce(Arc<LiveDisk>)) -> Result<()> {
    let opening = Arc::new(AtomicBool::new(true));
    let Told { shutdown, resize } = listen_to_signals(Arc::clone(&opening))?;
    let (opened, mut overlay) = open(config)?;
    opening.store(false, Ordering::Release);
    if opened.disk.size_bytes() == 0 {
        let what = "is empty, and a disk has at least one sector";
        return Err(Error::new(ErrorKind::InvalidArgument, what)
            .at(&opened.images[0].path)
            .hint("vdimg create makes one"));
    }
    let direct = config.cache == CacheMode::None;
    let live = Arc::new(LiveDisk::new(&opened, direct, recorded::record_of(config))?);
    let served = serve_disk(config, (opened, &live), &mut overlay, Told { shutdown, resize }, told);
    if served.is_err() {
        live.disk().end_cache(); // what it held it may as well go on with
    }
    served?;
    live.end(|disk| close(disk, config))
}

/// Serves it until a signal, or as long as the configuration says.
fn serve_disk(
    config: &Config,
    (opened, live): (OpenedDisk, &Arc<LiveDisk>),
    overlay: &mut overlay::Fresh,
    told: Told,
    ready: impl FnOnce(Arc<LiveDisk>),
) -> Result<()> {
    let Told { shutdown, resize } = told;
    let (endpoint, _name) = endpoint(&config.socket)?;
    let engine = engine(config.engine)?;
    let device = device(config, (&opened, live), resize, engine.kind);
    let line = describe(config, &opened, &device.shape, &engine);
    // the chain may be another soon
    drop(opened);
    let options = ServeOptions { once: config.once };
    serve(device, endpoint, options, &shutdown, || {
        overlay.keep();
        tracing::info!("serving {line}");
        ready(Arc::clone(live));
        // Without systemd nobody listens, and nothing depends on it.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    })
}

/// What signals ask for.
struct Told {
    /// SIGTERM, SIGINT: end.
    shutdown: EventFd,
    /// SIGHUP: look at the size of the image's file again.
    resize: EventFd,
}

/// Events for signals. A thread waits for them; nothing runs inside a handler. While the disk is being opened, which may
/// wait long for a lock, nothing has been changed yet: the process just ends.
fn listen_to_signals(opening: Arc<AtomicBool>) -> Result<Told> {
    let tried = |e| Error::io("wait for signals", e);
    let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(tried);
    let told = Told { shutdown: event()?, resize: event()? };
    let (stop, grow) = (told.shutdown.try_clone().map_err(tried)?, told.resize.try_clone().map_err(tried)?);
    // Beyond `ulimit -f` a write shall fail, as on a full disk, and not end the process. Nobody looks at the flag.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(tried)?;
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(tried)?;
    let wait = move || {
        for signal in signals.forever() {
            let name = signal_hook::low_level::signal_name(signal).unwrap_or("signal");
            if signal != SIGHUP && opening.load(Ordering::Acquire) {
                tracing::info!("{name}: stopping");
                std::process::exit(0);
            }
            // A counter that is full has been told often enough.
            let _ = if signal == SIGHUP {
                tracing::info!("{name}: looking at the image's size");
                grow.write(1)
            } else {
                tracing::info!("{name}: stopping");
                stop.write(1)
            };
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(tried)?;
    Ok(told)
}

fn open(config: &Config) -> Result<(OpenedDisk, overlay::Fresh)> {
    let options = DiskOptions {
        read_only: config.read_only || config.overlay.is_some(),
        skip_syncs: config.cache == CacheMode::Unsafe,
        write_through: config.cache == CacheMode::Writethrough,
        discard: config.discard,
        ..DiskOptions::default()
    };
    let how = OpenDisk {
        image: config.image.clone(),
        snapshot: config.snapshot.clone(),
        parents: config.parents.clone(),
        parent_dirs: config.parent_dirs.clone(),
        quiet: false,
        direct: config.cache == CacheMode::None,
        lock_wait: Some(config.lock_wait),
        allow_parent_mismatch: config.allow_parent_mismatch,
        allow_write_to_parent: config.allow_write_to_parent,
        allow_raw_device: config.allow_raw_device,
        write_optical: false,
        shareable: false,
        skip_checks: false,
        cache_image: config.cache_image.clone(),
        filters: config.keys.unlock()?,
        options,
    };
    let how = recorded::follow(config, how)?;
    if !how.options.read_only && !how.allow_write_to_parent {
        recorded::refuse_parent_in_record(&how.image.path)?;
    }
    match &config.overlay {
        None => open_disk(&how).map(|opened| (opened, overlay::Fresh::none())),
        Some(overlay) => overlay::open(how, overlay),
    }
}

fn endpoint(socket: &Socket) -> Result<(Endpoint, Option<SocketFile>)> {
    match socket {
        Socket::Path { path, mode, group } => {
            let group = group.as_deref().map(group_number).transpose()?;
            let (file, endpoint) = SocketFile::bind(path, &SocketOptions { mode: *mode, group })?;
            Ok((endpoint, Some(file)))
        }
        Socket::Inherited(number) => Ok((Endpoint::from_number(*number)?, None)),
        Socket::Activated => {
            let none = || {
                Error::new(ErrorKind::InvalidArgument, "no socket was given")
                    .hint("--socket-path PATH, --fd N, or a systemd socket unit")
            };
            let mut inherited = listenfd::ListenFd::from_env();
            if inherited.len() > 1 {
                let what = format!("systemd hands over {} sockets, one is needed", inherited.len());
                return Err(Error::new(ErrorKind::InvalidArgument, what));
            }
            let listener =
                inherited.take_unix_listener(0).map_err(|e| Error::io("take systemd's socket", e))?;
            Ok((Endpoint::Listener(listener.ok_or_else(none)?), None))
        }
    }
}

/// A group by number or by its name in `/etc/group`.
fn group_number(group: &str) -> Result<u32> {
    if let Ok(n) = group.parse() {
        return Ok(n);
    }
    let list = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let found = list.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    found.ok_or_else(|| {
        Error::new(ErrorKind::InvalidArgument, format!("there is no group '{group}'"))
            .hint("give --socket-group a name of /etc/group or a number")
    })
}

fn device(
    config: &Config,
    (opened, live): (&OpenedDisk, &Arc<LiveDisk>),
    resize: EventFd,
    kind: EngineKind,
) -> Device<Channel> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let per_cpu = u16::try_from(cpus).unwrap_or(u16::MAX).min(limits::MAX_QUEUES);
    let shape = DeviceShape {
        read_only: opened.disk.is_read_only(),
        geometry: geometry(&opened.images[0].info),
        discard: config.discard,
        num_queues: config.num_queues.unwrap_or(per_cpu),
        queue_size: config.queue_size,
        ..DeviceShape::new(opened.disk.size_bytes())
    };
    let (disk, growing) = (Arc::clone(live), Arc::clone(live));
    Device {
        shape,
        serial: config.serial.clone().unwrap_or_else(|| default_serial(opened)),
        poll_us: u32::try_from(config.poll.as_micros()).unwrap_or(limits::MAX_POLL_MICROS),
        make: Box::new(move |_queue, slots| channel(&disk.disk(), kind, slots)),
        control: live.control().clone(),
        resize: Some(Resize {
            event: resize,
            look: Box::new(move || look_at_size(&growing.disk(), growing.chain()[0].format)),
        }),
    }
}

/// Only a raw image has its size from its file's length. Any other has it in its header, with a table that was made for it.
fn look_at_size(disk: &Disk, format: Format) -> Option<u64> {
    if format != Format::Raw {
        let size = disk.size_bytes();
        tracing::warn!("the disk's size stays, {size} bytes: only a raw image can grow while it is served");
        return None;
    }
    let grown = disk.grow().inspect_err(|e| tracing::warn!("{e}")).ok()?;
    if grown.is_none() {
        tracing::info!("the disk's size stays: {} bytes", disk.size_bytes());
    }
    grown
}

/// The serial number VirtualBox's own controllers show: `VB`, and the first and the last 32 bits of the base image's UUID.
/// It stays the same from snapshot to snapshot.
fn default_serial(opened: &OpenedDisk) -> String {
    let Some(uuid) = opened.images.last().and_then(|base| base.info.uuid) else { return String::new() };
    let (first, .., last) = uuid.as_fields();
    let last = [last[4], last[5], last[6], last[7]];
    format!("VB{first:08x}-{:08x}", u32::from_le_bytes(last))
}

/// Which engine it is going to be.
struct Engine {
    kind: EngineKind,
    /// Why it is not the better one.
    fallback: Option<String>,
}

fn engine(wanted: EngineKind) -> Result<Engine> {
    let chosen = make_engine(wanted, 1)?;
    Ok(Engine { kind: chosen.kind, fallback: chosen.fallback })
}

/// What is served and how, for the log.
fn describe(config: &Config, opened: &OpenedDisk, shape: &DeviceShape, engine: &Engine) -> String {
    let top = &opened.images[0];
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let version = top.info.version.as_ref().map_or_else(String::new, |v| format!(" {v}"));
    let mut parts = vec![
        format!("{}: {}{version}, {}", top.path.display(), top.format, top.info.variant),
        human_bytes(opened.disk.size_bytes()),
        count(opened.images.len(), "image"),
        format!("{} of up to {}", count(shape.num_queues.into(), "queue"), shape.queue_size),
        format!("cache {}", config.cache),
        format!("discard {}", if config.discard { "unmap" } else { "ignore" }),
        match &engine.fallback {
            Some(why) => format!("{}, not io_uring: {why}", engine.kind),
            None => engine.kind.to_string(),
        },
        match &config.socket {
            Socket::Path { path, .. } => format!("socket {}", path.display()),
            Socket::Inherited(number) => format!("descriptor {number}"),
            Socket::Activated => "socket of systemd".to_string(),
        },
    ];
    parts.extend(config.cache_image.as_ref().map(|path| format!("cache image {}", path.display())));
    parts.extend(config.keys.key_store.is_some().then(|| "encrypted".to_string()));
    if opened.disk.is_read_only() {
        parts.insert(1, "read-only".to_string());
    }
    parts.join("; ")
}

fn channel(disk: &Arc<Disk>, kind: EngineKind, slots: u16) -> Result<Channel> {
    let chosen = make_engine(kind, u32::from(slots))?;
    Channel::new(disk.clone(), chosen.engine, slots)
}

/// The geometry a guest is told: the image's own where virtio can say it.
fn geometry(info: &crate::map::ImageInfo) -> Option<Geometry> {
    let (c, h, s) = info.geometry?;
    Some(Geometry {
        cylinders: u16::try_from(c).ok()?,
        heads: u8::try_from(h).ok()?,
        sectors: u8::try_from(s).ok()?,
    })
}

/// All channels are gone: leave the image as a clean close does.
fn close(disk: &Arc<Disk>, config: &Config) -> Result<()> {
    if disk.is_read_only() {
        disk.end_cache();
        return Ok(());
    }
    let mut last = channel(disk, EngineKind::Threads, 1)?;
    last.close_disk(config.flush_on_exit)
}

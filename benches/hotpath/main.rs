//! hotpath: requests through a queue worker, ring to page cache and back, in one thread without a front-end. See README.md.
mod guest;

use clap::Parser;
use guest::{Ask, ENTRIES, Guest, Places};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use vdblk::io::{EngineKind, make_engine};
use vdblk::vd::{Channel, OpenDisk, open_disk};
use vdblk::vhost::{QueueWorker, WorkerOptions};
use vdblk::virtio::Rules;

/// Batches of random requests to an image, each batch answered before the next is announced
#[derive(Parser)]
struct Args {
    /// The image
    image: PathBuf,
    /// Write instead of reading
    #[arg(long)]
    write: bool,
    /// Requests of a batch: a power of two, 64 at most
    #[arg(long, default_value_t = 32)]
    depth: u16,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096)]
    bs: u32,
    /// Batches
    #[arg(long, default_value_t = 10_000)]
    batches: u64,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("hotpath: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(a: &Args) -> io::Result<()> {
    let mut how = OpenDisk::new(&a.image);
    how.options.read_only = !a.write;
    let disk = open_disk(&how).map_err(io::Error::other)?.disk;
    let size_bytes = disk.size_bytes();
    let rules = Rules { size_bytes, read_only: !a.write, discard: true };
    let options = WorkerOptions { queue: 0, slots: ENTRIES, rules, serial: "hotpath".into() };
    let engine = make_engine(EngineKind::IoUring, u32::from(ENTRIES)).map_err(io::Error::other)?.engine;
    let channel = Channel::new(disk, engine, ENTRIES).map_err(io::Error::other)?;
    let mut worker = QueueWorker::new(channel, &options);

    let mut guest = Guest::new(a.depth, a.bs, if a.write { Ask::Write } else { Ask::Read })?;
    let (memory, ring, extras) = guest.ring()?;
    worker.set_memory(memory);
    worker.start(ring, extras).map_err(io::Error::other)?;
    let mut places = Places::new(size_bytes, a.bs);
    let start = Instant::now();
    for _ in 0..a.batches {
        guest.announce(|| places.next());
        while guest.answered() != guest.announced() {
            worker.step(true);
        }
        guest.check()?;
    }
    let requests = a.batches * u64::from(a.depth);
    println!("{requests} requests, {:.0} ns each", start.elapsed().as_nanos() as f64 / requests as f64);
    worker.stop();
    while worker.stopped().is_none() {
        worker.step(true);
    }
    match a.write {
        true => worker.device().close_disk(false).map_err(io::Error::other),
        false => Ok(()),
    }
}

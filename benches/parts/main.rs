//! parts: the parts of a request by themselves, in one thread. See README.md. A program of its own: a second device in `hotpath` would change
//! how its code is laid out, and with it what it counts.
#[path = "../hotpath/guest.rs"]
mod guest;

use clap::Parser;
use guest::{Ask, ENTRIES, Guest, Places};
use std::hint::black_box;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use vdblk::io::BufSlice;
use vdblk::map::{GuestOffset, GuestRange};
use vdblk::vd::{BlockDevice, Disk, Done, OpenDisk, Outcome, Request, open_disk};
use vdblk::vhost::{QueueWorker, WorkerOptions};
use vdblk::virtio::Rules;

const SECTOR_BYTES: u64 = 512;
/// Requests of a batch.
const DEPTH: u16 = 32;

/// Nanoseconds of a request in the ring, and of a look-up in the map, at random places of a disk
#[derive(Parser)]
struct Args {
    /// The image
    image: PathBuf,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096)]
    bs: u32,
    /// Requests to write, where the ring is measured
    #[arg(long)]
    write: bool,
    /// Requests
    #[arg(long, default_value_t = 1 << 20)]
    requests: u64,
}

/// A device that does nothing, at once.
struct Nothing;

impl BlockDevice for Nothing {
    fn submit(&mut self, _slot: u16, request: Request, _bufs: &[BufSlice]) -> Option<Outcome> {
        black_box(request);
        Some(Ok(()))
    }

    fn flush_queue(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn poll(&mut self, _done: &mut Vec<Done>) {}

    fn set_write_through(&mut self, _on: bool) {}

    fn is_idle(&self) -> bool {
        true
    }

    fn event_fds(&self) -> Vec<RawFd> {
        Vec::new()
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("parts: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(a: &Args) -> io::Result<()> {
    let mut how = OpenDisk::new(&a.image);
    how.options.read_only = true;
    let disk = open_disk(&how).map_err(io::Error::other)?.disk;
    println!("ring  {:6.1} ns", ring(a, disk.size_bytes())?);
    let (each, missed) = map(a, &disk)?;
    println!("map   {each:6.1} ns, {} images, {missed} look-ups without a page", disk.chain().layers().len());
    Ok(())
}

/// Descriptors copied and checked, answers put into the used ring and shown.
fn ring(a: &Args, size_bytes: u64) -> io::Result<f64> {
    let rules = Rules { size_bytes, read_only: !a.write, discard: true };
    let options = WorkerOptions { queue: 0, slots: ENTRIES, rules, serial: "parts".into() };
    let mut worker = QueueWorker::new(Nothing, &options);
    let ask = if a.write { Ask::Write } else { Ask::Read };
    let mut guest = Guest::new(DEPTH, a.bs, ask)?;
    let (memory, ring, extras) = guest.ring()?;
    worker.set_memory(memory);
    worker.start(ring, extras).map_err(io::Error::other)?;
    let mut places = Places::new(size_bytes, a.bs);
    let batches = a.requests.div_ceil(DEPTH.into());
    let start = Instant::now();
    for _ in 0..batches {
        guest.announce(|| places.next());
        while guest.answered() != guest.announced() {
            worker.step(true);
        }
        guest.check()?;
    }
    Ok(nanos(start, batches * u64::from(DEPTH)))
}

/// Look-ups through the chain. One whose page of a table is not in memory is counted, and goes no further.
fn map(a: &Args, disk: &Disk) -> io::Result<(f64, u64)> {
    let mut places = Places::new(disk.size_bytes(), a.bs);
    let mut missed = 0;
    let start = Instant::now();
    for _ in 0..a.requests {
        let at = GuestOffset(places.next() * SECTOR_BYTES);
        let range = GuestRange::new(at, a.bs.into()).ok_or_else(|| io::Error::other("off the disk"))?;
        missed += u64::from(black_box(disk.chain().look(black_box(range))).is_err());
    }
    Ok((nanos(start, a.requests), missed))
}

fn nanos(since: Instant, times: u64) -> f64 {
    since.elapsed().as_nanos() as f64 / times as f64
}

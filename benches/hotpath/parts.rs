//! The parts of a request by themselves.

use super::guest::Places;
use super::served::{Load, Served};
use std::hint::black_box;
use std::io;
use std::os::fd::RawFd;
use std::time::Instant;
use vdblk::io::BufSlice;
use vdblk::map::{GuestOffset, GuestRange};
use vdblk::vd::{BlockDevice, Done, Outcome, Request};

const SECTOR_BYTES: u64 = 512;

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

/// Descriptors copied and checked, answers put into the used ring and shown.
pub(crate) fn ring(load: &Load<'_>, batches: u64) -> io::Result<()> {
    let mut served = Served::over(Nothing, load.open()?.size_bytes(), load)?;
    let start = Instant::now();
    for _ in 0..batches {
        served.batch()?;
    }
    let requests = batches * u64::from(load.depth);
    println!("{requests} requests, {:.1} ns each in the ring", nanos(start, requests));
    served.stop();
    Ok(())
}

/// Look-ups through the chain. One whose page of a table is not in memory is counted, and goes no further.
pub(crate) fn map(load: &Load<'_>, batches: u64) -> io::Result<()> {
    let disk = load.open()?;
    let mut places = Places::new(disk.size_bytes(), load.bytes);
    let mut missed = 0u64;
    let looks = batches * u64::from(load.depth);
    let start = Instant::now();
    for _ in 0..looks {
        let at = GuestOffset(places.next() * SECTOR_BYTES);
        let range = GuestRange::new(at, load.bytes.into()).ok_or_else(|| io::Error::other("off the disk"))?;
        missed += u64::from(black_box(disk.chain().look(black_box(range))).is_err());
    }
    let images = disk.chain().layers().len();
    println!(
        "{looks} looks through {images} images, {:.1} ns each, {missed} without a page",
        nanos(start, looks)
    );
    Ok(())
}

fn nanos(since: Instant, times: u64) -> f64 {
    since.elapsed().as_nanos() as f64 / times as f64
}

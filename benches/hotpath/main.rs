//! hotpath: requests through a queue worker, ring to page cache and back, in one thread without a front-end. See README.md.
mod guest;
mod served;

use clap::Parser;
use guest::Ask;
use served::{Load, Served};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Batches of random requests to an image, each batch answered before the next is announced
#[derive(Parser)]
struct Args {
    /// The image
    image: PathBuf,
    /// Write instead of reading
    #[arg(long)]
    write: bool,
    /// Past the page cache
    #[arg(long)]
    direct: bool,
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
    let ask = if a.write { Ask::Write } else { Ask::Read };
    let load = Load { image: &a.image, direct: a.direct, ask, depth: a.depth, bytes: a.bs };
    let mut served = Served::new(&load)?;
    let start = Instant::now();
    for _ in 0..a.batches {
        served.batch()?;
    }
    let requests = a.batches * u64::from(a.depth);
    let each = start.elapsed().as_nanos() as f64 / requests as f64;
    println!("{requests} requests, {each:.0} ns each, {} signals", served.counters().signals);
    served.close()
}

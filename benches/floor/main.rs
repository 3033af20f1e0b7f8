//! floor: what one 'bare' access to a file costs on this machine: the limit to compare with.
//! See README.md.
mod file;
mod uring;

use clap::Parser;
use file::{Buffers, Mapping, Target};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Cost per access of pread, pwrite, preadv2(NOWAIT), mmap + memcpy, and io_uring at depth 32.
#[derive(Parser)]
struct Args {
    /// File to work on; its content is overwritten unless --read-only
    file: PathBuf,
    /// Open with O_DIRECT
    #[arg(long)]
    direct: bool,
    /// Leave the writes out
    #[arg(long)]
    read_only: bool,
    /// For each kind of access
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Bytes of an access
    #[arg(long, default_value_t = 4096)]
    bs: usize,
    /// Only accesses of this name
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// A JSON object for each kind of access instead of a line for people
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("floor: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(a: &Args) -> io::Result<()> {
    let t = Target::open(&a.file, a.direct, a.read_only, a.bs)?;
    let mut b = Buffers::new(a.bs)?;
    let m = Meter { time: Duration::from_secs_f64(a.seconds), only: a.only.clone(), json: a.json };
    let mut dice = Dice(7);
    m.run("pread", || t.pread(&mut b, dice.below(t.blocks)))?;
    if !a.read_only {
        m.run("pwrite", || t.pwrite(&b, dice.below(t.blocks)))?;
    }
    if !a.direct {
        let mut misses = 0u64;
        m.run("preadv2 NOWAIT", || {
            misses += u64::from(!t.pread_nowait(&mut b, dice.below(t.blocks)));
            Ok(1)
        })?;
        if misses > 0 {
            eprintln!("    {misses} of the preadv2 missed the page cache");
        }
        let map = Mapping::new(&t)?;
        m.run("mmap + memcpy", || {
            map.copy(&mut b, dice.below(t.blocks));
            Ok(1)
        })?;
    }
    for kind in uring::KINDS {
        match uring::Loop::new(kind, &t, &b) {
            Ok(mut u) => m.run(kind.name, || u.turn(&mut dice))?,
            Err(e) => println!("{}: {e}", kind.name),
        }
    }
    Ok(())
}

/// A linear congruential generator: as cheap as can be, so that it does not show.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Runs one kind of access for its time and prints what one costs.
struct Meter {
    time: Duration,
    only: Option<String>,
    json: bool,
}

impl Meter {
    /// `f` does some accesses and says how many.
    fn run(&self, name: &str, mut f: impl FnMut() -> io::Result<u64>) -> io::Result<()> {
        if self.only.as_ref().is_some_and(|only| only != name) {
            return Ok(());
        }
        let (start, cpu, mut n) = (Instant::now(), file::process_cpu(), 0u64);
        while start.elapsed() < self.time {
            // looking at the clock costs as much as a small access
            for _ in 0..64 {
                n += f()?;
            }
        }
        let (wall, cpu) = (start.elapsed().as_secs_f64(), file::process_cpu() - cpu);
        let each = |s: f64| s * 1e6 / n.max(1) as f64;
        if self.json {
            let (iops, wall_us, cpu_us) = (n as f64 / wall, each(wall), each(cpu));
            let line =
                serde_json::json!({ "name": name, "iops": iops, "wall_us": wall_us, "cpu_us": cpu_us });
            println!("{line}");
            return Ok(());
        }
        println!(
            "{name:34} {:9.1} kIOPS {:7.2} us wall {:6.2} us cpu",
            n as f64 / wall / 1e3,
            each(wall),
            each(cpu)
        );
        Ok(())
    }
}

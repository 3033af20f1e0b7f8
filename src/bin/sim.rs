//! The simulator: plays seeds. A seed that fails prints what was wrong, and plays the same again.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use vdblk::sim::{
    Judge, Kills, Kind, Landing, Play, Played, Stats, Thorough, all_workloads, play, powercut_after_kills,
    powercut_workload, small_disk,
};

/// Plays simulations of processes, power cuts and failing disks
#[derive(Debug, Parser)]
struct Args {
    /// The first seed
    #[arg(default_value_t = 0)]
    seed: u64,
    /// Seeds to play
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Print the kinds of images, a line each, and end
    #[arg(long)]
    kinds: bool,
    /// Only power cuts on small images of this kind
    #[arg(long)]
    powercut: Option<String>,
    /// All workloads of up to three operations instead, on images of that kind
    #[arg(long, requires = "powercut")]
    workloads: bool,
    /// And each of them with its process killed at every moment, and the next at one by chance
    #[arg(long, requires = "workloads")]
    kills: bool,
    /// States by chance for each moment at which the power can go
    #[arg(long, default_value_t = 30)]
    samples: u64,
    /// All states of moments with up to this many parts, at most 12
    #[arg(long, default_value_t = 8)]
    exhaustive: u32,
    /// Print the order of all operations
    #[arg(long)]
    trace: bool,
    /// Write a log of the writes of the (last) seed for the tools of dm-log-writes
    #[arg(long)]
    dm_log: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("sim: {e}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> std::io::Result<bool> {
    if args.kinds {
        Kind::ALL.iter().for_each(|k| println!("{}", k.name()));
        return Ok(true);
    }
    let kind = args.powercut.as_ref().map(|name| {
        let known = Kind::ALL.into_iter().find(|k| k.name() == name);
        known.ok_or_else(|| std::io::Error::other(format!("'{name}' is no kind of image")))
    });
    let kind = kind.transpose()?;
    let (mut sum, mut sound, mut requests, mut lives) = (Stats::default(), true, 0, 0);
    for seed in args.seed..args.seed + args.seeds {
        let played = match kind {
            Some(kind) if args.workloads => workloads(args, kind, seed),
            _ => one(args, kind, seed)?,
        };
        sum.add(played.stats);
        requests += played.requests;
        lives += played.lives;
        if let Some(wrong) = &played.wrong {
            sound = false;
            println!("seed {}: {wrong}", played.seed);
        }
        if args.seeds == 1 {
            println!("seed {seed}: digest {:016x}, {} processes", played.digest, played.lives);
        }
    }
    println!(
        "{} seeds, {requests} requests, {lives} processes, {} moments, {} states, {} repaired, {} of interrupted repairs, \
         {} written by others",
        args.seeds, sum.cuts, sum.states, sum.repaired, sum.interrupted, sum.foreign
    );
    Ok(sound)
}

fn one(args: &Args, kind: Option<Kind>, seed: u64) -> std::io::Result<Played> {
    let how = match kind {
        Some(kind) => {
            Play { exhaustive: args.exhaustive.min(12), ..Play::powercut(kind, seed, args.samples) }
        }
        None => Play::seed(seed),
    };
    let mut played = play(&Play { trace: args.trace, record: args.dm_log.is_some(), ..how });
    if let (Some(path), Some(log)) = (&args.dm_log, played.record.take()) {
        std::fs::write(path, log.into_bytes())?;
    }
    Ok(played)
}

/// What happens to workloads whose processes are killed.
const KILLS: Thorough = Thorough { every: 1, twice: 1, landings: &Landing::EACH, exhaustive: 4, samples: 8 };

/// All small workloads, each with a schedule that follows from the seed.
fn workloads(args: &Args, kind: Kind, seed: u64) -> Played {
    let disk = small_disk(kind, seed);
    let mut all: Option<Played> = None;
    for (n, ops) in (0..).zip(all_workloads()) {
        let own = seed << 16 | n;
        let judge = Judge::new(args.exhaustive.min(12), args.samples, own);
        let mut played = powercut_workload(&disk, &ops, &Kills::default(), own, judge);
        if args.kills && played.wrong.is_none() {
            let killed = powercut_after_kills(&disk, &ops, &KILLS, own);
            played.stats.add(killed.stats);
            (played.lives, played.wrong) = (played.lives + killed.lives, killed.wrong);
        }
        played.wrong = played.wrong.map(|w| format!("{ops:?} (workload {n}): {w}"));
        match &mut all {
            None => all = Some(Played { seed, ..played }),
            Some(sum) => {
                sum.stats.add(played.stats);
                sum.requests += played.requests;
                sum.lives += played.lives;
                sum.wrong = sum.wrong.take().or(played.wrong);
            }
        }
    }
    all.expect("there are workloads")
}

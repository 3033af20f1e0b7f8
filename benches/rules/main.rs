//! rules: what each crash rule costs: the product's channel with all rules kept, and with one of them broken.
//! See README.md.
mod cases;
mod disks;
mod drive;

use cases::{CASES, Case, Figure};
use clap::Parser;
use disks::Disks;
use drive::Cost;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vdblk::sim::{Sabotage, sabotage};

/// What each crash rule costs: the same load with all rules kept and with one of them broken
#[derive(Parser)]
struct Args {
    /// Folder for the images, up to 2 GB; on a file system of a disk, for where a sync is free there is nothing to see
    dir: PathBuf,
    /// Of all pairs of runs; the table has the medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Fewer rounds than that, one at least, if they would take longer
    #[arg(long, default_value_t = 3.0)]
    minutes: f64,
    /// Seconds after which a run ends if it has not written to every block
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Where flushes come: after so many writes of each journal
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    flush_every: u64,
    /// Only rules whose name has this in it (O1 to O6, or the way the rule is broken)
    #[arg(long, default_value = "")]
    only: String,
    /// Print every run
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("rules: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(a: &Args) -> io::Result<()> {
    let disks = Disks::in_folder(&a.dir)?;
    let cases: Vec<_> = CASES.iter().filter(|c| c.name().contains(&a.only)).collect();
    let mut costs: Vec<_> = cases.iter().map(|_| Pair::default()).collect();
    let (start, most) = (Instant::now(), Duration::from_secs_f64(a.minutes * 60.0));
    let mut played = 0;
    // no round is begun that would end too late, if it takes as long as those before
    while played < a.rounds && start.elapsed() * (played + 1) / played.max(1) <= most {
        for (case, pair) in cases.iter().zip(&mut costs) {
            // neither is always the one that finds the machine as the other has left it
            for is_broken in [played % 2 == 1, played % 2 == 0] {
                let cost = once(a, &disks, case, is_broken)?;
                if a.verbose {
                    eprintln!("{} {}: {cost:?}", case.name(), if is_broken { "broken" } else { "kept" });
                }
                if is_broken { &mut pair.broken } else { &mut pair.kept }.push(cost);
            }
        }
        played += 1;
    }
    print_row(
        ["rule broken", "image", "load", "kept", "broken", "ratio", "kept", "broken"].map(str::to_string),
    );
    for (case, pair) in cases.iter().zip(costs) {
        print_row(row(case, &median(pair.kept), &median(pair.broken)));
    }
    println!(
        "medians of {played} rounds; ratio: broken to kept; the last two: CPU for each write, opening or close"
    );
    Ok(())
}

#[derive(Default)]
struct Pair {
    kept: Vec<Cost>,
    broken: Vec<Cost>,
}

/// One run. The rule is broken from before the disk is opened until it is closed, on this thread, which does it all.
fn once(a: &Args, disks: &Disks, case: &Case, is_broken: bool) -> io::Result<Cost> {
    let disk = disks.fresh(case.image)?;
    sabotage(is_broken.then_some(case.broken).flatten());
    let unsafe_cache = is_broken && case.broken.is_none();
    let cost = match case.figure {
        Figure::Rate { bytes, sequential, journals } => {
            let (flush_every, seconds) = (a.flush_every, a.seconds);
            let load = drive::Load { bytes, sequential, journals, flush_every, seconds };
            drive::rate(&disk, unsafe_cache, &load)
        }
        Figure::Opening => drive::opening(&disk),
        Figure::Closing => drive::closing(&disk),
    };
    sabotage(None::<Sabotage>);
    cost
}

/// Of each figure on its own.
fn median(costs: Vec<Cost>) -> Cost {
    let middle = |of: fn(&Cost) -> f64| {
        let mut all: Vec<_> = costs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Cost { figure: middle(|c| c.figure), cpu_us: middle(|c| c.cpu_us) }
}

fn row(case: &Case, kept: &Cost, broken: &Cost) -> [String; 8] {
    let figure = |c: &Cost| match case.figure {
        Figure::Rate { .. } => format!("{:.0}/s", c.figure),
        _ => format!("{:.2} ms", c.figure),
    };
    let cpu = |c: &Cost| format!("{:.1} us", c.cpu_us);
    let ratio = format!("{:.2}", broken.figure / kept.figure);
    let image = case.image.name().to_string();
    let (a, b) = (figure(kept), figure(broken));
    [case.name(), image, case.figure.name(), a, b, ratio, cpu(kept), cpu(broken)]
}

fn print_row(of: [String; 8]) {
    let [rule, image, load, a, b, ratio, c, d] = of;
    println!("{rule:<22} {image:<5} {load:<24} {a:>11} {b:>11} {ratio:>6} {c:>10} {d:>10}");
}

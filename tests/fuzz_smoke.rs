//! The fuzz targets on a stable toolchain: every case that once found something, the seeds, and some thousand changed ones.
//! Cases follow from a seed (`VDBLK_FUZZ_SEED`); `VDBLK_FUZZ_FACTOR` multiplies how many there are.

#[path = "format_support/build.rs"]
mod build_vdi;
mod common;
mod fuzz_support;

mod format_support {
    pub(crate) use super::build_vdi as build;
}

use common::hostile::{Choices, Random};
use fuzz_support::effort::Effort;
use fuzz_support::messages::{Meeting, queue_threads};
use fuzz_support::{chains, image, key_store, mutate, one_file};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use vdblk::format::Format;

/// One after the other: they count what the whole process has.
static ONE: Mutex<()> = Mutex::new(());

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |n| n.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn files(folder: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder).join(target);
    let mut paths: Vec<_> = match std::fs::read_dir(&dir) {
        Ok(entries) => entries.map(|e| e.unwrap().path()).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => panic!("{}: {e}", dir.display()),
    };
    paths.sort();
    paths.into_iter().map(|p| (p.clone(), std::fs::read(p).unwrap())).collect()
}

/// Runs a case; one that fails is left where it can be looked at.
fn run(target: &str, what: &str, case: &[u8], body: &dyn Fn(&[u8])) {
    if let Err(why) = catch_unwind(AssertUnwindSafe(|| body(case))) {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("failed-{target}"));
        std::fs::write(&path, case).unwrap();
        eprintln!("{what}: this case of {} bytes is in {}", case.len(), path.display());
        std::panic::resume_unwind(why);
    }
}

type Change = fn(&mut Vec<u8>, &mut Random, usize);

fn smoke(target: &str, cases: u64, max: usize, change: Change, body: &dyn Fn(&[u8])) {
    for (path, case) in files("regressions", target) {
        run(target, &path.display().to_string(), &case, body);
    }
    let seeds = files("seeds", target);
    assert!(!seeds.is_empty(), "fuzz/seeds/{target} is empty");
    for (path, case) in &seeds {
        run(target, &path.display().to_string(), case, body);
    }
    let seed = number("VDBLK_FUZZ_SEED", 1).max(1);
    let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let cases = cases * number("VDBLK_FUZZ_FACTOR", 1);
    for n in 0..cases {
        let mut case = seeds[r.below(seeds.len() as u64) as usize].1.clone();
        for _ in 0..1 + r.below(3) {
            change(&mut case, &mut r, max);
        }
        run(target, &format!("case {n} of seed {seed}"), &case, body);
    }
    println!("{target}: {} seeds and {cases} changed ones", seeds.len());
}

#[test]
fn any_chain_is_answered_once_and_within_its_buffers() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    smoke("chains", 20_000, chains::MAX_BYTES, mutate::bytes, &chains::run);
}

#[test]
fn any_messages_leave_the_server_as_it_was() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let meeting = Meeting::new();
    smoke("messages", 5_000, fuzz_support::messages::MAX_BYTES, mutate::bytes, &|case| meeting.run(case));
    drop(meeting);
    assert_eq!(queue_threads(), 0, "a thread is left");
}

#[test]
fn any_image_is_served_and_repaired_or_refused() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    smoke("vdi", 8_000, 64 << 10, mutate::image, &image::run);
}

#[test]
fn any_vmdk_is_served_and_repaired_or_refused() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    smoke("vmdk", 6_000, 96 << 10, mutate::vmdk, &|case| one_file::run(Format::Vmdk, case));
}

#[test]
fn any_qed_or_qcow_is_served_and_repaired_or_refused() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    smoke("levels", 6_000, 96 << 10, mutate::levels, &one_file::run_levels);
}

/// The same for a format whose cases have the script behind them.
fn any_image_of(format: Format, cases: u64) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    smoke(format.name(), cases, 256 << 10, mutate::numbers, &|case| one_file::run(format, case));
}

#[test]
fn any_qcow2_is_served_and_repaired_or_refused() {
    any_image_of(Format::Qcow2, 6_000);
}

#[test]
fn any_parallels_is_served_and_repaired_or_refused() {
    any_image_of(Format::Parallels, 4_000);
}

#[test]
fn any_vhd_is_served_and_repaired_or_refused() {
    any_image_of(Format::Vhd, 3_000);
}

#[test]
fn any_dmg_is_served_or_refused() {
    any_image_of(Format::Dmg, 2_000);
}

#[test]
fn any_key_store_is_read_or_refused() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    smoke("keystore", 50_000, key_store::MAX_BYTES, mutate::bytes, &key_store::run);
}

#[test]
fn any_cue_sheet_is_read_or_refused() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    smoke("cue", 10_000, 4 << 10, mutate::bytes, &one_file::run_cue);
}

#[test]
fn images_that_ask_for_much_stay_within_bounds() {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, mut case) in image::dear() {
        assert!(case.len() <= image::MAX_BYTES);
        for stack in 0..4 {
            case[0] = stack;
            let effort = Effort::begin();
            run("vdi", name, &case, &image::run);
            let (ms, bytes) = effort.so_far();
            println!("{name}, stack {stack}: {ms} ms, {} KiB", bytes >> 10);
        }
    }
}

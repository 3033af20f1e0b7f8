//! What the daemon takes of the host's memory for the tables of a disk of 2 TiB, whatever its format. One test in this file:
//! what else runs on the machine shall not stand in its measurements.

mod daemon_support;
mod vdimg_support;

use daemon_support::client::Guest;
use daemon_support::process::Daemon;
use daemon_support::vubench::{number, vubench};
use std::fs;
use std::path::Path;
use vdblk::job::inspect_image;
use vdblk::vd::ImageSpec;
use vdimg_support::shapes::{self, Shape};
use vdimg_support::*;

/// The promise, over what a raw image takes.
const LIMIT_KIB: u64 = 32 << 10;
/// Storage that the writes may take.
const BUDGET: u64 = 256 << 20;
/// A table of more pages than may be kept, where a block is as small as a page.
const MOST_WRITES: u64 = 9000;
const FEWEST_WRITES: u64 = 48;

/// Resident memory of the daemon in KiB, without the guest's.
fn resident(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("status");
    let value = |key: &str| -> u64 {
        let line = status.lines().find_map(|l| l.strip_prefix(key)).expect("the key");
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number")
    };
    value("VmRSS") - value("RssShmem")
}

/// Makes the largest image up to 2 TiB that the format allows; its bytes.
fn large(d: &Path, shape: &Shape, file: &str) -> u64 {
    let sizes = [2 << 40, 2040 << 30, (2 << 40) - (8 << 30)];
    let made = sizes.into_iter().find(|size| {
        run(d, &format!("create {} --size {size} {file}", shape.words("--format"))).status.success()
    });
    made.unwrap_or_else(|| panic!("{shape}: no image of 2 TiB can be made"))
}

/// The most memory it had at the end of each kind of load, over all of the disk: writes, reads of what was written, reads of
/// anything. And what the load was.
fn most_memory(shape: &Shape) -> (u64, u64) {
    let dir = scratch();
    let d = dir.path();
    let file = shape.file("large");
    let size = large(d, shape, &file);
    let spec = ImageSpec { path: d.join(&file), format: Some(shape.format) };
    let block = inspect_image(&spec).expect("an image").info.block_size.unwrap_or(4096).max(4096);
    let writes = (BUDGET / block).clamp(FEWEST_WRITES, MOST_WRITES);
    let options = ["--num-queues", "2", "--format", shape.format.name()];
    let daemon = Daemon::serve(&d.join(&file), &options);
    let mut most = 0;
    // One in each part of the disk, at random.
    let mut rng = Rng(writes);
    let part = size / writes;
    let places: Vec<_> = (0..writes).map(|n| n * part + rng.below(part / 4096) * 4096).collect();
    let mut guest = Guest::connect(&daemon.socket, 1);
    for (n, at) in places.iter().enumerate() {
        guest.mark(*at, n as u8);
    }
    most = most.max(resident(&daemon));
    let n = places.len() as u64;
    for _ in 0..2 * writes {
        let i = rng.below(n) as usize;
        guest.assert_marked(places[i], i as u8);
    }
    most = most.max(resident(&daemon));
    drop(guest);
    let reads = ["--queues", "2", "--iodepth", "32", "--runtime", "1", "--ramp", "0", "--rw", "randread"];
    let (ended, result) = vubench(&daemon.socket, &reads);
    assert!(ended.status.success() && number(&result, "ios") > 1000, "{shape}: {ended:?}");
    most = most.max(resident(&daemon));
    daemon.stop();
    (most, writes)
}

#[test]
fn tables_of_2_tib_take_little_in_any_format() {
    let (baseline, _) = most_memory(&shapes::plain()[0]);
    println!("raw: {baseline} KiB");
    let small_blocks = ["cluster_size=4K", "extended_l2=on", "zeroed_grain=on"];
    let more = shapes::writable().into_iter().filter(|s| s.options.iter().any(|o| small_blocks.contains(o)));
    for shape in shapes::plain().into_iter().skip(1).chain(more) {
        let (most, writes) = most_memory(&shape);
        let over = most.saturating_sub(baseline);
        println!("{shape}: {over} KiB over raw, after {writes} writes all over the disk and many reads");
        assert!(over <= LIMIT_KIB, "{shape}: {over} KiB");
    }
}

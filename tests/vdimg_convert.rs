//! Conversions: contents, sparseness, time, memory, and what other programs think of the results.

mod vdimg_support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vdimg_support::*;

/// Bytes of all 4 KiB units that are not zeros.
fn data_bytes(model: &[u8]) -> u64 {
    model.chunks(4096).filter(|c| c.iter().any(|b| *b != 0)).map(|c| c.len() as u64).sum()
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    fs::read(path).expect("read")
}

#[test]
fn there_and_back_for_every_variant_and_block_size() {
    let sizes = [512, 1536, MIB, 3 * MIB + 512, 10 * MIB - 512, 7 * MIB + 4096];
    let kinds = [
        "",
        "--variant fixed",
        "--variant zero-expand",
        "--option AllocationBlockSize=4k",
        "--option AllocationBlockSize=512K",
        "--option AllocationBlockSize=8M --variant Dynamic",
        "--option AllocationBlockSize=2M --variant fixed",
    ];
    let dir = scratch();
    let d = dir.path();
    for (seed, size) in (0..).zip(sizes) {
        let (src, back) = (d.join("s.raw"), d.join("b.raw"));
        let model = random_raw(&src, size, &mut Rng(seed));
        for kind in kinds {
            let what = format!("{size} bytes, {kind}");
            ok(d, &format!("convert {kind} --output-format vdi s.raw m.vdi"));
            ok(d, "check m.vdi");
            ok(d, "compare s.raw m.vdi");
            ok(d, "convert --output-format raw m.vdi b.raw");
            assert!(read(&back) == model, "{what}");
            assert!(storage(&back) <= data_bytes(&model) + 64 * KIB, "{what}: {} bytes", storage(&back));
            ok(d, "convert --output-format vdi --option AllocationBlockSize=64k m.vdi n.vdi");
            ok(d, "compare n.vdi s.raw");
            ["m.vdi", "n.vdi", "b.raw"].iter().for_each(|f| fs::remove_file(d.join(f)).expect("remove"));
        }
        fs::remove_file(src).expect("remove");
    }
}

#[test]
fn a_cut_last_sector_is_filled_with_zeros() {
    let dir = scratch();
    let d = dir.path();
    let bytes: Vec<u8> = (0..100_001u32).map(|i| 1 + (i % 255) as u8).collect();
    fs::write(d.join("s.raw"), &bytes).expect("write");
    ok(d, "convert --output-format raw s.raw t.raw");
    ok(d, "convert --output-format vdi s.raw t.vdi");
    ok(d, "convert --output-format raw t.vdi u.raw");
    for name in ["t.raw", "u.raw"] {
        let got = read(d.join(name));
        assert_eq!(got.len(), 100_352);
        assert!(got[..bytes.len()] == bytes && got[bytes.len()..].iter().all(|b| *b == 0), "{name}");
    }
}

/// A chain of three with random contents, the diffs in a folder of their own, and what it shows.
fn chain(d: &Path, rng: &mut Rng) -> Vec<u8> {
    let size = 6 * MIB + 512;
    let mut model = random_raw(&d.join("s.raw"), size, rng);
    ok(d, "convert --output-format vdi --option AllocationBlockSize=64k s.raw base.vdi");
    fs::create_dir(d.join("Snapshots")).expect("folder");
    ok(d, "create --format vdi --parent base.vdi Snapshots/one.vdi");
    ok(
        d,
        "create --format vdi --parent base.vdi --parent Snapshots/one.vdi Snapshots/two.vdi --option AllocationBlockSize=4k",
    );
    for file in ["one", "two"] {
        let mut commands = Vec::new();
        for _ in 0..10 {
            let len = (1 + rng.below(300)) * 512;
            let at = rng.below((size - len) / 512 + 1) * 512;
            let value = rng.below(4) as u8;
            model[at as usize..(at + len) as usize].fill(value);
            commands.push(match value {
                0 => format!("write -z -u {at} {len}"),
                _ => format!("write -P {value} {at} {len}"),
            });
        }
        let commands: Vec<_> = commands.iter().map(String::as_str).collect();
        let parents = if file == "one" { "" } else { "--parent base.vdi --parent Snapshots/one.vdi" };
        io_ok(d, &format!("--allow-write-to-parent {parents} Snapshots/{file}.vdi"), &commands);
    }
    model
}

#[test]
fn a_chain_of_three_is_seen_whole() {
    for seed in 0..5 {
        let dir = scratch();
        let d = dir.path();
        let model = chain(d, &mut Rng(seed));
        ok(d, "convert --output-format raw --parent-dir . Snapshots/two.vdi found.raw");
        assert!(read(d.join("found.raw")) == model, "seed {seed}");
        let named = "--parent base.vdi --parent Snapshots/one.vdi,format=vdi";
        ok(d, &format!("convert --output-format vdi {named} Snapshots/two.vdi flat.vdi"));
        ok(d, "compare flat.vdi found.raw");
        ok(d, &format!("compare {named} Snapshots/two.vdi found.raw"));
        // Without a word: the folder above one that is called Snapshots.
        assert!(run(d, "convert --output-format raw Snapshots/one.vdi one.raw").status.success());
    }
}

#[test]
fn eight_tebibytes_with_ten_megabytes_take_seconds_and_little_memory() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 8T a.vdi");
    let places = [0, 3 << 40, (8 << 40) - MIB];
    let commands: Vec<_> = places.iter().map(|p| format!("write -P 7 {} 1M", p)).collect();
    let mut commands: Vec<_> = commands.iter().map(String::as_str).collect();
    commands.push("write -P 8 1T 7M");
    io_ok(d, "a.vdi", &commands);
    let start = Instant::now();
    let mut child = vdimg(d, "convert --output-format raw a.vdi a.raw").spawn().expect("start");
    let memory = watch_memory(&mut child).expect("seen running");
    let took = start.elapsed();
    if !child.wait().expect("wait").success() {
        // The largest file of some file systems is smaller.
        assert!(!d.join("a.raw").exists(), "nothing is left");
        return println!("skipped: no file of 8 TiB can be made here");
    }
    println!("8 TiB VDI with 10 MB to raw: {took:?}, {} KiB of memory", memory / KIB);
    assert!(took <= Duration::from_secs(5), "{took:?}");
    assert!(memory <= 100 * MIB, "{memory} bytes");
    assert_eq!(fs::metadata(d.join("a.raw")).expect("metadata").len(), 8 << 40);
    assert!(storage(&d.join("a.raw")) <= 11 * MIB, "{}", storage(&d.join("a.raw")));
    let raw = fs::File::open(d.join("a.raw")).expect("open");
    let mut byte = [0];
    for (at, want) in
        [(0, 7), (MIB, 0), (3 << 40, 7), ((8 << 40) - 1, 7), (1 << 40, 8), ((1 << 40) + 7 * MIB, 0)]
    {
        raw.read_exact_at(&mut byte, at).expect("read");
        assert_eq!(byte[0], want, "at {at}");
    }
    let start = Instant::now();
    ok(d, "compare a.vdi a.raw");
    ok(d, "convert --output-format vdi a.raw b.vdi");
    ok(d, "compare a.vdi b.vdi");
    println!("compared, back to VDI, compared: {:?}", start.elapsed());
    assert!(start.elapsed() <= Duration::from_secs(15));
}

#[test]
fn comment_and_geometry_come_along_and_uuids_are_new() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 2M --comment kept a.vdi");
    ok(d, "convert --output-format vdi a.vdi b.vdi");
    let info = |f: &str| -> serde_json::Value {
        serde_json::from_str(&ok(d, &format!("info --output json {f}"))).expect("JSON")
    };
    let (a, b) = (info("a.vdi"), info("b.vdi"));
    assert_eq!(b["comment"], "kept");
    assert_ne!(a["uuid"], b["uuid"]);
    assert!(b["parent_uuid"].is_null());
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let dir = scratch();
    let d = dir.path();
    for (signal, seed) in [("TERM", 1), ("INT", 2), ("HUP", 3)] {
        // A quick machine may be done before the signal comes; then there is more to do the next time.
        let interrupted = (0..6).any(|try_| {
            let size = (64 * MIB) << try_;
            let mut piece = vec![0; MIB as usize];
            Rng(seed).fill(&mut piece);
            let src = fs::File::create(d.join("s.raw")).expect("create");
            (0..size / MIB).for_each(|i| src.write_all_at(&piece, i * MIB).expect("write"));
            was_interrupted(d, signal)
        });
        assert!(interrupted, "SIG{signal} always came too late");
        assert!(!d.join("t.vdi").exists(), "SIG{signal}");
    }
}

/// Converts and sends a signal as soon as the target is there. True if that ended the conversion.
fn was_interrupted(d: &Path, signal: &str) -> bool {
    let _ = fs::remove_file(d.join("t.vdi"));
    let mut c = vdimg(d, "convert --output-format vdi s.raw t.vdi");
    let mut child = c.stderr(Stdio::piped()).spawn().expect("start");
    while !d.join("t.vdi").exists() && child.try_wait().expect("wait").is_none() {
        std::thread::yield_now();
    }
    let kill = format!("kill -{signal} {}", child.id());
    let _ = Command::new("sh").args(["-c", &kill]).stderr(Stdio::null()).status();
    let out = child.wait_with_output().expect("end");
    if out.status.success() {
        return false;
    }
    assert!(failed(signal, 1, out).contains("t.vdi: interrupted"));
    true
}

#[test]
fn a_full_disk_leaves_nothing() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("s.raw"), vec![7; 12 << 20]).expect("write");
    let Some(_fs) = SmallFs::mount(&d.join("small"), 6 * MIB) else { return };
    for args in [
        "convert --output-format vdi s.raw small/t",
        "convert --output-format raw s.raw small/t",
        "convert --output-format vdi --variant fixed s.raw small/t",
        "create --format vdi --size 20M --variant fixed small/t",
        "create --format raw --size 20M --variant fixed small/t",
    ] {
        let line = fails(d, 1, args);
        assert!(line.starts_with("small/t: ") && line.contains("No space left on device"), "{args}: {line}");
        let place = line.split_once("cannot ").expect("what was tried").1;
        assert!(place.bytes().any(|b| b.is_ascii_digit()), "where: {line}");
        assert_eq!(fs::read_dir(d.join("small")).expect("folder").count(), 0, "{args}");
    }
}

#[test]
fn a_full_disk_fails_the_write_and_spares_the_image() {
    let dir = scratch();
    let d = dir.path();
    let Some(_fs) = SmallFs::mount(&d.join("small"), 6 * MIB) else { return };
    ok(d, "create --format vdi --size 20M small/i.vdi");
    let line = failed("io", 1, io(d, "small/i.vdi", &["write -P 1 0 1M", "write -P 2 1M 10M"]));
    assert!(line.contains("No space left on device"), "{line}");
    assert!(line.starts_with("small/i.vdi: cannot write guest bytes "), "{line}");
    ok(d, "check small/i.vdi");
    io_ok(d, "--read-only small/i.vdi", &["read -P 1 0 1M"]);
}

#[test]
fn a_limit_on_file_sizes_is_an_error_like_others() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("s.raw"), vec![7; 12 << 20]).expect("write");
    for format in ["vdi", "raw"] {
        let script = format!("ulimit -f 8192; exec \"$0\" convert --output-format {format} s.raw t");
        let bin = env!("CARGO_BIN_EXE_vdimg");
        let out = Command::new("bash").current_dir(d).args(["-c", &script, bin]).output().expect("bash");
        let line = failed(format, 1, out);
        assert!(line.starts_with("t: ") && line.contains("File too large"), "{format}: {line}");
        assert!(!d.join("t").exists());
    }
}

// Foreign judges.

#[test]
fn qemu_reads_what_we_convert() {
    if !has("qemu-img") {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    // QEMU rounds sizes of VDIs up to whole sectors and reads blocks of 1 MiB only.
    for (seed, size) in [(1, 9 * MIB + 512), (2, 3 * MIB), (3, 512)] {
        for variant in ["dynamic", "fixed", "zero-expand"] {
            random_raw(&d.join("s.raw"), size, &mut Rng(seed));
            ok(d, &format!("convert --output-format vdi --variant {variant} s.raw a.vdi"));
            tool(d, "qemu-img", "check -q -f vdi a.vdi");
            tool(d, "qemu-img", "compare -q -f raw -F vdi s.raw a.vdi");
            tool(d, "qemu-img", "convert -f vdi -O raw a.vdi q.raw");
            assert!(read(d.join("q.raw")) == read(d.join("s.raw")), "{size} {variant}");
            ["s.raw", "a.vdi", "q.raw"].iter().for_each(|f| fs::remove_file(d.join(f)).expect("remove"));
        }
    }
}

#[test]
fn we_read_what_qemu_converts() {
    if !has("qemu-img") || !has("qemu-io") {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    for (seed, options) in [(1, ""), (2, "-o static=on")] {
        random_raw(&d.join("s.raw"), 9 * MIB + 512, &mut Rng(seed));
        tool(d, "qemu-img", &format!("convert -f raw -O vdi {options} s.raw q.vdi"));
        ok(d, "check q.vdi");
        ok(d, "compare s.raw q.vdi");
        ok(d, "convert --output-format raw q.vdi o.raw");
        assert!(read(d.join("o.raw")) == read(d.join("s.raw")), "{options}");
        // Each goes on where the other stopped.
        io_ok(d, "q.vdi", &["write -P 1 0 1536k", "discard 4M 1M"]);
        tool(d, "qemu-img", "check -q -f vdi q.vdi");
        let mut q = Command::new("qemu-io");
        q.current_dir(d).args(["-f", "vdi", "-c", "read -P 1 0 1536k", "-c", "write -P 2 6M 2M", "q.vdi"]);
        let said = succeeded("qemu-io", q.output().expect("start"));
        assert!(!said.contains("failed"), "{said}");
        ok(d, "check q.vdi");
        io_ok(d, "--read-only q.vdi", &["read -P 1 0 1536k", "read -P 0 4M 1M", "read -P 2 6M 2M"]);
        ["s.raw", "q.vdi", "o.raw"].iter().for_each(|f| fs::remove_file(d.join(f)).expect("remove"));
    }
}

#[test]
fn maps_are_those_of_qemu() {
    if !has("qemu-img") {
        return;
    }
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 20M a.vdi");
    io_ok(d, "a.vdi", &["write 3M 2M", "write 0 1M", "write 10M 4M", "write 19M 1M"]);
    random_raw(&d.join("r.raw"), 20 * MIB, &mut Rng(4));
    for (file, format) in [("a.vdi", "vdi"), ("r.raw", "raw")] {
        let of = |text: String| -> Vec<Vec<serde_json::Value>> {
            let list: Vec<serde_json::Value> = serde_json::from_str(&text).expect("JSON");
            // QEMU 7.2 knows no "compressed", and calls the unallocated blocks of a VDI present.
            let keys = ["start", "length", "depth", "zero", "data", "offset"];
            list.iter().map(|e| keys.iter().map(|k| e[k].clone()).collect()).collect()
        };
        let ours = of(ok(d, &format!("map --output json --format {format} {file}")));
        let theirs = of(tool(d, "qemu-img", &format!("map --output json -f {format} {file}")));
        assert!(!ours.is_empty());
        assert_eq!(ours, theirs, "{file}");
    }
}

/// The name says which format, and how the new image is written changes nothing of what it shows.
#[test]
fn the_name_says_the_format_and_each_way_of_writing_is_complete() {
    let dir = scratch();
    let d = dir.path();
    random_raw(&d.join("s.raw"), 5 * MIB + 512, &mut Rng(77));
    for (n, mode) in ["none", "writeback", "unsafe"].iter().enumerate() {
        for ext in ["vdi", "qcow2", "vhd", "raw"] {
            // no VDI takes writes of single sectors past the cache of every device
            if *mode == "none" && ext != "raw" {
                continue;
            }
            ok(d, &format!("convert -t {mode} s.raw {n}.{ext}"));
            ok(d, &format!("compare s.raw {n}.{ext}"));
            ok(d, &format!("check {n}.{ext}"));
        }
    }
    let said = fails(d, 1, "convert s.raw s.unknown");
    assert!(said.contains("--output-format"), "{said}");
}

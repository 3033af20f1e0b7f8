//! VHD images that other programs made: every byte of the good ones, a clear refusal of the broken ones, and what
//! killed writers have left. And images of our own, as other programs see them.

mod format_support;

use format_support::hostile::{Random, judge};
use format_support::{FileSource, Layer, data_pieces, range_of, read, read_all, vhd_fixtures};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use vdblk::error::ErrorKind;
use vdblk::format::{self, Format, ImageFile, NewImage, OpenHow, detect, open_single};
use vdblk::map::{FileId, ImageMap};
use vdblk::vd::{ImageSpec, OpenDisk, open_disk};

const READ: OpenHow = OpenHow { read_only: true, info_only: false };

fn table(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    serde_json::from_slice(&std::fs::read(path).expect("table")).expect("JSON")
}

fn text(v: &Value) -> &str {
    v.as_str().expect("a string")
}

fn list(v: &Value) -> &[Value] {
    v.as_array().expect("a list")
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

type Opened = (Box<dyn ImageMap>, FileSource);

fn open(path: &Path, id: u16) -> vdblk::Result<Opened> {
    let source = FileSource::open(path);
    let format = detect(path, &source, None)?;
    Ok((open_single(format, &source, FileId(id), READ)?, source))
}

/// A chain's images, the leaf first.
fn chain(dir: &Path, files: &[Value]) -> Vec<Opened> {
    let one = |(i, f): (u16, &Value)| open(&dir.join(text(f)), i).unwrap_or_else(|e| panic!("{f}: {e}"));
    let mut opened: Vec<_> = (0..).zip(files).map(one).collect();
    opened.reverse();
    opened
}

fn layers(chain: &[Opened]) -> Vec<Layer<'_>> {
    chain.iter().map(|(map, bytes)| Layer { map: &**map, bytes }).collect()
}

/// The given runs have their checksums, and everything else is zero.
fn assert_runs(id: &str, layers: &[Layer<'_>], runs: &[Value]) {
    let mut known = Vec::new();
    for run in runs {
        let range = range_of(run[0].as_u64().expect("start"), run[1].as_u64().expect("length"));
        let mut bytes = vec![0; range.len() as usize];
        read(layers, range, &mut bytes);
        assert_eq!(hex(&bytes), text(&run[2]), "{id}: {range}");
        known.push(range);
    }
    for piece in data_pieces(layers) {
        let mut bytes = vec![0; piece.len() as usize];
        read(layers, piece, &mut bytes);
        for common in known.iter().map(|run| piece.intersect(*run)).filter(|c| !c.is_empty()) {
            let at = common.start().since(piece.start()) as usize;
            bytes[at..at + common.len() as usize].fill(0);
        }
        assert!(bytes.iter().all(|b| *b == 0), "{id}: bytes outside the runs in {piece}");
    }
}

fn assert_reads(dir: &Path, e: &Value) {
    let chain = chain(dir, list(&e["chain"]));
    assert_eq!(chain[0].0.limits().size_bytes, e["size"].as_u64().expect("size"), "{e}");
    match e["sha256"].as_str() {
        Some(sha) => assert_eq!(hex(&read_all(&layers(&chain))), sha, "{}", e["id"]),
        None => assert_runs(text(&e["id"]), &layers(&chain), list(&e["runs"])),
    }
}

#[test]
fn good_images_read_byte_for_byte() {
    let good = table("vhd-good.json");
    assert_eq!(good.len(), 19);
    good.iter().for_each(|e| assert_reads(vhd_fixtures(), e));
}

#[test]
fn good_images_check_clean_and_crashed_ones_leak_at_most() {
    for e in table("vhd-good.json") {
        let path = vhd_fixtures().join(text(list(&e["chain"]).last().expect("a leaf")));
        let source = FileSource::open(&path);
        let files = [ImageFile { id: FileId(0), source: &source }];
        let report = format::check(Format::Vhd, &files).expect("a VHD").expect("a report");
        let worst = if text(&e["id"]).starts_with("crash") { 3 } else { 0 };
        assert!([0, worst].contains(&report.exit_code()), "{}: {report:?}", e["id"]);
    }
}

/// Opens as `e` says: refused with a word, or as a good image, or not over these parents. Which of them it was.
fn assert_refused(e: &Value, good: &[Value]) -> &'static str {
    let path = vhd_fixtures().join("broken").join(text(&e["file"]));
    if let Some(word) = e["refused_with"].as_str() {
        let err = open(&path, 0).map(drop).expect_err(text(&e["file"]));
        let line = err.to_string();
        assert!(line.contains(word) && !line.contains('\n'), "{e}: {line}");
        let kinds = [ErrorKind::Corrupt, ErrorKind::NotThisFormat, ErrorKind::Unsupported, ErrorKind::Limit];
        assert!(kinds.contains(&err.kind()), "{err:?}");
        return "refused";
    }
    if let Some(twin) = e["opens_as"].as_str() {
        let twin = good.iter().find(|g| g["id"] == twin).expect("a good image");
        let here = [open(&path, 0).unwrap_or_else(|err| panic!("{e}: {err}"))];
        assert_eq!(hex(&read_all(&layers(&here))), text(&twin["sha256"]), "{e}");
        return "opened";
    }
    let parents = list(&e["parents"])
        .iter()
        .map(|p| ImageSpec { path: vhd_fixtures().join("broken").join(text(p)), format: None });
    let how = OpenDisk { parents: parents.collect(), ..OpenDisk::new(&path) };
    let err = open_disk(&how).map(drop).expect_err(text(&e["file"]));
    assert!(matches!(err.kind(), ErrorKind::ParentMismatch | ErrorKind::NotFound), "{e}: {err}");
    "chain"
}

fn count(found: &[&str]) -> [usize; 3] {
    ["refused", "opened", "chain"].map(|w| found.iter().filter(|f| **f == w).count())
}

#[test]
fn broken_images_are_refused_with_one_clear_line() {
    let good = table("vhd-good.json");
    let found: Vec<_> = table("vhd-broken.json").iter().map(|e| assert_refused(e, &good)).collect();
    assert_eq!(count(&found), [15, 2, 4]);
}

fn vdimg(args: &[&str]) -> Output {
    let out = Command::new(env!("CARGO_BIN_EXE_vdimg")).args(args).output().expect("vdimg");
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out
}

fn path(p: &Path) -> &str {
    p.to_str().expect("a name of text")
}

/// A copy that tests may write to.
fn copy(dir: &Path, name: &str) -> PathBuf {
    let to = dir.join(Path::new(name).file_name().expect("a name"));
    std::fs::copy(vhd_fixtures().join(name), &to).expect("a copy");
    to
}

#[test]
fn what_is_damaged_and_still_there_is_repaired() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let sum =
        |p: &Path| hex(&read_all(&layers(&[open(p, 0).unwrap_or_else(|e| panic!("{}: {e}", p.display()))])));
    for (name, same) in [
        ("broken/vhd-footer-missing.vhd", true),
        ("broken/vhd-footer-bad.vhd", true),
        ("crash-vhd-w4of13.vhd", true),
        ("crash-vhd-w10of13.vhd", true),
        ("broken/vhd-bat-overlap.vhd", false),
        ("broken/vhd-bat-beyond.vhd", false),
        ("broken/vhd-bat-in-header.vhd", false),
        ("broken/vhd-truncated.vhd", false),
    ] {
        let file = copy(dir.path(), name);
        let before = same.then(|| sum(&file));
        vdimg(&["repair", path(&file)]);
        vdimg(&["check", path(&file)]);
        let after = sum(&file);
        assert!(before.is_none_or(|b| b == after), "{name}: reads otherwise after the repair");
    }
}

#[test]
fn parents_are_found_by_uuid_and_by_name() {
    let dir = tempfile::tempdir().expect("temporary folder");
    for n in 0..3 {
        copy(dir.path(), &format!("vhd-chain-{n}.vhd"));
    }
    let raw = dir.path().join("out.raw");
    vdimg(&["convert", "--output-format", "raw", path(&dir.path().join("vhd-chain-2.vhd")), path(&raw)]);
    let expected =
        table("vhd-good.json").iter().find(|g| g["id"] == "vhd-chain-2").expect("it")["sha256"].clone();
    assert_eq!(hex(&std::fs::read(&raw).expect("the copy")), text(&expected));
    let info = open(&dir.path().join("vhd-chain-1.vhd"), 0).expect("a diff").0.info();
    assert_eq!(info.variant, "diff");
    assert_eq!(info.parent_names.first().map(String::as_str), Some("vhd-chain-0.vhd"));
    assert!(info.parent_names.iter().any(|n| n.starts_with('/')), "{info:?}");
    assert_eq!(info.parent_uuid, open(&dir.path().join("vhd-chain-0.vhd"), 0).expect("a base").0.info().uuid);
}

#[test]
fn new_images_say_what_was_asked_for() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let at = |name: &str| dir.path().join(name);
    vdimg(&["create", "--format", "vhd", "--size", "20M", path(&at("a.vhd"))]);
    vdimg(&["create", "--format", "vhd", "--variant", "fixed", "--size", "3M", path(&at("f.vhd"))]);
    vdimg(&["create", "--format", "vhd", "--option", "block_size=512k", "--size", "20M", path(&at("b.vhd"))]);
    vdimg(&["create", "--format", "vhd", "--parent", path(&at("a.vhd")), path(&at("d.vhd"))]);
    for (name, variant, block) in [
        ("a.vhd", "dynamic", Some(2 << 20)),
        ("f.vhd", "fixed", None),
        ("b.vhd", "dynamic", Some(512 << 10)),
        ("d.vhd", "diff", Some(2 << 20)),
    ] {
        let (map, _) = open(&at(name), 0).unwrap_or_else(|e| panic!("{name}: {e}"));
        let info = map.info();
        assert_eq!((info.variant, info.block_size), (variant, block), "{name}");
        vdimg(&["check", path(&at(name))]);
    }
    let diff = open(&at("d.vhd"), 0).expect("a diff").0.info();
    assert_eq!(diff.parent_uuid, open(&at("a.vhd"), 0).expect("its parent").0.info().uuid);
    assert_eq!(diff.parent_names.first().map(String::as_str), Some(".\\a.vhd"), "{diff:?}");
}

/// Two of them have a log that nobody has written to its places: it is replayed in memory.
#[test]
fn vhdx_images_read_byte_for_byte() {
    let good = table("vhdx-good.json");
    assert_eq!(good.len(), 11);
    good.iter().for_each(|e| assert_reads(vhd_fixtures(), e));
}

#[test]
fn broken_vhdx_images_are_refused_with_one_clear_line() {
    let good = table("vhdx-good.json");
    let found: Vec<_> = table("vhdx-broken.json").iter().map(|e| assert_refused(e, &good)).collect();
    assert_eq!(count(&found), [8, 2, 0]);
}

#[test]
fn a_log_is_written_and_a_bad_copy_renewed_by_a_repair() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let sum =
        |p: &Path| hex(&read_all(&layers(&[open(p, 0).unwrap_or_else(|e| panic!("{}: {e}", p.display()))])));
    for name in [
        "crash-vhdx-w8of27.vhdx",
        "crash-vhdx-w17of27.vhdx",
        "crash-vhdx-w19of27.vhdx",
        "broken/vhdx-one-header-bad.vhdx",
        "broken/vhdx-one-region-bad.vhdx",
    ] {
        let file = copy(dir.path(), name);
        let before = sum(&file);
        vdimg(&["repair", path(&file)]);
        assert!(
            String::from_utf8_lossy(&vdimg(&["check", path(&file)]).stdout).contains("No errors"),
            "{name}"
        );
        assert_eq!(sum(&file), before, "{name}: reads otherwise after the repair");
    }
}

#[test]
fn opening_and_reading_a_vhdx_writes_nothing() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let file = copy(dir.path(), "crash-vhdx-w8of27.vhdx");
    let before = hex(&std::fs::read(&file).expect("a file"));
    let raw = dir.path().join("out.raw");
    vdimg(&["convert", "--output-format", "raw", path(&file), path(&raw)]);
    vdimg(&["info", path(&file)]);
    let expected =
        table("vhdx-good.json").iter().find(|g| g["id"] == "crash-vhdx-w8of27").expect("it")["sha256"]
            .clone();
    assert_eq!(hex(&std::fs::read(&raw).expect("the copy")), text(&expected));
    let source = FileSource::open(&file);
    open_single(Format::Vhdx, &source, FileId(0), OpenHow::default()).map(drop).expect("an image");
    assert_eq!(hex(&std::fs::read(&file).expect("a file")), before);
}

/// A VHD of 16 blocks of 4 KiB, some of them there, some in parts.
fn small_vhd(r: &mut Random, variant: &str) -> Vec<u8> {
    let new = NewImage {
        file_name: "a.vhd".into(),
        size_bytes: (64 << 10) - 512 * r.below(8),
        variant: Some(variant.into()),
        uuid: None,
        modification: uuid::Uuid::nil(),
        parent: None,
        comment: None,
        geometry: None,
        options: if variant == "fixed" { Vec::new() } else { vec![("block_size".into(), "4096".into())] },
    };
    let [file] = format::blueprint(Format::Vhd, &new).expect("a VHD").files.try_into().expect("one file");
    let mut f = vec![0x5a; file.len as usize];
    for (at, bytes) in file.pieces {
        f[at.0 as usize..at.0 as usize + bytes.len()].copy_from_slice(&bytes);
    }
    let footer = f[f.len() - 512..].to_vec();
    if variant == "fixed" {
        return f;
    }
    for block in 0..16usize {
        if r.below(3) == 0 {
            continue;
        }
        let at = f.len() - 512;
        f.truncate(at);
        f.extend([if r.below(2) == 0 { 0xff } else { r.below(256) as u8 }; 512]);
        f.extend([block as u8 + 1; 4096]);
        f.extend(&footer);
        f[1536 + 4 * block..1540 + 4 * block].copy_from_slice(&((at / 512) as u32).to_be_bytes());
    }
    f
}

/// The checksum of the structure at `at` is made right, its own four bytes being at `own`.
fn seal(f: &mut [u8], at: usize, len: usize, own: usize) {
    f[at + own..at + own + 4].fill(0);
    let sum = !f[at..at + len].iter().map(|b| u32::from(*b)).sum::<u32>();
    f[at + own..at + own + 4].copy_from_slice(&sum.to_be_bytes());
}

fn change(f: &mut Vec<u8>, r: &mut Random) {
    match r.below(8) {
        // an entry: another's, a bit beside it, anything
        0..=2 => {
            let (from, to) = (1536 + 4 * r.below(16) as usize, 1536 + 4 * r.below(16) as usize);
            let other = u32::from_be_bytes(f[from..from + 4].try_into().expect("four bytes"));
            let near = other.wrapping_add(r.below(12) as u32).wrapping_sub(6);
            let entry =
                [other, near, r.below(200) as u32, r.below(1 << 32) as u32, u32::MAX][r.below(5) as usize];
            f[to..to + 4].copy_from_slice(&entry.to_be_bytes());
        }
        // a field of the footer or the header, with right checksums
        3 | 4 => {
            let at = [16, 40, 48, 56, 60, 512 + 16, 512 + 28, 512 + 32, 512 + 576][r.below(9) as usize];
            let at = at + r.below(8) as usize;
            f[at] = [0, 1, 2, 4, 0x10, 0x7f, 0xff, r.below(256) as u8][r.below(8) as usize];
            seal(f, 0, 512, 64);
            seal(f, 512, 1024, 36);
            if r.below(2) == 0 {
                let (end, footer) = (f.len() - 512, f[..512].to_vec());
                f[end..].copy_from_slice(&footer);
            }
        }
        5 => {
            let at = r.below(f.len() as u64) as usize;
            f[at] ^= 1 << r.below(8);
        }
        6 => f.truncate(f.len() - (r.below(20) as usize * 512).min(f.len() - 2048)),
        _ => f.resize(f.len() + r.below(30) as usize * 512, r.below(2) as u8),
    }
}

#[test]
fn any_vhd_is_read_and_repaired_or_refused() {
    let mut opened = 0;
    for seed in 0..6000 {
        let mut r = Random(seed);
        let mut f = small_vhd(&mut r, if seed % 20 == 0 { "fixed" } else { "dynamic" });
        assert!(judge(Format::Vhd, &f), "seed {seed}: sound");
        for _ in 0..1 + r.below(4) {
            change(&mut f, &mut r);
        }
        let seen = std::panic::catch_unwind(|| judge(Format::Vhd, &f));
        opened += u32::from(seen.unwrap_or_else(|_| panic!("seed {seed}")));
    }
    assert!((1000..5000).contains(&opened), "{opened} of 6000 opened");
}

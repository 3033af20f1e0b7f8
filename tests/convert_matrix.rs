//! Conversions from every format that is read into every one that is made: images of other programs, by their checksums,
//! and other programs on the result.

mod format_support;
mod vdimg_support;

use format_support::unpacked;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::Path;
use vdblk::format::{Format, extension_format};
use vdimg_support::shapes::{self, Shape};
use vdimg_support::*;

/// Archives of images that others made, and what is in them.
const SOURCES: [(&str, &str); 8] = [
    ("vdi", "good.json"),
    ("vmdk", "vmdk.json"),
    ("vhd", "vhd-good.json"),
    ("vhd", "vhdx-good.json"),
    ("qcow2", "qcow2-good.json"),
    ("qed", "qed-good.json"),
    ("parallels", "parallels-good.json"),
    ("dmg", "dmg-good.json"),
];
/// Larger ones take long.
const LARGEST: u64 = 16 << 20;

/// An image of another program.
struct Source {
    id: String,
    format: Format,
    /// Options of vdimg and the file, with its folder.
    words: String,
    sha: String,
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn source(folder: &Path, e: &Value) -> Option<Source> {
    let sha = e["sha256"].as_str()?.to_string();
    let id = e["id"].as_str().expect("a name").to_string();
    if e["size"].as_u64()? > LARGEST || id.starts_with("crash") {
        return None;
    }
    let chain: Vec<&str> = match e["chain"].as_array() {
        Some(files) => files.iter().map(|f| f.as_str().expect("a file")).collect(),
        None => vec![e["file"].as_str().expect("a file")],
    };
    let paths: Vec<_> = chain.iter().map(|f| folder.join(f)).collect();
    let (top, parents) = paths.split_last().expect("an image");
    let format = match e["format"].as_str() {
        Some(name) => name.parse().expect("a format"),
        None => extension_format(top).expect("an extension"),
    };
    let parents: String = parents.iter().map(|p| format!("--parent {} ", p.display())).collect();
    let words = format!("--format {format} {parents}{}", top.display());
    Some(Source { id, format, words, sha })
}

/// Up to two of each format, the second with parents where there is such a one.
fn sources() -> Vec<Source> {
    let mut all: Vec<Source> = Vec::new();
    for (archive, table) in SOURCES {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(table);
        let table: Value = serde_json::from_slice(&fs::read(path).expect("table")).expect("JSON");
        let list = table.as_array().or_else(|| table["good"].as_array()).expect("a list");
        let folder = unpacked(archive);
        let found: Vec<_> = list.iter().filter_map(|e| source(&folder, e)).collect();
        for format in Format::ALL {
            let (diffs, bases): (Vec<_>, Vec<_>) =
                found.iter().filter(|s| s.format == format).partition(|s| s.words.contains("--parent"));
            let two = bases.first().into_iter().chain(diffs.first().or(bases.last()));
            all.extend(two.map(|s| Source {
                id: s.id.clone(),
                words: s.words.clone(),
                sha: s.sha.clone(),
                ..**s
            }));
        }
    }
    all.dedup_by(|a, b| a.id == b.id);
    all.push(disc());
    all
}

/// A CD of raw blocks, made by hand: no other program here writes them.
fn disc() -> Source {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("convert-disc");
    fs::create_dir_all(&folder).expect("a folder");
    let block = |n: u8| [vec![0xee; 16], vec![n; 2048], vec![0xee; 288]].concat();
    fs::write(folder.join("disc.bin"), (0..40).flat_map(block).collect::<Vec<_>>()).expect("the blocks");
    let sheet = "FILE disc.bin BINARY\nTRACK 01 MODE1/2352\nINDEX 01 00:00:00\n";
    fs::write(folder.join("disc.cue"), sheet).expect("the sheet");
    let shown: Vec<u8> = (0..40).flat_map(|n| vec![n; 2048]).collect();
    let words = format!("--format cue {}", folder.join("disc.cue").display());
    Source { id: "disc".into(), format: Format::Cue, words, sha: hex(&shown) }
}

/// Converts, and holds the result against the model, which has the checksum.
fn there_and_back(d: &Path, source: &Source, target: &Shape) -> String {
    let file = target.file("copy");
    ok(d, &format!("convert {} {} {file}", target.words("--output-format"), source.words));
    ok(d, &format!("check --format {} {file}", target.format));
    ok(d, &format!("compare --format {} --format2 raw {file} model.raw", target.format));
    file
}

#[test]
fn any_format_into_any_other() {
    let (sources, targets) = (sources(), shapes::convertible());
    let readable: Vec<_> =
        Format::ALL.into_iter().filter(|f| sources.iter().any(|s| s.format == *f)).collect();
    assert_eq!(readable, Format::ALL, "a source for each");
    let mut pairs = 0;
    for source in &sources {
        let dir = scratch();
        let d = dir.path();
        ok(d, &format!("convert --output-format raw {} model.raw", source.words));
        assert_eq!(hex(&fs::read(d.join("model.raw")).expect("read")), source.sha, "{}", source.id);
        let first = sources.iter().find(|s| s.format == source.format).expect("itself");
        // All shapes for the first of each format, one of each format for the other.
        let few =
            targets.iter().filter(|t| first.id == source.id || (t.variant.is_none() && t.options.is_empty()));
        for target in few.chain(&shapes::plain()) {
            there_and_back(d, source, target);
            shapes::remove(d, "copy");
            pairs += 1;
        }
    }
    println!("{} images, {pairs} conversions", sources.len());
}

/// QEMU's name for what it reads.
fn qemu_name(shape: &Shape) -> Option<&'static str> {
    let one_mib = |o: &&str| !o.starts_with("AllocationBlockSize");
    Some(match shape.format {
        Format::Vhd => "vpc",
        Format::Vdi if !shape.options.iter().all(one_mib) => return None,
        other => other.name(),
    })
}

#[test]
fn qemu_reads_what_became_of_them() {
    if !has("qemu-img") {
        return;
    }
    let sources = sources();
    let mut turn = sources.iter().cycle();
    for target in shapes::convertible() {
        let Some(name) = qemu_name(&target) else { continue };
        let source = turn.next().expect("sources");
        let dir = scratch();
        let d = dir.path();
        ok(d, &format!("convert --output-format raw {} model.raw", source.words));
        let file = there_and_back(d, source, &target);
        tool(d, "qemu-img", &format!("compare -q -f raw -F {name} model.raw {file}"));
        let info: Value =
            serde_json::from_str(&tool(d, "qemu-img", &format!("info --output json -f {name} {file}")))
                .expect("JSON");
        let size = fs::metadata(d.join("model.raw")).expect("metadata").len();
        assert_eq!(info["virtual-size"].as_u64(), Some(size), "{target} from {}", source.id);
        let out =
            std::process::Command::new("qemu-img").current_dir(d).args(["check", "-f", name, &file]).output();
        let out = out.expect("start");
        // 63: this driver has no check.
        assert!([Some(0), Some(63)].contains(&out.status.code()), "{target}: {}", text(&out.stderr));
    }
}

#[test]
fn a_full_disk_leaves_no_file_of_any_format() {
    let dir = scratch();
    let d = dir.path();
    let mut noise = vec![0; 12 << 20];
    Rng(1).fill(&mut noise);
    fs::write(d.join("s.raw"), noise).expect("write");
    let Some(_fs) = SmallFs::mount(&d.join("small"), 6 * MIB) else { return };
    for target in shapes::convertible() {
        let file = target.file("small/copy");
        let line = fails(d, 1, &format!("convert {} s.raw {file}", target.words("--output-format")));
        assert!(line.contains("No space left on device"), "{target}: {line}");
        let left: Vec<_> =
            fs::read_dir(d.join("small")).expect("folder").map(|e| e.expect("entry").path()).collect();
        assert!(left.is_empty(), "{target}: {left:?}");
    }
}

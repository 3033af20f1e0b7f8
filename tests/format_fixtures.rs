//! Images that other programs made: every byte of the good ones, a clear refusal of the broken ones.
//!
//! tests/fixtures holds the small ones. `VDBLK_FIXTURES=DIR` names a folder with the whole unpacked set and its
//! manifests; then all of its raw, VDI and DMG images are read.

mod format_support;

use format_support::{FileSource, Layer, data_pieces, dmg_fixtures, fixtures, range_of, read, read_all};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use vdblk::error::{Error, ErrorKind};
use vdblk::format::{Format, OpenHow, detect, open_single, vdi};
use vdblk::map::{ExtentKind, ExtentList, FileId, ImageMap, Intent};
use vdblk::vd::unpack;

const BIG: u64 = 64 << 20;

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

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

/// A chain that is open, base last as in `Layer` slices.
struct Chain(Vec<(Box<dyn ImageMap>, FileSource)>);

impl Chain {
    /// `files` base first.
    fn open(dir: &Path, files: &[&str], format: Format) -> Self {
        let open_one = |(i, f): (usize, &&str)| {
            let source = FileSource::open(&dir.join(f));
            let how = OpenHow { read_only: i % 2 == 0, info_only: false };
            let map =
                open_single(format, &source, FileId(i as u16), how).unwrap_or_else(|e| panic!("{f}: {e}"));
            (map, source)
        };
        Chain(files.iter().enumerate().map(open_one).rev().collect())
    }

    fn layers(&self) -> Vec<Layer<'_>> {
        self.0.iter().map(|(map, bytes)| Layer { map: &**map, bytes }).collect()
    }

    fn leaf(&self) -> &dyn ImageMap {
        &*self.0[0].0
    }
}

/// The given runs have their checksums, and everything else is zero.
fn assert_runs(id: &str, layers: &[Layer<'_>], runs: &[Value]) {
    let mut expected = Vec::new();
    for run in runs {
        let (start, len) = (run[0].as_u64().expect("start"), run[1].as_u64().expect("length"));
        let mut bytes = vec![0; len as usize];
        read(layers, range_of(start, len), &mut bytes);
        assert_eq!(hex(&bytes), text(&run[2]), "{id}: run at {start}");
        expected.push(range_of(start, len));
    }
    for piece in data_pieces(layers) {
        let mut bytes = vec![0; piece.len() as usize];
        read(layers, piece, &mut bytes);
        for run in &expected {
            let known = piece.intersect(*run);
            if !known.is_empty() {
                let at = known.start().since(piece.start()) as usize;
                bytes[at..at + known.len() as usize].fill(0);
            }
        }
        assert!(bytes.iter().all(|b| *b == 0), "{id}: bytes outside the runs in {piece}");
    }
}

fn assert_content(e: &Value, chain: &Chain) {
    let id = text(&e["id"]);
    let layers = chain.layers();
    match e["sha256"].as_str() {
        Some(sha) if chain.leaf().limits().size_bytes <= BIG => {
            assert_eq!(hex(&read_all(&layers)), sha, "{id}")
        }
        _ => assert_runs(id, &layers, list(&e["runs"])),
    }
}

fn open_by_table(dir: &Path, e: &Value) -> Chain {
    let files: Vec<_> = list(&e["chain"]).iter().map(text).collect();
    Chain::open(dir, &files, text(&e["format"]).parse().expect("format"))
}

#[test]
fn good_images_read_byte_for_byte() {
    let good = table("good.json");
    assert_eq!(good.len(), 34);
    for e in &good {
        let chain = open_by_table(fixtures(), e);
        assert_eq!(chain.leaf().limits().size_bytes, e["size"].as_u64().expect("size"), "{e}");
        assert_content(e, &chain);
    }
}

#[test]
fn info_tells_what_virtualbox_tells() {
    for e in table("good.json").iter().filter(|e| e["format"] == "vdi") {
        let file = text(list(&e["chain"]).last().expect("a leaf"));
        let source = FileSource::open(&fixtures().join(file));
        let full = open_single(Format::Vdi, &source, FileId(0), OpenHow::default()).unwrap().info();
        let quick = OpenHow { read_only: true, info_only: true };
        assert_eq!(open_single(Format::Vdi, &source, FileId(0), quick).unwrap().info(), full, "{file}");
        let crashed = text(&e["id"]).starts_with("crash");
        if let (Some(n), false) = (e["allocated"].as_u64(), crashed) {
            assert_eq!(full.allocated_blocks, Some(n), "{file}");
        }
        if let Some(uuid) = e["uuid"].as_str() {
            assert_eq!(full.uuid.unwrap().to_string(), uuid, "{file}");
            let modification = full.modification_uuid.unwrap().to_string();
            assert_eq!(modification, text(&e["modification"]), "{file}");
        }
    }
}

#[test]
fn properties_of_single_images() {
    let info = |file: &str| {
        let source = FileSource::open(&fixtures().join(file));
        open_single(Format::Vdi, &source, FileId(0), OpenHow::default()).unwrap().info()
    };
    let g = info("vdi-geometry.vdi");
    assert_eq!(g.geometry, Some((1, 255, 63)));
    assert!(g.comment.as_deref().is_some_and(|c| !c.is_ascii()), "{:?}", g.comment);
    let cleared = info("vdi-geometry-cleared.vdi");
    assert_eq!((cleared.geometry, cleared.comment), (None, None));
    assert_eq!(info("vdi-grown.vdi").geometry, None, "garbage of a resize is no geometry");
    assert_eq!(info("vdi-block512k.vdi").block_size, Some(512 << 10));
    assert_eq!(info("vdi-static-qemu.vdi").variant, "fixed");
    let diff = info("vdi-chain-1.vdi");
    assert_eq!(diff.variant, "diff");
    assert_eq!(diff.parent_uuid, info("vdi-chain-0.vdi").uuid);
    assert_eq!(diff.parent_modification_uuid, info("vdi-chain-0.vdi").modification_uuid);
}

#[test]
fn good_images_check_clean_and_crashed_ones_leak_at_most() {
    for e in table("good.json").iter().filter(|e| e["format"] == "vdi") {
        let file = text(list(&e["chain"]).last().expect("a leaf"));
        let report = vdi::check(&FileSource::open(&fixtures().join(file))).unwrap();
        let worst = if file.starts_with("crash") { 3 } else { 0 };
        assert!(report.exit_code() == 0 || report.exit_code() == worst, "{file}: {report:?}");
    }
}

fn probe_and_open(path: &Path) -> Result<Box<dyn ImageMap>, Error> {
    let source = FileSource::open(path);
    let format = detect(path, &source, None)?;
    open_single(format, &source, FileId(0), OpenHow::default())
}

#[test]
fn broken_images_are_refused_with_one_clear_line() {
    let (mut refused, mut opened, mut chains) = (0, 0, 0);
    let broken = table("broken.json");
    for e in &broken {
        let files: Vec<PathBuf> =
            list(&e["files"]).iter().map(|f| fixtures().join("broken").join(text(f))).collect();
        if e["chain"].is_string() {
            // Each member is a sound image: what is wrong is for the container to see.
            files.iter().for_each(|f| drop(probe_and_open(f).unwrap_or_else(|e| panic!("{e}"))));
            chains += 1;
        } else if let Some(word) = e["refused_with"].as_str() {
            let err = probe_and_open(&files[0]).expect_err(text(&e["id"]));
            let line = err.to_string();
            assert!(line.contains(word) && !line.contains('\n'), "{}: {line}", e["id"]);
            assert!(
                matches!(
                    err.kind(),
                    ErrorKind::Corrupt | ErrorKind::NotThisFormat | ErrorKind::Unsupported | ErrorKind::Limit
                ),
                "{err:?}"
            );
            refused += 1;
        } else {
            let twin = open_by_table(fixtures(), good(text(&e["opens_as"])));
            let here = Chain(vec![(probe_and_open(&files[0]).unwrap(), FileSource::open(&files[0]))]);
            assert!(read_all(&here.layers()) == read_all(&twin.layers()), "{}", e["id"]);
            opened += 1;
        }
    }
    assert_eq!((refused, opened, chains), (23, 2, 6));
}

fn good(id: &str) -> &'static Value {
    static GOOD: std::sync::OnceLock<Vec<Value>> = std::sync::OnceLock::new();
    GOOD.get_or_init(|| table("good.json")).iter().find(|g| g["id"] == id).expect("a good image")
}

#[test]
fn broken_images_can_be_checked() {
    for e in table("broken.json").iter().filter(|e| e["refused_with"].is_string()) {
        let path = fixtures().join("broken").join(text(&e["files"][0]));
        match vdi::check(&FileSource::open(&path)) {
            Ok(report) => assert_eq!(report.exit_code(), 2, "{e}: {report:?}"),
            Err(err) => assert!(
                matches!(err.kind(), ErrorKind::NotThisFormat | ErrorKind::Unsupported),
                "{e}: {err:?}"
            ),
        }
    }
}

/// `vdimg convert` of a DMG to a raw file: through a disk's channels, which unpack on demand.
fn convert_dmg(file: &str, to: &Path) -> Output {
    let mut vdimg = Command::new(env!("CARGO_BIN_EXE_vdimg"));
    let from = dmg_fixtures().join(file);
    vdimg.args(["convert", "--output-format", "raw"]).args([from.as_path(), to]).output().expect("vdimg")
}

#[test]
fn good_dmgs_read_byte_for_byte() {
    let good = table("dmg-good.json");
    assert_eq!(good.len(), 8);
    let dir = tempfile::tempdir().expect("temporary folder");
    for e in &good {
        let chain = open_by_table(dmg_fixtures(), e);
        assert_eq!(chain.leaf().limits().size_bytes, e["size"].as_u64().expect("size"), "{e}");
        assert_content(e, &chain);
        let to = dir.path().join(text(&e["id"]));
        let done = convert_dmg(text(&e["chain"][0]), &to);
        assert!(done.status.success(), "{e}: {}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(hex(&std::fs::read(&to).expect("the copy")), text(&e["sha256"]), "{e}");
    }
}

/// Refused in one line where the trailer or the property list is broken; a damaged chunk fails where it is read.
#[test]
fn broken_dmgs_are_refused_or_fail_where_they_are_broken() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let read = OpenHow { read_only: true, info_only: false };
    let (mut refused, mut failed) = (0, 0);
    for e in table("dmg-broken.json") {
        let path = dmg_fixtures().join(text(&e["file"]));
        let source = FileSource::open(&path);
        let opened = open_single(Format::Dmg, &source, FileId(0), read);
        if let Some(word) = e["refused_with"].as_str() {
            let line = opened.expect_err(text(&e["id"])).to_string();
            assert!(line.contains(word) && !line.contains('\n'), "{}: {line}", e["id"]);
            refused += 1;
        } else {
            drop(opened.expect("only a chunk is damaged"));
            let done = convert_dmg(text(&e["file"]), &dir.path().join("copy"));
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(
                !done.status.success() && said.contains("offset 0 of its disk: Input/output error"),
                "{said}"
            );
            failed += 1;
        }
    }
    assert_eq!((refused, failed), (3, 1));
}

/// Every piece is inside the file, and unpacking it ends well or with an error. False if one does not unpack.
fn every_piece_ends(map: &dyn ImageMap, bytes: &[u8]) -> bool {
    let mut rest = range_of(0, map.limits().size_bytes);
    let mut sound = true;
    while !rest.is_empty() {
        let mut list = ExtentList::new();
        map.map(rest, Intent::Read, &mut list).expect("the table is in memory");
        for e in list.as_slice() {
            match e.kind {
                ExtentKind::Packed { packed, .. } => {
                    let from = &bytes[packed.off.0 as usize..][..packed.len as usize];
                    sound &= unpack(packed.codec, from, &mut vec![0; packed.unit as usize]).is_ok();
                }
                ExtentKind::Data { off, .. } => assert!(off.0 + e.len <= bytes.len() as u64),
                ExtentKind::Zero => {}
                ExtentKind::Parent => panic!("a DMG has no parent"),
            }
        }
        rest = rest.skip(list.covered());
    }
    sound
}

/// Bytes anywhere in the file are changed: half of the times in the tables, which stand at its end.
#[test]
fn changed_dmgs_are_refused_or_read() {
    let read = OpenHow { read_only: true, info_only: false };
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut below = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    let (mut refused, mut failed, mut sound) = (0, 0, 0);
    for file in ["dmg-lzfse.dmg", "dmg-lzma.dmg", "dmg-adc.dmg", "dmg-zlib.dmg"] {
        let whole = std::fs::read(dmg_fixtures().join(file)).expect("a fixture");
        for _ in 0..80 {
            let mut bytes = whole.clone();
            for _ in 0..1 + below(4) {
                let within = if below(2) == 0 { bytes.len() as u64 } else { 3000 };
                let at = bytes.len() - 1 - below(within) as usize;
                bytes[at] ^= 1 << below(8);
            }
            match open_single(Format::Dmg, &bytes, FileId(0), read) {
                Ok(map) if every_piece_ends(&*map, &bytes) => sound += 1,
                Ok(_) => failed += 1,
                Err(e) => {
                    assert!(!e.to_string().contains('\n'), "{e}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 20 && failed > 20 && sound > 20, "{refused} refused, {failed} failed, {sound} sound");
}

#[test]
fn a_dmg_is_opened_for_reading_only() {
    let source = FileSource::open(&dmg_fixtures().join("dmg-zlib.dmg"));
    let e = open_single(Format::Dmg, &source, FileId(0), OpenHow::default()).expect_err("writing");
    assert!(e.kind() == ErrorKind::Unsupported && e.to_string().contains("--overlay"), "{e}");
}

/// A manifest entry of the whole set in the form of good.json.
fn from_manifest(e: &Value) -> Value {
    let chain = if e["chain"].is_array() { e["chain"].clone() } else { serde_json::json!([e["file"]]) };
    let crashed = &e["tools"]["qemu-sid"]["convert_readonly"]["sha256"];
    let sha = if e["sha256"].is_string() { &e["sha256"] } else { crashed };
    let format = text(&e["format"]).to_lowercase();
    serde_json::json!({"id": e["id"], "format": format, "chain": chain, "size": e["virtual_size"],
        "sha256": sha, "runs": e["data_runs"]})
}

#[test]
fn whole_set_reads_byte_for_byte() {
    let Some(dir) = std::env::var_os("VDBLK_FIXTURES").map(PathBuf::from) else {
        eprintln!("VDBLK_FIXTURES is not set: only the fixtures of the repository were read");
        return;
    };
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).expect("manifest")).expect("JSON");
    let images = list(&manifest["images"]).iter();
    let ours: Vec<_> = images.filter(|e| ["VDI", "RAW", "DMG"].contains(&text(&e["format"]))).collect();
    assert_eq!(ours.len(), 43);
    for e in ours {
        let entry = from_manifest(e);
        let chain = open_by_table(&dir, &entry);
        if e["password"].is_string() {
            assert_eq!(read_all(&chain.layers()).len() as u64, e["virtual_size"].as_u64().unwrap());
            continue; // the content is ciphertext
        }
        assert_content(&entry, &chain);
    }
    eprintln!("43 images of {} read, 42 compared, 1 is encrypted", dir.display());
}

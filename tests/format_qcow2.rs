//! QCOW2 images that QEMU made: every byte of the good ones, a clear refusal of the broken ones, and never a byte that is
//! not there.
//!
//! `VDBLK_FIXTURES=DIR` names a folder with the whole unpacked set and its manifests; then its QCOW2 images are read too.

mod format_support;

use format_support::{FileSource, Layer, qcow2_fixtures, read_all};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;
use vdblk::error::{ErrorKind, Failure};
use vdblk::format::qcow2::Qcow2Map;
use vdblk::format::{OpenHow, detect, open_single};
use vdblk::map::{ExtentKind, ExtentList, FileId, GuestOffset, GuestRange, ImageMap, Intent, Miss};

const READ: OpenHow = OpenHow { read_only: true, info_only: false };

fn table(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    serde_json::from_slice(&std::fs::read(path).expect("table")).expect("JSON")
}

fn text(v: &Value) -> &str {
    v.as_str().expect("a string")
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// What a chain shows, base first.
fn content(dir: &Path, files: &[Value], snapshot: Option<&str>) -> Vec<u8> {
    let open_one = |(i, f): (u16, &Value)| -> (Box<dyn ImageMap>, FileSource) {
        let path = dir.join(text(f));
        let source = FileSource::open(&path);
        let map = match snapshot {
            Some(name) => Box::new(Qcow2Map::open_snapshot(&source, FileId(i), name).expect("a snapshot")),
            None => {
                let format = detect(&path, &source, None).expect("a format");
                open_single(format, &source, FileId(i), READ)
                    .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
            }
        };
        (map, source)
    };
    let chain: Vec<_> = (0..).zip(files).map(open_one).collect();
    let layers: Vec<_> = chain.iter().rev().map(|(map, bytes)| Layer { map: &**map, bytes }).collect();
    read_all(&layers)
}

#[test]
fn good_images_read_byte_for_byte() {
    let good = table("qcow2-good.json");
    assert_eq!(good.len(), 23);
    for e in &good {
        let all = content(qcow2_fixtures(), e["chain"].as_array().expect("a list"), e["snapshot"].as_str());
        assert_eq!(all.len() as u64, e["size"].as_u64().expect("size"), "{e}");
        assert_eq!(hex(&all), text(&e["sha256"]), "{e}");
    }
}

/// The same through a disk's channels, which read packed clusters and pages of tables on demand.
#[test]
fn packed_clusters_are_copied_like_any_others() {
    let dir = tempfile::tempdir().expect("temporary folder");
    for e in table("qcow2-good.json").iter().filter(|e| text(&e["id"]).starts_with("packed")) {
        let to = dir.path().join(format!("{}.raw", text(&e["id"])));
        let from = qcow2_fixtures().join(text(&e["chain"][0]));
        let vdimg = Command::new(env!("CARGO_BIN_EXE_vdimg"))
            .args(["convert", "--output-format", "raw"])
            .args([&from, &to])
            .output()
            .expect("vdimg");
        assert!(vdimg.status.success(), "{e}: {}", String::from_utf8_lossy(&vdimg.stderr));
        assert_eq!(hex(&std::fs::read(&to).expect("the copy")), text(&e["sha256"]), "{e}");
    }
}

#[test]
fn info_tells_what_qemu_tells() {
    let info = |file: &str| {
        let source = FileSource::open(&qcow2_fixtures().join(file));
        let map = Qcow2Map::open(&source, FileId(0), OpenHow { info_only: true, ..READ }).unwrap();
        (map.info(), map.snapshots().iter().map(|s| (s.id.clone(), s.name.clone())).collect::<Vec<_>>())
    };
    let (i, none) = info("qcow2-v2.qcow2");
    assert_eq!(
        (i.version.as_deref(), i.block_size, i.variant, none.len()),
        (Some("2"), Some(65536), "dynamic", 0)
    );
    let (i, _) = info("qcow2-backing-2.qcow2");
    assert_eq!(i.parent_names, ["qcow2-backing-1.qcow2"]);
    assert_eq!((i.parent_format.as_deref(), i.variant), (Some("qcow2"), "diff"));
    let (_, snapshots) = info("qcow2-snapshots.qcow2");
    let named = |id: &str, name: &str| (id.to_string(), name.to_string());
    assert_eq!(snapshots, [named("1", "snap0"), named("2", "snap1")]);
    let source = FileSource::open(&qcow2_fixtures().join("qcow2-snapshots.qcow2"));
    let e = Qcow2Map::open_snapshot(&source, FileId(0), "nosuch").unwrap_err();
    assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("snap0, snap1"), "{e}");
}

/// Refused with the reason, or opened, and then what is broken fails and the rest is as it was.
#[test]
fn broken_images_are_refused_or_fail_where_they_are_broken() {
    let (mut refused, mut failed) = (0, 0);
    for e in table("qcow2-broken.json") {
        let path = qcow2_fixtures().join(text(&e["file"]));
        let source = FileSource::open(&path);
        let opened = detect(&path, &source, None).and_then(|f| open_single(f, &source, FileId(0), READ));
        match (e["refused_with"].as_str(), opened) {
            (Some(word), Err(err)) => {
                let line = err.to_string();
                assert!(line.contains(word) && !line.contains('\n'), "{}: {line}", e["id"]);
                refused += 1;
            }
            (None, Ok(map)) => failed += u32::from(reads_fail(&*map, &source)),
            (word, opened) => panic!("{}: {word:?} {:?}", e["id"], opened.map(drop)),
        }
    }
    assert_eq!((refused, failed), (10, 3));
}

/// Goes through the whole disk; whether some look-up fails.
fn reads_fail(map: &dyn ImageMap, source: &FileSource) -> bool {
    use vdblk::map::ByteSource;
    let (mut at, mut failed) = (0, false);
    while at < map.limits().size_bytes {
        let rest = GuestRange::new(GuestOffset(at), 4096.min(map.limits().size_bytes - at)).unwrap();
        let mut list = ExtentList::new();
        match map.map(rest, Intent::Read, &mut list) {
            Ok(()) => {
                for e in list.as_slice() {
                    if let ExtentKind::Data { off, .. } = e.kind {
                        assert!(off.0 < source.len(), "data behind the end of the file");
                    }
                }
                at += list.covered();
            }
            Err(Miss::NeedsPage(key)) => {
                let place = map.page_place(key).expect("a place that was checked");
                let mut page = vec![0; place.len];
                source.read_at(place.off, &mut page).expect("a page inside the file");
                map.page_read(key, &page).expect("any page can be kept");
            }
            Err(miss) => {
                assert_eq!(miss, Miss::Fail(Failure::Corrupt));
                failed = true;
                at += rest.len();
            }
        }
    }
    failed
}

#[test]
fn whole_set_reads_byte_for_byte() {
    let Some(dir) = std::env::var_os("VDBLK_FIXTURES").map(PathBuf::from) else {
        eprintln!("VDBLK_FIXTURES is not set: only the fixtures of the repository were read");
        return;
    };
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).expect("manifest")).expect("JSON");
    let images = manifest["images"].as_array().expect("a list").iter();
    let (mut read, mut refused) = (0, 0);
    for e in images.filter(|e| e["format"] == "QCOW2" && e["sha256"].is_string()) {
        let one = vec![e["file"].clone()];
        let files = e["chain"].as_array().unwrap_or(&one);
        let source = FileSource::open(&dir.join(text(&e["file"])));
        match Qcow2Map::open(&source, FileId(0), READ) {
            Ok(_) => {
                assert_eq!(hex(&content(&dir, files, None)), text(&e["sha256"]), "{}", e["id"]);
                read += 1;
            }
            Err(err) => {
                assert_eq!(err.kind(), ErrorKind::Unsupported, "{}: {err}", e["id"]);
                refused += 1;
            }
        }
    }
    assert_eq!((read, refused), (11, 3));
    eprintln!("11 images of {} read, 3 refused", dir.display());
}

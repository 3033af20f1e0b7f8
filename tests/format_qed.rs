//! QED and QCOW images of QEMU and VirtualBox: every byte of the good ones, a clear refusal of the broken ones, and never a
//! byte that is not there.

mod format_support;

use format_support::{FileSource, Layer, qed_fixtures, read_all};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::Command;
use vdblk::error::{ErrorKind, Failure};
use vdblk::format::{Format, OpenHow, detect, open_single};
use vdblk::map::{
    ByteSource, ExtentKind, ExtentList, FileId, GuestOffset, GuestRange, ImageMap, Intent, Miss,
};

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
fn content(files: &[Value]) -> Vec<u8> {
    let open_one = |(i, f): (u16, &Value)| {
        let path = qed_fixtures().join(text(f));
        let source = FileSource::open(&path);
        let format = detect(&path, &source, None).expect("a format");
        let map = open_single(format, &source, FileId(i), READ).unwrap_or_else(|e| panic!("{f}: {e}"));
        (map, source)
    };
    let chain: Vec<_> = (0..).zip(files).map(open_one).collect();
    let layers: Vec<_> = chain.iter().rev().map(|(map, bytes)| Layer { map: &**map, bytes }).collect();
    read_all(&layers)
}

#[test]
fn good_images_read_byte_for_byte() {
    let good = table("qed-good.json");
    assert_eq!(good.len(), 16);
    for e in &good {
        let all = content(e["chain"].as_array().expect("a list"));
        assert_eq!(all.len() as u64, e["size"].as_u64().expect("size"), "{e}");
        assert_eq!(hex(&all), text(&e["sha256"]), "{e}");
    }
}

/// The same through a disk's channels, which find the parents by their names and read packed clusters on demand.
#[test]
fn chains_and_packed_clusters_are_copied_like_any_others() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let ids = ["qcow1-compressed", "qcow-vchain-1", "qed-vchain-1", "qed-over", "qcow-over"];
    for e in table("qed-good.json").iter().filter(|e| ids.contains(&text(&e["id"]))) {
        let to = dir.path().join(format!("{}.raw", text(&e["id"])));
        let from = text(e["chain"].as_array().expect("a list").last().expect("a leaf"));
        let vdimg = Command::new(env!("CARGO_BIN_EXE_vdimg"))
            .args(["convert", "--output-format", "raw"])
            .args([&qed_fixtures().join(from), &to])
            .output()
            .expect("vdimg");
        assert!(vdimg.status.success(), "{e}: {}", String::from_utf8_lossy(&vdimg.stderr));
        assert_eq!(hex(&std::fs::read(&to).expect("the copy")), text(&e["sha256"]), "{e}");
    }
}

#[test]
fn info_tells_what_qemu_tells() {
    let info = |file: &str, format| {
        let source = FileSource::open(&qed_fixtures().join(file));
        open_single(format, &source, FileId(0), OpenHow { info_only: true, ..READ }).unwrap().info()
    };
    let i = info("qed-qemu.qed", Format::Qed);
    assert_eq!((i.variant, i.virtual_size, i.block_size), ("dynamic", 16 << 20, Some(65536)));
    let i = info("qed-over.qed", Format::Qed);
    assert_eq!((i.variant, i.parent_names), ("diff", vec!["qed-4k.qed".to_string()]));
    let i = info("qed-vchain-1.qed", Format::Qed);
    assert!(i.parent_names[0].ends_with("qed-vchain-0.qed"), "{i:?}");
    let i = info("qcow-over.qcow", Format::Qcow);
    assert_eq!((i.block_size, i.parent_names), (Some(512), vec!["qed-4k.qed".to_string()]));
}

/// Those of killed QEMUs are opened for writing as they are, and left without the mark.
#[test]
fn images_of_killed_writers_are_written_to() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut marked = 0;
    for e in table("qed-good.json") {
        let file = text(e["chain"].as_array().expect("a list").last().expect("a leaf"));
        if !file.starts_with("crash") {
            continue;
        }
        let copy = dir.path().join(file);
        std::fs::copy(qed_fixtures().join(file), &copy).expect("a copy");
        marked += u32::from(std::fs::read(&copy).expect("an image")[16] & 2 != 0);
        let mut before = content(std::slice::from_ref(&e["chain"][0]));
        let (code, said) = vdimg(&["io", "-c", "write -P 119 200k 100k", "-c", "flush"], &copy);
        assert_eq!(code, Some(0), "{file}: {said}");
        let (code, said) = vdimg(&["check"], &copy);
        assert_eq!(code, Some(0), "{file}: {said}");
        before[200 << 10..300 << 10].fill(119);
        let source = FileSource::open(&copy);
        let map = open_single(Format::Qed, &source, FileId(0), READ).expect("an image");
        assert!(read_all(&[Layer { map: &*map, bytes: &source }]) == before, "{file}");
        assert_eq!(std::fs::read(&copy).expect("an image")[16] & 2, 0, "{file}: the mark is still there");
    }
    assert!(marked > 1, "{marked} have a mark");
}

/// Entries of 1 in the tables of the second level.
fn zero_entries(path: &Path) -> usize {
    let bytes = std::fs::read(path).expect("an image");
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let table = (long(4) & 0xffff_ffff) * (long(8) & 0xffff_ffff);
    let entries = |at: u64| (at..at + table).step_by(8).map(|at| long(usize::try_from(at).expect("small")));
    let tables = entries(long(40)).filter(|at| *at != 0);
    tables.map(|at| entries(at).filter(|e| *e == 1).count()).sum()
}

/// VirtualBox shows the header where an entry says zeros, and writes there.
#[test]
fn diffs_of_virtualbox_get_no_entry_that_it_does_not_know() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = |name: &str| dir.path().join(name);
    for file in ["qed-vchain-0.qed", "qed-vchain-1.qed"] {
        std::fs::copy(qed_fixtures().join(file), path(file)).expect("a copy");
    }
    let (parent, ours) = (path("qed-vchain-0.qed"), path("ours.qed"));
    let parent = parent.to_str().expect("a plain path");
    let (code, said) = vdimg(&["create", "--format", "qed", "--parent", parent], &ours);
    assert_eq!(code, Some(0), "{said}");
    for (file, zeros) in [("qed-vchain-1.qed", false), ("ours.qed", true)] {
        let commands = ["io", "-c", "write -z 0 8M", "-c", "read -P 0 0 8M"];
        let (code, said) = vdimg(&commands, &path(file));
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(zero_entries(&path(file)) > 0, zeros, "{file}");
    }
}

/// What others have added: kept, cleared by whoever writes, or refused.
#[test]
fn unknown_features_are_treated_as_their_fields_say() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let image = dir.path().join("a.qed");
    let with = |at: usize| {
        let mut bytes = std::fs::read(qed_fixtures().join("qed-4k.qed")).expect("an image");
        bytes[at + 5] = 0x40;
        std::fs::write(&image, bytes).expect("a copy");
    };
    let feature = |at: usize| std::fs::read(&image).expect("an image")[at + 5];
    for (at, after) in [(24, 0x40), (32, 0)] {
        with(at);
        let (code, said) = vdimg(&["info"], &image);
        assert_eq!((code, feature(at)), (Some(0), 0x40), "{said}");
        let (code, said) = vdimg(&["io", "-c", "write 0 512"], &image);
        assert_eq!((code, feature(at)), (Some(0), after), "{said}");
    }
    with(16);
    let (code, said) = vdimg(&["info"], &image);
    assert!(code != Some(0) && said.contains("bit 46"), "{said}");
}

/// An entry that names what is behind the end of the file would be another's once the file is longer.
#[test]
fn broken_images_are_not_written_to() {
    let mut refused = 0;
    for e in table("qed-broken.json").iter().filter(|e| e["refused_with"].is_null()) {
        let path = qed_fixtures().join(text(&e["file"]));
        let source = FileSource::open(&path);
        let format = detect(&path, &source, None).expect("a format");
        let opened = open_single(format, &source, FileId(0), OpenHow::default());
        match e["reads_as"].as_str() {
            None => {
                let err = opened.expect_err("a corruption");
                assert!(err.kind() == ErrorKind::Corrupt && !err.to_string().contains('\n'), "{e}: {err}");
                refused += 1;
            }
            Some(_) => assert!(opened.is_ok(), "{e}"),
        }
    }
    assert_eq!(refused, 7);
}

/// Refused with the reason, or opened, and then what is broken fails and the rest is as it was.
#[test]
fn broken_images_are_refused_or_fail_where_they_are_broken() {
    let (mut refused, mut failed, mut whole) = (0, 0, 0);
    for e in table("qed-broken.json") {
        let path = qed_fixtures().join(text(&e["file"]));
        let source = FileSource::open(&path);
        let opened = detect(&path, &source, None).and_then(|f| open_single(f, &source, FileId(0), READ));
        match (e["refused_with"].as_str(), opened) {
            (Some(word), Err(err)) => {
                let line = err.to_string();
                assert!(line.contains(word) && !line.contains('\n'), "{e}: {line}");
                refused += 1;
            }
            (None, Ok(map)) => match e["reads_as"].as_str() {
                None => {
                    assert!(reads_fail(&*map, &source), "{e}");
                    failed += 1;
                }
                Some(twin) => {
                    let good = table("qed-good.json");
                    let good = good.iter().find(|g| g["id"] == twin).expect("a good image");
                    assert_eq!(hex(&content(std::slice::from_ref(&e["file"]))), text(&good["sha256"]));
                    whole += 1;
                }
            },
            (word, opened) => panic!("{e}: {word:?} {:?}", opened.map(drop)),
        }
    }
    assert_eq!((refused, failed, whole), (15, 7, 1));
}

fn vdimg(args: &[&str], file: &Path) -> (Option<i32>, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_vdimg")).args(args).arg(file).output().expect("vdimg");
    let said = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// Those of killed writers are repaired, and then show what they did before.
#[test]
fn checks_are_clean_and_crashed_images_are_repaired() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut repaired = 0;
    for e in table("qed-good.json") {
        let files = e["chain"].as_array().expect("a list");
        let file = text(files.last().expect("a leaf"));
        let (code, said) = vdimg(&["check"], &qed_fixtures().join(file));
        if !file.starts_with("crash") {
            assert_eq!(code, Some(0), "{file}: {said}");
            continue;
        }
        let copy = dir.path().join(file);
        std::fs::copy(qed_fixtures().join(file), &copy).expect("a copy");
        let (mended, said) = vdimg(&["repair"], &copy);
        assert_eq!(mended, Some(0), "{file}: {said}");
        let (now, said) = vdimg(&["check"], &copy);
        assert_eq!(now, Some(0), "{file}: {said}");
        let source = FileSource::open(&copy);
        let map = open_single(Format::Qed, &source, FileId(0), READ).expect("an image");
        assert_eq!(hex(&read_all(&[Layer { map: &*map, bytes: &source }])), text(&e["sha256"]), "{file}");
        repaired += u32::from(code != Some(0));
    }
    assert!(repaired > 0, "one of the crashed images needs a repair");
}

/// What cannot be read is found; a repair makes it free, or says why it does not, and changes nothing then.
#[test]
fn broken_images_are_found_and_repaired_or_left_alone() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let (mut repaired, mut left) = (0, 0);
    for e in table("qed-broken.json") {
        let from = qed_fixtures().join(text(&e["file"]));
        let copy = dir.path().join(from.file_name().expect("a name"));
        std::fs::copy(&from, &copy).expect("a copy");
        let (found, said) = vdimg(&["check"], &copy);
        assert!(matches!(found, Some(1..=3)), "{e}: {said}");
        let (mended, said) = vdimg(&["repair"], &copy);
        if mended == Some(0) {
            assert!(e["refused_with"].is_null(), "{e}: {said}");
            let (now, said) = vdimg(&["check"], &copy);
            assert_eq!(now, Some(0), "{e}: {said}");
            repaired += 1;
        } else {
            assert!(std::fs::read(&copy).unwrap() == std::fs::read(&from).unwrap(), "{e}: {said}");
            left += 1;
        }
    }
    assert_eq!((repaired, left), (7, 16));
}

/// Goes through the whole disk; whether some look-up fails.
fn reads_fail(map: &dyn ImageMap, source: &FileSource) -> bool {
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

//! `vdimg setuuid`, `comment` and `geometry`: what they set is read again, by VirtualBox too where it is set up.

mod vdimg_support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use vdimg_support::{Holder, MIB, Rng, fails, is_root, ok, random_raw, run, scratch, succeeded, vdimg};

const OWN: &str = "11111111-2222-4333-8444-555555555555";
const MODIFICATION: &str = "66666666-7777-4888-8999-aaaaaaaaaaaa";
const PARENT: &str = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee";

/// Name, how it is made.
const IMAGES: [(&str, &str); 8] = [
    ("a.vdi", "vdi"),
    ("fixed.vdi", "vdi --variant fixed"),
    ("a.vmdk", "vmdk"),
    ("split.vmdk", "vmdk --variant split2g"),
    ("flat.vmdk", "vmdk --variant fixed"),
    ("a.vhd", "vhd"),
    ("fixed.vhd", "vhd --variant fixed"),
    ("a.vhdx", "vhdx"),
];

fn info(dir: &Path, file: &str) -> Value {
    serde_json::from_str(&ok(dir, &format!("info --output json {file}"))).expect("JSON")
}

fn comment(dir: &Path, file: &str, text: &str) -> std::process::Output {
    vdimg(dir, &format!("comment {file} --set")).arg(text).output().expect("start vdimg")
}

/// The image's disk is the raw file's, and it is not damaged.
fn is_whole(dir: &Path, file: &str) {
    ok(dir, &format!("compare {file} disk.raw"));
    ok(dir, &format!("check {file}"));
}

#[test]
fn what_is_set_is_read_again_and_the_disk_stays() {
    let dir = scratch();
    let dir = dir.path();
    random_raw(&dir.join("disk.raw"), 4 * MIB, &mut Rng(7));
    for (file, how) in IMAGES {
        ok(dir, &format!("convert disk.raw --output-format {how} {file}"));
        ok(dir, &format!("setuuid {file} --uuid {OWN}"));
        assert_eq!(info(dir, file)["uuid"], OWN, "{file}");
        is_whole(dir, file);
        ok(dir, &format!("setuuid {file}"));
        assert_ne!(info(dir, file)["uuid"], OWN, "{file}: a random one");
        let keeps_all = file.ends_with(".vdi") || file.ends_with(".vmdk");
        if keeps_all || file == "a.vhdx" {
            ok(dir, &format!("setuuid {file} --modification {MODIFICATION}"));
            assert_eq!(info(dir, file)["modification_uuid"], MODIFICATION, "{file}");
        } else {
            let line = fails(dir, 1, &format!("setuuid {file} --modification {MODIFICATION}"));
            assert!(line.contains("VHD images have no place for a modification UUID"), "{line}");
        }
        if keeps_all {
            for text in ["a \"comment\",\nof \\ two lines", "", &"long ".repeat(50), "short"] {
                succeeded(file, comment(dir, file, text));
                let expected = if text.is_empty() { Value::Null } else { text.into() };
                assert_eq!(info(dir, file)["comment"], expected, "{file}");
            }
            assert_eq!(ok(dir, &format!("comment {file}")), "short\n");
            ok(dir, &format!("comment {file} --clear"));
            assert_eq!(ok(dir, &format!("comment {file} --output json")), "{\n  \"comment\": null\n}\n");
            ok(dir, &format!("geometry {file} --lchs 100/32/63"));
        }
        if file.ends_with(".vmdk") || file.ends_with(".vhd") {
            ok(dir, &format!("geometry {file} --set 9/8/7"));
            let g = serde_json::json!({ "cylinders": 9, "heads": 8, "sectors": 7 });
            assert_eq!(info(dir, file)["geometry"], g, "{file}");
        }
        is_whole(dir, file);
    }
    assert_eq!(ok(dir, "geometry a.vmdk"), "physical: 9/8/7\nlogical: 100/32/63\n");
    assert_eq!(ok(dir, "geometry a.vdi"), "physical: none\nlogical: 100/32/63\n");
}

#[test]
fn what_a_format_does_not_keep_is_refused_in_one_line() {
    let dir = scratch();
    let dir = dir.path();
    for format in ["raw", "qcow2", "qcow", "qed", "parallels"] {
        ok(dir, &format!("create --format {format} --size 1M x.{format}"));
        let before = std::fs::read(dir.join(format!("x.{format}"))).unwrap();
        for (what, args) in
            [("UUID", "setuuid"), ("comment", "comment --set x"), ("geometry", "geometry --set 1/1/1")]
        {
            let line = fails(dir, 1, &format!("{args} x.{format}"));
            assert!(line.contains("images have no place for a") && line.contains(what), "{line}");
        }
        assert_eq!(before, std::fs::read(dir.join(format!("x.{format}"))).unwrap());
    }
    ok(dir, "create --format vdi --size 1M a.vdi");
    for (args, expected) in [
        ("setuuid a.vdi --uuid 00000000-0000-0000-0000-000000000000", "a nil UUID names nothing"),
        (&*format!("setuuid a.vdi --parent {PARENT}"), "it has no parent"),
        ("geometry a.vdi --set 1/1/1", "no place for a physical geometry"),
        ("geometry a.vdi --lchs 1/300/1", "the geometry 1/300/1 is not possible"),
        (&*format!("comment a.vdi --set {}", "x".repeat(256)), "255 are the limit"),
    ] {
        let line = fails(dir, 1, args);
        assert!(line.contains(expected), "{args}: {line}");
    }
    let held = Holder::new(dir, "a.vdi");
    assert!(fails(dir, 1, "setuuid a.vdi").contains("lock"));
    drop(held);
    fails(dir, 2, &format!("setuuid a.vdi --random --uuid {OWN}"));
}

/// A base that diffs name keeps its UUIDs, unless it is forced; then the diffs are told.
#[test]
fn children_are_not_orphaned_by_mistake() {
    let dir = scratch();
    let dir = dir.path();
    random_raw(&dir.join("disk.raw"), MIB, &mut Rng(8));
    ok(dir, "convert disk.raw --output-format vdi base.vdi");
    for (child, format) in [("child.vdi", "vdi"), ("child.vhd", "vhd"), ("child.vmdk", "vmdk")] {
        ok(dir, &format!("create --format {format} --parent base.vdi {child}"));
    }
    for args in ["setuuid base.vdi".into(), format!("setuuid base.vdi --modification {MODIFICATION}")] {
        let line = fails(dir, 1, &args);
        assert!(line.contains("is the parent of") && line.contains("--force"), "{line}");
    }
    succeeded("comment", comment(dir, "base.vdi", "of a parent, which harms nobody"));
    ok(dir, &format!("setuuid base.vdi --force --uuid {OWN}"));
    assert_eq!(run(dir, "compare child.vdi disk.raw").status.code(), Some(2), "its parent is not found");
    for child in ["child.vdi", "child.vhd", "child.vmdk"] {
        ok(dir, &format!("setuuid {child} --parent {OWN}"));
        ok(dir, &format!("compare {child} disk.raw"));
        ok(dir, &format!("check {child}"));
    }
}

/// The work folder of the oracle, if it is set up.
fn oracle() -> Option<(PathBuf, TempDir)> {
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/vdblk-oracle");
    let place =
        |name: &str, below: &str| std::env::var_os(name).map_or_else(|| home.join(below), PathBuf::from);
    if !is_root() || !place("ORACLE_CHROOT", "sid").join("usr/bin/VBoxManage").exists() {
        println!("skipped: VirtualBox is not set up, or this is not root");
        return None;
    }
    let scratch = place("ORACLE_WORK", "work").join("scratch");
    std::fs::create_dir_all(&scratch).expect("its folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/oracle/vbox.sh");
    Some((script, tempfile::tempdir_in(scratch).expect("temporary folder")))
}

#[test]
fn virtualbox_reads_what_was_set() {
    let Some((script, dir)) = oracle() else { return };
    let dir = dir.path();
    for (file, how) in &IMAGES[..7] {
        ok(dir, &format!("create --format {how} --size 8M {file}"));
        ok(dir, &format!("setuuid {file} --uuid {OWN}"));
        let (mut expected, is_vhd) = (vec![format!("uuidCreation={{{OWN}}}")], file.ends_with(".vhd"));
        if !is_vhd {
            ok(dir, &format!("setuuid {file} --modification {MODIFICATION}"));
            succeeded(file, comment(dir, file, &"a comment ".repeat(20)));
            ok(dir, &format!("geometry {file} --lchs 100/16/63"));
            expected.push(format!("uuidModification={{{MODIFICATION}}}"));
        }
        if file.ends_with(".vdi") {
            expected.push("C/H/S=100/16/63".into());
        } else {
            ok(dir, &format!("geometry {file} --set 15/14/13"));
            expected.push("PCHS=15/14/13".into());
            expected.push(if is_vhd { "LCHS=0/0/0" } else { "LCHS=100/16/63" }.into());
        }
        let mut dump = Command::new("sh");
        dump.arg(&script).args(["VBoxManage", "internalcommands", "dumphdinfo"]).arg(dir.join(file));
        let said = succeeded(file, dump.output().expect("start it"));
        for e in expected {
            assert!(said.contains(&e), "{file}: {e} in {said}");
        }
    }
}

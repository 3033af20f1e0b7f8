//! `vdimg move`: all files of an image, what other images call it, and that nothing is lost where it fails.

mod vdimg_support;

use std::path::Path;
use vdimg_support::{Holder, MIB, Rng, SmallFs, fails, io_ok, is_root, ok, random_raw, scratch};

fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("a folder").map(|e| e.expect("an entry"));
    let is_file = |e: &std::fs::DirEntry| e.file_type().is_ok_and(|t| t.is_file());
    let mut names: Vec<_> =
        entries.filter(is_file).map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A folder with a raw disk and an image of it.
fn with_image(dir: &Path, how: &str, name: &str) {
    random_raw(&dir.join("disk.raw"), 4 * MIB, &mut Rng(5));
    ok(dir, &format!("convert disk.raw --output-format {how} {name}"));
    std::fs::create_dir(dir.join("to")).expect("a folder");
}

#[test]
fn an_image_moves_with_all_its_files() {
    for (how, name, parts) in [
        ("vdi", "a.vdi", 1),
        ("vmdk --variant split2g", "a.vmdk", 2),
        ("vmdk --variant fixed", "f.vmdk", 2),
        ("qcow2", "a.qcow2", 1),
    ] {
        let dir = scratch();
        let dir = dir.path();
        with_image(dir, how, name);
        ok(dir, &format!("move {name} to"));
        assert_eq!(files(dir), ["disk.raw"], "{how}");
        assert_eq!(files(&dir.join("to")).len(), parts, "{how}");
        ok(dir, &format!("compare to/{name} disk.raw"));
        // another name in the same folder
        let (_, extension) = name.split_once('.').unwrap();
        ok(dir, &format!("move to/{name} to/renamed.{extension}"));
        ok(dir, &format!("compare to/renamed.{extension} disk.raw"));
        assert_eq!(files(&dir.join("to")).len(), parts, "{how}");
    }
}

#[test]
fn children_and_the_image_itself_know_the_new_place() {
    let dir = scratch();
    let dir = dir.path();
    with_image(dir, "qcow2", "base.qcow2");
    for child in ["qcow2", "vmdk", "vhd", "qed"] {
        ok(dir, &format!("create --format {child} --parent base.qcow2 child.{child}"));
        io_ok(dir, &format!("child.{child}"), &["write -P 1 1M 64k"]);
    }
    ok(dir, "convert child.qcow2 --output-format raw shown.raw");
    ok(dir, "move base.qcow2 other.qcow2");
    for child in ["qcow2", "vmdk", "vhd", "qed"] {
        ok(dir, &format!("compare child.{child} shown.raw"));
    }
    // parents in other folders have to be allowed
    ok(dir, "move other.qcow2 to");
    for child in ["qcow2", "vmdk", "vhd", "qed"] {
        ok(dir, &format!("compare --parent-dir to child.{child} shown.raw"));
    }
    ok(dir, "move --parent-dir to child.qcow2 to/moved.qcow2");
    ok(dir, "compare to/moved.qcow2 shown.raw");
    // VDIs are found by UUID
    ok(dir, "convert disk.raw --output-format vdi base.vdi");
    ok(dir, "create --format vdi --parent base.vdi child.vdi");
    ok(dir, "move base.vdi renamed.vdi");
    ok(dir, "compare child.vdi disk.raw");
}

#[test]
fn what_cannot_be_moved_stays_as_it_was() {
    let dir = scratch();
    let dir = dir.path();
    with_image(dir, "vdi", "a.vdi");
    ok(dir, "create --format vdi --size 1M b.vdi");
    std::os::unix::fs::symlink("a.vdi", dir.join("link.vdi")).unwrap();
    ok(dir, "create --format vhdx --size 1M base.vhdx");
    ok(dir, "create --format vhdx --parent base.vhdx child.vhdx");
    let before = (files(dir), std::fs::read(dir.join("a.vdi")).unwrap());
    for (args, expected) in [
        ("move a.vdi b.vdi", "something is there already"),
        ("move a.vdi ./a.vdi", "is there already"),
        ("move a.vdi a.qcow2", "extension"),
        ("move a.vdi nowhere/a.vdi", "nowhere"),
        ("move link.vdi c.vdi", "a link"),
        ("move base.vhdx c.vhdx", "changing the parent of VHDX images is not supported"),
    ] {
        let line = fails(dir, 1, args);
        assert!(line.contains(expected), "{args}: {line}");
    }
    let held = Holder::new(dir, "a.vdi");
    let line = fails(dir, 1, "move a.vdi c.vdi");
    assert!(line.contains("lock"), "{line}");
    drop(held);
    assert!(before == (files(dir), std::fs::read(dir.join("a.vdi")).unwrap()));
    assert!(files(&dir.join("to")).is_empty());
}

/// To another file system it is copied; where there is no room, nothing is left there.
#[test]
fn between_file_systems_it_is_copied() {
    if !is_root() {
        return println!("skipped: only root mounts file systems");
    }
    let dir = scratch();
    let dir = dir.path();
    with_image(dir, "vmdk --variant split2g", "a.vmdk");
    let Some(_large) = SmallFs::mount(&dir.join("large"), 32 * MIB) else { return };
    let Some(_small) = SmallFs::mount(&dir.join("small"), MIB) else { return };
    let before = files(dir);
    assert!(fails(dir, 1, "move a.vmdk small").contains("space"));
    assert_eq!((files(dir), files(&dir.join("small")).len()), (before, 0));
    ok(dir, "move a.vmdk large");
    assert_eq!((files(dir), files(&dir.join("large")).len()), (vec!["disk.raw".to_string()], 2));
    ok(dir, "compare large/a.vmdk disk.raw");
}

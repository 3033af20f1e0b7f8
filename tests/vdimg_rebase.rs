//! `vdimg rebase`: an image shows the same over another parent, over none, and after it was killed on the way.

mod vdimg_support;

use std::path::Path;
use std::time::Duration;
use vdimg_support::{Holder, MIB, Rng, fails, has, io_ok, ok, random_raw, scratch, tool, vdimg};

/// Formats whose images name parents.
const FORMATS: [&str; 5] = ["vdi", "vmdk", "vhd", "qcow2", "qed"];

/// A base of random bytes, an image over it with some of its own, and what that shows, as a raw file.
fn chain(dir: &Path, format: &str, seed: u64) -> String {
    let top = format!("top.{format}");
    random_raw(&dir.join("base.raw"), 4 * MIB, &mut Rng(seed));
    ok(dir, "convert base.raw --output-format vdi base.vdi");
    ok(dir, &format!("create --format {format} --parent base.vdi {top}"));
    io_ok(dir, &top, &["write -P 0x42 64k 192k", "write -z 1M 64k", "write -P 9 3M 512"]);
    ok(dir, &format!("convert {top} --output-format raw shown.raw"));
    top
}

fn names(dir: &Path, image: &str) -> serde_json::Value {
    serde_json::from_str(&ok(dir, &format!("info --output json {image}"))).expect("JSON")
}

#[test]
fn an_image_shows_the_same_over_other_parents_and_over_none() {
    for (seed, format) in (0..).zip(FORMATS) {
        let dir = scratch();
        let dir = dir.path();
        let top = chain(dir, format, seed);
        // A VDI finds its parents by UUID alone.
        let first = if format == "vdi" { "vhd" } else { "qcow2" };
        for (n, (size, of)) in (0..).zip([(4 * MIB, first), (2 * MIB, "vdi"), (6 * MIB, "vmdk")]) {
            let (raw, new) = (format!("other{n}.raw"), format!("other{n}.{of}"));
            random_raw(&dir.join(&raw), size, &mut Rng(seed + 100 + n));
            ok(dir, &format!("convert {raw} --output-format {of} {new}"));
            ok(dir, &format!("rebase -b {new} {top}"));
            ok(dir, &format!("compare {top} shown.raw"));
            ok(dir, &format!("compare --parent {new} {top} shown.raw"));
            ok(dir, &format!("check {top}"));
            ok(dir, &format!("rebase -b {new} {top}"));
        }
        ok(dir, &format!("rebase --onto= {top}"));
        std::fs::remove_file(dir.join("other2.vmdk")).unwrap();
        ok(dir, &format!("compare {top} shown.raw"));
        let alone = names(dir, &top);
        assert_eq!(
            (alone["parent_uuid"].is_null(), alone["parent_names"].as_array().map(Vec::len)),
            (true, Some(0))
        );
        if has("qemu-img") && format != "vhd" {
            tool(dir, "qemu-img", &format!("compare {top} shown.raw"));
        }
    }
}

/// A copy is all that differs: over an equal parent nothing is written.
#[test]
fn over_an_equal_parent_nothing_is_copied_and_unsafe_copies_never() {
    let dir = scratch();
    let dir = dir.path();
    let top = chain(dir, "qcow2", 20);
    ok(dir, "convert base.vdi --output-format vmdk same.vmdk");
    let blocks = |i: &str| names(dir, i)["allocated_blocks"].clone();
    let before = blocks(&top);
    ok(dir, &format!("rebase -b same.vmdk {top}"));
    assert_eq!(blocks(&top), before);
    random_raw(&dir.join("x.raw"), 4 * MIB, &mut Rng(21));
    ok(dir, &format!("rebase -u -b x.raw -F raw {top}"));
    assert_eq!(blocks(&top), before);
    assert_eq!(vdimg(dir, &format!("compare {top} shown.raw")).status().unwrap().code(), Some(1));
    // the old parent need not be there
    std::fs::remove_file(dir.join("x.raw")).unwrap();
    ok(dir, &format!("rebase -u -b base.vdi {top}"));
    ok(dir, &format!("compare {top} shown.raw"));
    // a base gets a parent, and shows its zeros
    ok(dir, "create --format qcow2 --size 4M alone.qcow2");
    ok(dir, "rebase -b base.vdi alone.qcow2");
    ok(dir, "create --format raw --size 4M zeros.raw");
    ok(dir, "compare alone.qcow2 zeros.raw");
}

#[test]
fn what_would_lose_something_is_refused() {
    let dir = scratch();
    let dir = dir.path();
    let top = chain(dir, "vdi", 30);
    ok(dir, &format!("create --format vdi --parent {top} child.vdi"));
    random_raw(&dir.join("x.raw"), 4 * MIB, &mut Rng(31));
    ok(dir, "convert x.raw --output-format vdi x.vdi");
    let before = std::fs::read(dir.join(&top)).unwrap();
    for (args, expected) in [
        (format!("rebase -b x.vdi {top}"), "is the parent of"),
        (format!("rebase --allow-write-to-parent -b child.vdi {top}"), "stands on"),
        (format!("rebase --allow-write-to-parent -b {top} {top}"), "stands on"),
        ("rebase -b base.vdi x.vdi".into(), "without a parent cannot be given one"),
        ("rebase -b x.vdi base.raw".into(), "changing the parent of raw images is not supported"),
        (format!("rebase --allow-write-to-parent -b nothing.vdi {top}"), "nothing.vdi"),
    ] {
        let line = fails(dir, 1, &args);
        assert!(line.contains(expected), "{args}: {line}");
    }
    let held = Holder::new(dir, "x.vdi");
    assert!(fails(dir, 1, &format!("rebase --allow-write-to-parent -b x.vdi {top}")).contains("lock"));
    drop(held);
    assert!(before == std::fs::read(dir.join(&top)).unwrap(), "refused before anything is written");
    ok(dir, &format!("rebase --lock-wait 20 --allow-write-to-parent -b x.vdi {top}"));
    ok(dir, "compare child.vdi shown.raw");
}

/// Whatever moment it is killed at, the image shows the same, and the same command completes.
#[test]
fn killed_on_the_way_nothing_is_lost() {
    for (seed, format) in (40..).zip(["vdi", "qcow2", "vmdk"]) {
        let dir = scratch();
        let dir = dir.path();
        let top = chain(dir, format, seed);
        random_raw(&dir.join("x.raw"), 4 * MIB, &mut Rng(seed + 1));
        ok(dir, "convert x.raw --output-format vhd x.vhd");
        for ms in [1, 3, 6, 10, 15, 25, 40] {
            let mut child =
                vdimg(dir, &format!("rebase --lock-wait 20 -b x.vhd {top}")).spawn().expect("start");
            std::thread::sleep(Duration::from_millis(ms));
            let _ = child.kill();
            child.wait().expect("its end");
            ok(dir, &format!("compare --lock-wait 20 {top} shown.raw"));
            let status =
                vdimg(dir, &format!("check --lock-wait 20 {top}")).output().expect("start").status.code();
            assert!([Some(0), Some(3)].contains(&status), "{format}: leaks at most: {status:?}");
        }
        ok(dir, &format!("rebase --lock-wait 20 -b x.vhd {top}"));
        std::fs::remove_file(dir.join("base.vdi")).unwrap();
        ok(dir, &format!("compare {top} shown.raw"));
    }
}

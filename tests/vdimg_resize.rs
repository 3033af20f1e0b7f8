//! `vdimg resize`: contents before and behind the old end, refusals, interruptions, and what other programs think of the results.

mod vdimg_support;

use std::fs;
use std::path::Path;
use vdimg_support::*;

/// An image with random contents, and what is in it.
fn image(d: &Path, kind: &str, name: &str, size: u64, seed: u64) -> Vec<u8> {
    let model = random_raw(&d.join("s.raw"), size, &mut Rng(seed));
    ok(d, &format!("convert --output-format {kind} s.raw {name}"));
    fs::remove_file(d.join("s.raw")).expect("remove");
    model
}

/// What an image shows.
fn contents(d: &Path, name: &str) -> Vec<u8> {
    let out = d.join("contents.raw");
    let _ = fs::remove_file(&out);
    ok(d, &format!("convert --output-format raw {name} contents.raw"));
    fs::read(out).expect("read")
}

/// The first `size` bytes of `model`, zeros behind them.
fn of_size(model: &[u8], size: u64) -> Vec<u8> {
    let mut m = model.to_vec();
    m.resize(usize::try_from(size).expect("a small disk"), 0);
    m
}

fn check_clean(d: &Path, name: &str) {
    let out = run(d, &format!("check {name}"));
    assert_eq!(out.status.code(), Some(0), "{name}: {}", text(&out.stdout));
}

/// Formats that grow, a variant each, with QEMU's name where QEMU knows exactly this kind.
const GROWING: [(&str, &str, Option<&str>); 9] = [
    ("raw", "a.raw", Some("raw")),
    ("vdi", "a.vdi", Some("vdi")),
    ("vdi --variant fixed", "f.vdi", Some("vdi")),
    ("vdi --option AllocationBlockSize=4k", "b.vdi", None),
    ("vhd", "a.vhd", Some("vpc")),
    ("vmdk", "a.vmdk", Some("vmdk")),
    ("vmdk --variant flat", "f.vmdk", Some("vmdk")),
    ("qcow2", "a.qcow2", Some("qcow2")),
    ("parallels", "a.hdd", Some("parallels")),
];

#[test]
fn what_is_added_reads_as_zeros_and_can_be_written() {
    let dir = scratch();
    let d = dir.path();
    for (seed, (kind, name, qemu)) in (0..).zip(GROWING) {
        let old = 5 * MIB + 512 * 3;
        let mut model = image(d, kind, name, old, seed);
        for new in [old + 512, 40 * MIB, 70 * MIB + 512] {
            ok(d, &format!("resize {name} {new}"));
            model = of_size(&model, new);
            check_clean(d, name);
            assert!(contents(d, name) == model, "{kind}: {new}");
            let last = new - 4096;
            io_ok(d, name, &[&format!("write -P 7 {last} 4096")]);
            model[last as usize..].fill(7);
            check_clean(d, name);
            assert!(contents(d, name) == model, "{kind}: {new}, written");
        }
        if let Some(format) = qemu.filter(|_| has("qemu-img")) {
            fs::write(d.join("m.raw"), &model).expect("write");
            tool(d, "qemu-img", &format!("compare -f raw -F {format} m.raw {name}"));
            if !["raw", "vmdk", "vpc"].contains(&format) {
                tool(d, "qemu-img", &format!("check -f {format} {name}"));
            }
        }
        fs::remove_file(d.join(name)).expect("remove");
    }
}

#[test]
fn plus_adds_to_what_is_there() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 3M a.vdi");
    ok(d, "resize a.vdi +1M");
    ok(d, "resize a.vdi +512");
    let info = ok(d, "info --output json a.vdi");
    assert!(info.contains(&(4 * MIB + 512).to_string()), "{info}");
    ok(d, "resize a.vdi 4194816");
}

#[test]
fn a_smaller_disk_loses_nothing_unless_it_is_said() {
    let dir = scratch();
    let d = dir.path();
    for (kind, name) in [
        ("raw", "a.raw"),
        ("vdi", "a.vdi"),
        ("vdi --variant fixed", "f.vdi"),
        ("vhd", "a.vhd"),
        ("parallels", "a.hdd"),
        ("vmdk --variant flat", "f.vmdk"),
    ] {
        let model = image(d, kind, name, 9 * MIB, 3);
        io_ok(d, name, &["write -z 5M 4M", "write -P 9 6M 512", "write -P 5 512 512"]);
        let before = fs::read(d.join(name)).expect("read");
        let line = fails(d, 1, &format!("resize {name} 5M"));
        assert!(line.contains("data behind the new end, the first at byte 6291456"), "{line}");
        assert!(line.contains("--shrink"), "{line}");
        assert!(fs::read(d.join(name)).expect("read") == before, "{kind}: it was touched");
        ok(d, &format!("resize {name} 7M"));
        check_clean(d, name);
        ok(d, &format!("resize --shrink {name} 4608K"));
        check_clean(d, name);
        // What was given up does not come back.
        ok(d, &format!("resize {name} 9M"));
        let mut left = of_size(&model[..4608 << 10], 9 * MIB);
        left[512..1024].fill(5);
        assert!(contents(d, name) == left, "{kind}");
        check_clean(d, name);
        fs::remove_file(d.join(name)).expect("remove");
    }
}

#[test]
fn what_cannot_be_is_refused_with_one_line() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 8M a.vdi");
    ok(d, "create --format vhd --variant fixed --size 8M f.vhd");
    ok(d, "create --format qcow2 --size 8M a.qcow2");
    ok(d, "create --format vmdk --size 8M a.vmdk");
    ok(d, "create --format vmdk --variant split2g --size 8M s.vmdk");
    ok(d, "create --format vdi --size 8M parent.vdi");
    ok(d, "create --format vdi --parent parent.vdi child.vdi");
    for (args, says) in [
        ("resize a.vdi 1000", "a.vdi: a disk would have 1000 bytes: the size must be a multiple of 512"),
        ("resize a.vdi 0", "0 bytes"),
        ("resize a.vdi 5P", "more than"),
        ("resize a.vdi +4P", "more than"),
        ("resize f.vhd 9M", "fixed VHD"),
        ("resize a.qcow2 4M", "smaller is not supported"),
        ("resize a.vmdk 4M", "smaller is not supported"),
        ("resize s.vmdk 9M", "in pieces of 2 GB"),
        ("resize parent.vdi 9M", "is the parent of"),
        ("resize none.vdi 9M", "none.vdi"),
    ] {
        let line = fails(d, 1, args);
        assert!(line.contains(says), "{args}: {line}");
    }
    fails(d, 2, "resize a.vdi much");
    let _held = Holder::new(d, "a.qcow2");
    let line = fails(d, 1, "resize a.qcow2 9M");
    assert!(line.contains("a.qcow2"), "{line}");
}

/// A table that becomes too long for its place goes to another one, and blocks that stand there move.
#[test]
fn long_tables_find_a_place_of_their_own() {
    let dir = scratch();
    let d = dir.path();
    for (kind, name) in [
        // the first move of the table is to before where it was, the second behind that
        ("vdi --option AllocationBlockSize=4k", "a.vdi"),
        ("vhd --option block_size=4k", "a.vhd"),
        ("parallels --option cluster_size=4k", "a.hdd"),
        ("vmdk --option grain_size=4k", "a.vmdk"),
        ("qcow2 --option cluster_size=512", "a.qcow2"),
    ] {
        let model = image(d, kind, name, 2 * MIB, 11);
        for size in [16 * MIB, 128 * MIB, 1 << 30, 3 << 30] {
            ok(d, &format!("resize {name} {size}"));
            check_no_damage(d, name);
        }
        ok(d, &format!("repair {name}"));
        check_clean(d, name);
        let head = of_size(&model, 2 * MIB);
        fs::write(d.join("head.raw"), &head).expect("write");
        fs::File::options()
            .write(true)
            .open(d.join("head.raw"))
            .expect("open")
            .set_len(3 << 30)
            .expect("grow");
        ok(d, &format!("compare head.raw {name}"));
        fs::remove_file(d.join(name)).expect("remove");
        fs::remove_file(d.join("head.raw")).expect("remove");
    }
}

/// Leaks are what a table may leave where it was.
fn check_no_damage(d: &Path, name: &str) {
    let out = run(d, &format!("check {name}"));
    assert!(matches!(out.status.code(), Some(0 | 3)), "{name}: {}", text(&out.stdout));
}

#[test]
fn killed_at_any_moment_it_has_the_old_size_or_the_new_and_is_completed() {
    let dir = scratch();
    let d = dir.path();
    let model = image(d, "vdi --option AllocationBlockSize=4k", "s.vdi", 24 * MIB, 5);
    // a table right behind the header, so that many blocks have to move
    ok(d, "resize s.vdi 900M");
    let (old, new) = (900 * MIB, 4u64 << 30);
    let mut seen = [0; 2];
    for n in 0..12 {
        fs::copy(d.join("s.vdi"), d.join("a.vdi")).expect("copy");
        let mut child = vdimg(d, &format!("resize a.vdi {new}")).spawn().expect("start vdimg");
        std::thread::sleep(std::time::Duration::from_micros(700 * n * n));
        let _ = child.kill();
        child.wait().expect("wait");
        let info = ok(d, "info --output json a.vdi");
        let is = [old, new].map(|s| info.contains(&format!("{s},")));
        assert!(is[0] != is[1], "{info}");
        seen[usize::from(is[1])] += 1;
        check_no_damage(d, "a.vdi");
        ok(d, &format!("resize --lock-wait 5 a.vdi {new}"));
        check_no_damage(d, "a.vdi");
        io_ok(d, "a.vdi", &["read 0 24M", "read -P 0 24M 1M"]);
    }
    println!("old size {} times, new size {} times", seen[0], seen[1]);
    ok(d, "resize --shrink a.vdi 24M");
    assert!(contents(d, "a.vdi") == model);
}

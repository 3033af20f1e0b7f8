//! What VirtualBox's long jobs do wrong (numbers of the list of its known bugs), done right.

mod vdimg_support;

use std::fs;
use vdimg_support::*;

/// Bug 1: VirtualBox enlarges a monolithicSparse VMDK in its header alone: the descriptor, and so the disk, stay as they were, and
/// success is reported.
#[test]
fn bug_1_a_sparse_vmdk_is_enlarged_in_descriptor_and_header() {
    let dir = scratch();
    let d = dir.path();
    let size = 8 * MIB;
    random_raw(&d.join("s.raw"), size, &mut Rng(1));
    ok(d, "convert --output-format vmdk s.raw a.vmdk");
    ok(d, "resize a.vmdk 100G");
    let bytes = fs::read(d.join("a.vmdk")).expect("read");
    let sectors = (100u64 << 30) / 512;
    assert_eq!(bytes[12..20], sectors.to_le_bytes(), "the header's capacity");
    let descriptor = String::from_utf8_lossy(&bytes[512..21 * 512]);
    assert!(descriptor.contains(&format!("RW {sectors} SPARSE \"a.vmdk\"")), "{descriptor}");
    let info = ok(d, "info --output json a.vmdk");
    assert!(info.contains(&(100u64 << 30).to_string()), "{info}");
    io_ok(d, "a.vmdk", &["write -P 3 99G 64k", "read -P 3 99G 64k", "read -P 0 8M 1M"]);
    ok(d, "check a.vmdk");
    if has("qemu-img") {
        let info = tool(d, "qemu-img", "info a.vmdk");
        assert!(info.contains(&format!("({} bytes)", 100u64 << 30)), "{info}");
    }
    ok(d, "resize --lock-wait 5 a.vmdk +0");
    let file = fs::File::options().write(true).open(d.join("s.raw")).expect("open");
    file.set_len(100 << 30).expect("grow");
    io_ok(d, "a.vmdk", &["write -z 99G 64k"]);
    ok(d, "compare s.raw a.vmdk");
}

/// Bug 2: compacting a differencing VHD kills VirtualBox's service.
#[test]
fn bug_2_a_differencing_vhd_is_compacted() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vhd --size 32M base.vhd");
    io_ok(d, "base.vhd", &["write -P 5 0 32M"]);
    ok(d, "create --format vhd --parent base.vhd diff.vhd");
    let new = fs::metadata(d.join("diff.vhd")).expect("metadata").len();
    // Blocks of their own, then of these some as the parent has them again, and zeros over the parent's bytes.
    io_ok(d, "diff.vhd", &["write -P 1 0 20M", "write -P 5 4M 12M", "write -P 0 24M 4M"]);
    ok(d, "compact diff.vhd");
    let now = fs::metadata(d.join("diff.vhd")).expect("metadata").len();
    assert!((12 << 20..(12 << 20) + 65536).contains(&(now - new)), "{new} bytes, {now} now");
    io_ok(
        d,
        "diff.vhd",
        &["read -P 1 0 4M", "read -P 5 4M 12M", "read -P 1 16M 4M", "read -P 5 20M 4M", "read -P 0 24M 4M"],
    );
    let out = run(d, "check diff.vhd");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stdout));
}

/// Bug 21: behind the end of its base VirtualBox answers reads of an enlarged diff with errors, and cannot clone it.
#[test]
fn bug_21_an_enlarged_diff_reads_zeros_behind_its_base() {
    let dir = scratch();
    let d = dir.path();
    for (format, ext) in
        [("vdi", "vdi"), ("vhd", "vhd"), ("vmdk", "vmdk"), ("qcow2", "qcow2"), ("parallels", "hdd")]
    {
        let mut model = random_raw(&d.join("s.raw"), 16 * MIB, &mut Rng(21));
        ok(d, "convert --output-format vdi s.raw base.vdi");
        let diff = format!("diff.{ext}");
        ok(d, &format!("create --format {format} --parent base.vdi {diff}"));
        let opened = format!("--parent base.vdi {diff}");
        io_ok(d, &opened, &["write -P 1 3M 1M"]);
        model[3 << 20..4 << 20].fill(1);
        ok(d, &format!("resize {opened} 32M"));
        model.resize(32 << 20, 0);
        io_ok(d, &opened, &["read -P 0 16M 16M", "write -P 2 20M 64k", "read -P 2 20M 64k"]);
        model[20 << 20..(20 << 20) + (64 << 10)].fill(2);
        ok(d, &format!("convert --output-format raw {opened} clone.raw"));
        assert!(fs::read(d.join("clone.raw")).expect("read") == model, "{format}");
        ok(d, &format!("check {diff}"));
        for name in ["s.raw", "base.vdi", &diff, "clone.raw"] {
            fs::remove_file(d.join(name)).expect("remove");
        }
    }
}

/// The other way round: what a smaller diff hides of a larger parent must not come to light.
#[test]
fn bug_21_a_diff_below_a_larger_parent_is_not_enlarged() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 16M base.vdi");
    io_ok(d, "base.vdi", &["write -P 7 0 16M"]);
    ok(d, "create --format vdi --size 8M --parent base.vdi diff.vdi");
    let line = fails(d, 1, "resize --parent base.vdi diff.vdi 12M");
    assert!(line.contains("base.vdi is larger"), "{line}");
    ok(d, "resize --parent base.vdi diff.vdi 4M");
    io_ok(d, "--parent base.vdi diff.vdi", &["read -P 7 0 4M"]);
}

/// The value of a key of `vdimg info --output json`, as text.
fn said(d: &std::path::Path, image: &str, key: &str) -> Option<String> {
    let info = ok(d, &format!("info --output json {image}"));
    let from = info.find(&format!("\"{key}\": \""))? + key.len() + 5;
    info[from..].split('"').next().map(str::to_string)
}

/// Bug 9: after a merge VirtualBox leaves the child's parent-modification UUID stale, or the base's modification UUID as it was
/// although its bytes are others.
#[test]
fn bug_9_a_merge_leaves_modification_uuids_right() {
    for format in ["vdi", "vmdk"] {
        for (from, into, child) in [("m", "b", "t"), ("b", "m", "t")] {
            let dir = scratch();
            let d = dir.path();
            let name = |n: &str| format!("{n}.{format}");
            ok(d, &format!("create --format {format} --size 8M {}", name("b")));
            io_ok(d, &name("b"), &["write -P 1 0 8M"]);
            ok(d, &format!("create --format {format} --parent {} {}", name("b"), name("m")));
            io_ok(d, &name("m"), &["write -P 2 1M 1M"]);
            let named = format!("--parent {} --parent {}", name("b"), name("m"));
            ok(d, &format!("create --format {format} {named} {}", name("t")));
            io_ok(d, &name("t"), &["write -P 3 2M 1M"]);
            let before = said(d, &name(into), "modification_uuid").expect("a UUID");
            ok(d, &format!("merge {} --from {} --into {}", name("t"), name(from), name(into)));
            let now = said(d, &name(into), "modification_uuid");
            assert_ne!(now.as_deref(), Some(&*before), "{format}: its bytes are others");
            assert_eq!(said(d, &name(child), "parent_modification_uuid"), now, "{format}");
            assert_eq!(said(d, &name(child), "parent_uuid"), said(d, &name(into), "uuid"), "{format}");
            let out = io(
                d,
                &name("t"),
                &["read -P 1 0 1M", "read -P 2 1M 1M", "read -P 3 2M 1M", "read -P 1 3M 5M"],
            );
            assert!(out.status.success() && out.stderr.is_empty(), "{format}: {}", text(&out.stderr));
        }
    }
}

/// The other half of it: chains that VirtualBox has merged are read, with a warning.
#[test]
fn bug_9_a_stale_parent_modification_uuid_is_told_and_no_error() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 8M b.vdi");
    ok(d, "create --format vdi --parent b.vdi t.vdi");
    // As after a merge by VirtualBox into the base: its modification UUID is another than the child says.
    io_ok(d, "--allow-write-to-parent b.vdi", &["write -P 1 0 8M"]);
    let out = io(d, "t.vdi", &["read -P 1 0 8M"]);
    assert!(out.status.success() && text(&out.stderr).contains("was changed since"), "{}", text(&out.stderr));
    ok(d, "merge t.vdi");
    io_ok(d, "b.vdi", &["read -P 1 0 8M"]);
}

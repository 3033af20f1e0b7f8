//! `vdimg compact`: what is given back, and that the disk shows the same.

mod vdimg_support;

use std::fs;
use std::path::Path;
use vdimg_support::*;

fn len(d: &Path, name: &str) -> u64 {
    fs::metadata(d.join(name)).expect("metadata").len()
}

fn check_clean(d: &Path, name: &str) {
    let out = run(d, &format!("check {name}"));
    assert_eq!(out.status.code(), Some(0), "{name}: {}", text(&out.stdout));
}

/// Formats that are compacted, and a block of each in MiB.
const FORMATS: [(&str, &str, u64); 4] =
    [("vdi", "a.vdi", 1), ("vhd", "a.vhd", 2), ("vmdk", "a.vmdk", 1), ("parallels", "a.hdd", 1)];

#[test]
fn blocks_of_zeros_are_given_back() {
    let dir = scratch();
    let d = dir.path();
    // Parallels images do not say whether they have a parent.
    for (format, name, block) in FORMATS.into_iter().filter(|f| f.0 != "parallels") {
        let mut model = vec![0; 24 << 20];
        Rng(block).fill(&mut model);
        fs::write(d.join("s.raw"), &model).expect("write");
        ok(d, &format!("convert --output-format {format} s.raw {name}"));
        let full = len(d, name);
        // Zeros as a guest writes them: data.
        io_ok(d, name, &["write -P 1 4M 16M", "write -P 0 4M 16M", "write -P 9 10M 512"]);
        model[4 << 20..20 << 20].fill(0);
        model[10 << 20..(10 << 20) + 512].fill(9);
        fs::write(d.join("s.raw"), &model).expect("write");
        ok(d, &format!("compact {name}"));
        check_clean(d, name);
        ok(d, &format!("compare s.raw {name}"));
        let now = len(d, name);
        assert!(now + (14 << 20) <= full && now >= (8 << 20) + (block << 20) / 16, "{format}: {full} {now}");
        let said = ok(d, &format!("compact {name}"));
        assert!(said.starts_with(&format!("{name}: ")), "{said}");
        assert_eq!(len(d, name), now, "{format}: nothing more to give back");
        if has("qemu-img") {
            let format = if format == "vhd" { "vpc" } else { format };
            tool(d, "qemu-img", &format!("compare -f raw -F {format} s.raw {name}"));
        }
        fs::remove_file(d.join(name)).expect("remove");
    }
}

#[test]
fn a_diff_keeps_no_block_that_is_equal_to_its_parents() {
    let dir = scratch();
    let d = dir.path();
    for (format, name, _) in FORMATS {
        let mut model = vec![0; 12 << 20];
        Rng(3).fill(&mut model[..8 << 20]);
        fs::write(d.join("s.raw"), &model).expect("write");
        ok(d, "convert --output-format vdi s.raw base.vdi");
        ok(d, &format!("create --format {format} --parent base.vdi --size 16M {name}"));
        let empty = len(d, name);
        let chain = format!("--parent base.vdi {name}");
        // Written over with something else, and then with what was there.
        io_ok(d, &chain, &["write -P 5 0 16M"]);
        io_ok(d, &chain, &["write -P 0 8M 8M"]);
        ok(d, &format!("compact {chain}"));
        check_clean(d, name);
        io_ok(d, &chain, &["read -P 5 0 8M", "read -P 0 8M 8M"]);
        let now = len(d, name);
        assert!(now < empty + (9 << 20), "{format}: {now}");
        io_ok(d, &chain, &["write -P 0 0 8M"]);
        ok(d, &format!("compact {chain}"));
        io_ok(d, &chain, &["read -P 0 0 16M"]);
        check_clean(d, name);
        fs::remove_file(d.join(name)).expect("remove");
        fs::remove_file(d.join("base.vdi")).expect("remove");
    }
}

#[test]
fn what_cannot_be_is_refused_with_one_line() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format qcow2 --size 8M a.qcow2");
    ok(d, "create --format raw --size 8M a.raw");
    ok(d, "create --format vdi --size 8M base.vdi");
    ok(d, "create --format vdi --parent base.vdi diff.vdi");
    ok(d, "create --format parallels --size 8M a.hdd");
    let line = fails(d, 1, "compact a.hdd");
    assert!(line.contains("may be a differencing image"), "{line}");
    for name in ["a.qcow2", "a.raw"] {
        let line = fails(d, 1, &format!("compact {name}"));
        assert!(line.contains("not supported"), "{line}");
    }
    fs::rename(d.join("base.vdi"), d.join("base.gone")).expect("rename");
    let line = fails(d, 1, "compact diff.vdi");
    assert!(line.contains("was not found"), "{line}");
    fs::rename(d.join("base.gone"), d.join("base.vdi")).expect("rename");
    let held = Holder::new(d, "base.vdi --read-only");
    ok(d, "compact diff.vdi");
    drop(held);
    let _held = Holder::new(d, "diff.vdi");
    fails(d, 1, "compact diff.vdi");
}

#[test]
fn killed_at_any_moment_it_shows_the_same_and_is_completed() {
    let dir = scratch();
    let d = dir.path();
    ok(d, "create --format vdi --size 32M --option AllocationBlockSize=4k full.vdi");
    io_ok(d, "full.vdi", &["write -P 1 0 32M"]);
    // Over blocks that have a place zeros are data.
    let full = len(d, "full.vdi");
    let zeros: Vec<String> =
        (0..8192u64).step_by(3).map(|n| format!("write -P 0 {} 4096", n * 4096)).collect();
    io_ok(d, "full.vdi", &zeros.iter().map(String::as_str).collect::<Vec<_>>());
    let mut expected = vec![1u8; 32 << 20];
    expected.chunks_mut(4096).step_by(3).for_each(|b| b.fill(0));
    fs::write(d.join("s.raw"), &expected).expect("write");
    for n in 0..10 {
        fs::copy(d.join("full.vdi"), d.join("a.vdi")).expect("copy");
        let mut child =
            vdimg(d, "compact a.vdi").stdout(std::process::Stdio::null()).spawn().expect("start vdimg");
        std::thread::sleep(std::time::Duration::from_micros(1500 * n * n));
        let _ = child.kill();
        child.wait().expect("wait");
        ok(d, "compare --lock-wait 5 s.raw a.vdi");
        ok(d, "compact --lock-wait 5 a.vdi");
        ok(d, "compare s.raw a.vdi");
        check_clean(d, "a.vdi");
        assert!(len(d, "a.vdi") < full - (10 << 20));
    }
}

//! `vdimg diff`, `cat`, `dd`, `bench`, `clone` and `formats`, held against the bytes that were written.

mod vdimg_support;

use serde_json::Value;
use std::path::Path;
use vdimg_support::{KIB, MIB, Rng, fails, has, io_ok, ok, random_raw, run, scratch};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The ranges that `diff` tells, by its exit status, its text and its JSON.
fn diff(dir: &Path, args: &str) -> Vec<(u64, u64)> {
    let out = run(dir, &format!("diff {args}"));
    let lines = vdimg_support::text(&out.stdout);
    let number = |t: &str| t.parse::<u64>().expect(t);
    let ranges: Vec<_> =
        lines.lines().filter_map(|l| l.split_once(' ')).map(|(a, b)| (number(a), number(b.trim()))).collect();
    assert_eq!(out.status.code(), Some(i32::from(!ranges.is_empty())), "{args}");
    let as_json = json(&vdimg_support::text(&run(dir, &format!("diff --output json {args}")).stdout));
    let of = |v: &Value| (v["start"].as_u64().expect("start"), v["length"].as_u64().expect("length"));
    assert_eq!(as_json.as_array().expect("a list").iter().map(of).collect::<Vec<_>>(), ranges);
    ranges
}

/// Runs of sectors in which two disks differ.
fn model_diff(a: &[u8], b: &[u8]) -> Vec<(u64, u64)> {
    let len = a.len().max(b.len());
    let sector = |d: &[u8], n: usize| {
        let mut own = d.iter().skip(n).take(512).copied().collect::<Vec<_>>();
        own.resize(512, 0);
        own
    };
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for n in (0..len).step_by(512).filter(|n| sector(a, *n) != sector(b, *n)) {
        match runs.last_mut() {
            Some((start, len)) if *start + *len == n as u64 => *len += 512,
            _ => runs.push((n as u64, 512)),
        }
    }
    runs
}

#[test]
fn diff_tells_every_sector_that_differs_and_no_other() {
    let dir = scratch();
    let dir = dir.path();
    for seed in 0..6 {
        let (a_raw, b_raw) = (format!("a{seed}.raw"), format!("b{seed}.raw"));
        let mut rng = Rng(seed);
        let a = random_raw(&dir.join(&a_raw), 5 * MIB + 512 * seed, &mut rng);
        let b = random_raw(&dir.join(&b_raw), 5 * MIB, &mut rng);
        ok(dir, &format!("convert {a_raw} --output-format vdi a{seed}.vdi"));
        ok(dir, &format!("convert {b_raw} --output-format qcow2 b{seed}.qcow2"));
        assert_eq!(diff(dir, &format!("a{seed}.vdi b{seed}.qcow2")), model_diff(&a, &b), "seed {seed}");
        assert!(diff(dir, &format!("a{seed}.vdi {a_raw}")).is_empty());
    }
    // two points of a chain
    ok(dir, "create --format vdi --parent a0.vdi top.vdi");
    assert!(diff(dir, "a0.vdi top.vdi").is_empty());
    io_ok(dir, "top.vdi", &["write -z 1M 512", "write -P 3 2M 1024", "write -P 3 5119k 512"]);
    let mut a = std::fs::read(dir.join("a0.raw")).unwrap();
    let b = a.clone();
    a[MIB as usize..][..512].fill(0);
    a[2 * MIB as usize..][..1024].fill(3);
    a[5119 * KIB as usize..][..512].fill(3);
    assert_eq!(diff(dir, "a0.vdi top.vdi"), model_diff(&a, &b));
    assert_eq!(run(dir, "diff a0.vdi nothing.vdi").status.code(), Some(2));
}

#[test]
fn cat_and_dd_take_bytes_out() {
    let dir = scratch();
    let dir = dir.path();
    let model = random_raw(&dir.join("a.raw"), 3 * MIB, &mut Rng(3));
    ok(dir, "convert a.raw --output-format vmdk a.vmdk");
    assert_eq!(run(dir, "cat a.vmdk").stdout, model);
    for (at, len) in [(0usize, 1usize), (511, 2), (513, 1 << 20), (1_000_000, 2_000_000)] {
        let got = run(dir, &format!("cat a.vmdk --offset {at} --length {len}")).stdout;
        assert!(got == model[at..at + len], "{at} {len}");
    }
    assert!(fails(dir, 1, "cat a.vmdk --offset 4M").contains("behind the end"));
    assert!(fails(dir, 1, "cat a.vmdk --partition 1").contains("partition"));
    ok(dir, "dd if=a.vmdk of=x.qcow2 -O qcow2 bs=1000 skip=3 count=100");
    let mut expected = model[3000..103_000].to_vec();
    expected.resize(expected.len().next_multiple_of(512), 0);
    assert_eq!(run(dir, "cat x.qcow2").stdout, expected);
    ok(dir, "dd if=a.vmdk of=tail.raw bs=1M skip=2");
    assert_eq!(std::fs::read(dir.join("tail.raw")).unwrap(), &model[2 * MIB as usize..]);
    for (args, expected) in [
        ("dd if=a.vmdk of=n.raw bs=1M skip=3", "none is left"),
        ("dd if=a.vmdk of=n.raw bs=0", "0 bytes"),
        ("dd if=a.vmdk", "of=FILE"),
        ("dd if=a.vmdk of=n.raw conv=sync", "unknown operand 'conv'"),
        ("dd if=a.vmdk of=tail.raw", "exists"),
    ] {
        let line = fails(dir, 1, args);
        assert!(line.contains(expected), "{args}: {line}");
        assert!(!dir.join("n.raw").exists(), "{args}");
    }
    if has("sfdisk") {
        std::fs::write(dir.join("table"), "label: gpt\nstart=2048, size=100\nstart=3000, size=8\n").unwrap();
        std::fs::File::create(dir.join("p.raw")).unwrap().set_len(4 * MIB).unwrap();
        let made =
            std::process::Command::new("sh").current_dir(dir).args(["-c", "sfdisk -q p.raw <table"]).status();
        assert!(made.unwrap().success());
        ok(dir, "convert p.raw --output-format vdi p.vdi");
        io_ok(dir, "p.vdi", &["write -P 9 1500k 4k"]);
        assert_eq!(run(dir, "cat p.vdi --partition 2").stdout, vec![9; 4096]);
        assert_eq!(run(dir, "cat p.vdi --partition 1").stdout.len(), 51_200);
    }
}

#[test]
fn bench_reads_and_writes_what_it_says() {
    let dir = scratch();
    let dir = dir.path();
    ok(dir, "create --format qcow2 --size 1M a.qcow2");
    let told = ok(dir, "bench -c 100 -d 8 a.qcow2");
    assert!(told.contains("Sending 100 read requests, 4096 bytes each, 8 in parallel"), "{told}");
    assert!(told.contains("requests/s") && told.contains("latency"), "{told}");
    let told = json(&ok(
        dir,
        "bench -w --pattern 5 -c 10 -d 3 -s 8k -S 64k -o 4k --flush-interval 4 --output json a.qcow2",
    ));
    assert_eq!((told["requests"].as_u64(), told["operation"].as_str()), (Some(10), Some("write")));
    assert!(told["latency_us"]["p50"].as_f64() <= told["latency_us"]["max"].as_f64());
    let mut model = vec![0u8; MIB as usize];
    (0..10).for_each(|n| model[4096 + n * 65536..][..8192].fill(5));
    assert_eq!(run(dir, "cat a.qcow2").stdout, model);
    ok(dir, "check a.qcow2");
    for args in ["-s 2M", "-s 100", "-d 0", "-d 257", "-o 1M"] {
        fails(dir, 1, &format!("bench {args} a.qcow2"));
    }
}

#[test]
fn a_clone_is_the_same_but_for_its_uuids() {
    let dir = scratch();
    let dir = dir.path();
    random_raw(&dir.join("a.raw"), 3 * MIB, &mut Rng(4));
    for (how, name) in [
        ("vdi --option AllocationBlockSize=64k", "a.vdi"),
        ("vdi --variant fixed", "f.vdi"),
        ("vmdk --variant split2g-flat", "s.vmdk"),
        ("vhd --variant fixed", "f.vhd"),
        ("qcow2 --option cluster_size=4k --option compat=0.10", "q.qcow2"),
        ("vhdx", "a.vhdx"),
    ] {
        ok(dir, &format!("convert a.raw --output-format {how} {name}"));
        let (_, extension) = name.split_once('.').unwrap();
        let clone = format!("clone-{name}.{extension}");
        ok(dir, &format!("clone {name} {clone}"));
        ok(dir, &format!("compare {name} {clone}"));
        let info = |f: &str| json(&ok(dir, &format!("info --output json {f}")));
        let (a, b) = (info(name), info(&clone));
        for key in ["format", "variant", "virtual_size", "block_size", "version"] {
            assert_eq!(a[key], b[key], "{name}: {key}");
        }
        assert!(a["uuid"].is_null() || a["uuid"] != b["uuid"], "{name}");
    }
    assert!(fails(dir, 1, "clone a.vdi f.vdi").contains("exists"));
}

#[test]
fn formats_and_chains_are_listed_for_programs() {
    let dir = scratch();
    let dir = dir.path();
    let all = json(&ok(dir, "formats --output json"));
    let vdi = all.as_array().unwrap().iter().find(|f| f["format"] == "vdi").expect("VDI");
    assert!(vdi["capabilities"].as_array().unwrap().len() > 5, "{vdi}");
    assert_eq!(vdi["extensions"][0]["extension"], "vdi");
    assert!(ok(dir, "formats").contains("VDI: --format vdi"));
    ok(dir, "create --format vdi --size 2M a.vdi");
    ok(dir, "create --format vdi --parent a.vdi b.vdi");
    ok(dir, "create --format qcow2 --parent a.vdi --parent b.vdi c.qcow2");
    let chain = json(&ok(dir, "info --backing-chain --output json c.qcow2"));
    let files: Vec<_> = chain.as_array().unwrap().iter().map(|i| i["file"].as_str().unwrap()).collect();
    assert!(files.len() == 3 && files[0].ends_with("c.qcow2") && files[2].ends_with("a.vdi"), "{files:?}");
    assert_eq!(chain[1]["chain"].as_array().unwrap().len(), 2);
    assert_eq!(ok(dir, "info --chain c.qcow2").matches("virtual size").count(), 3);
}

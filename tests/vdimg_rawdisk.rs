//! VMDKs that describe disks of the host: what a guest sees of them, and that nothing opens one without being told to.

mod vdimg_support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vdimg_support::*;

const SECTORS: u64 = 24 << 10;

fn sectors(start: u64, len: u64) -> std::ops::Range<usize> {
    (start * 512) as usize..((start + len) * 512) as usize
}

fn table(disk: &mut [u8], at: u64, entries: &[(u8, u32, u32)]) {
    let s = &mut disk[sectors(at, 1)];
    s[446..510].fill(0);
    for (i, (kind, start, len)) in entries.iter().enumerate() {
        s[450 + 16 * i] = *kind;
        s[454 + 16 * i..458 + 16 * i].copy_from_slice(&start.to_le_bytes());
        s[458 + 16 * i..462 + 16 * i].copy_from_slice(&len.to_le_bytes());
    }
    s[510..].copy_from_slice(&[0x55, 0xaa]);
}

/// A disk full of bytes that are not zeros with two primary partitions (1, 4) and two logical ones (5, 6).
fn with_mbr() -> Vec<u8> {
    let mut disk = full();
    table(&mut disk, 0, &[(0x83, 2048, 4096), (0, 0, 0), (5, 8192, 12000), (7, 22000, 2576)]);
    table(&mut disk, 8192, &[(0x83, 63, 4000), (5, 6000, 6000)]);
    table(&mut disk, 14192, &[(0x82, 63, 5000)]);
    disk
}

fn full() -> Vec<u8> {
    let mut rng = Rng(7);
    (0..SECTORS * 64).flat_map(|_| (rng.next() | 0x0101_0101_0101_0101).to_le_bytes()).collect()
}

fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum().to_le_bytes()
}

/// The same with a GPT: partitions 1 and 3.
fn with_gpt() -> Vec<u8> {
    let mut disk = full();
    table(&mut disk, 0, &[(0xee, 1, u32::MAX)]);
    let mut entries = vec![0; 128 * 128];
    for (number, start, last) in [(0, 2048u64, 8191u64), (2, 10000, 19999)] {
        let e = &mut entries[number * 128..][..128];
        e[..32].fill(0x11);
        e[32..40].copy_from_slice(&start.to_le_bytes());
        e[40..48].copy_from_slice(&last.to_le_bytes());
    }
    for (own, other, at) in [(1, SECTORS - 1, 2), (SECTORS - 1, 1, SECTORS - 33)] {
        let mut h = [b"EFI PART".to_vec(), vec![0, 0, 1, 0, 92, 0, 0, 0]].concat();
        h.resize(512, 0);
        for (place, word) in [(24, own), (32, other), (40, 34), (48, SECTORS - 34), (72, at)] {
            h[place..place + 8].copy_from_slice(&word.to_le_bytes());
        }
        h[80..88].copy_from_slice(&[128, 0, 0, 0, 128, 0, 0, 0]);
        h[88..92].copy_from_slice(&crc(&entries));
        let sum = crc(&h[..92]);
        h[16..20].copy_from_slice(&sum);
        disk[sectors(own, 1)].copy_from_slice(&h);
        disk[sectors(at, 32)].copy_from_slice(&entries);
    }
    disk
}

/// What is seen of a disk if only these sectors are.
fn only(disk: &[u8], seen: &[(u64, u64)]) -> Vec<u8> {
    let mut all = vec![0; disk.len()];
    seen.iter().for_each(|(s, n)| all[sectors(*s, *n)].copy_from_slice(&disk[sectors(*s, *n)]));
    all
}

fn content(d: &Path, image: &str) -> Vec<u8> {
    ok(d, &format!("convert --allow-raw-device --output-format raw {image} content.raw"));
    let bytes = fs::read(d.join("content.raw")).expect("read");
    fs::remove_file(d.join("content.raw")).expect("remove");
    bytes
}

const CREATE: &str = "create --format vmdk --variant rawdisk --raw-device";

#[test]
fn a_whole_disk_is_read_and_written() {
    let dir = scratch();
    let d = dir.path();
    let mut disk = full();
    fs::write(d.join("disk.img"), &disk).expect("write");
    ok(d, &format!("{CREATE} disk.img a.vmdk"));
    let text = fs::read_to_string(d.join("a.vmdk")).expect("read");
    let line = format!("RW {SECTORS} FLAT \"{}\" 0\n", d.join("disk.img").display());
    assert!(text.contains(&line) && text.contains("createType=\"fullDevice\""), "{text}");
    assert!(content(d, "a.vmdk") == disk);
    io_ok(d, "--allow-raw-device a.vmdk", &["write -P 9 1M 64k", "discard 2M 64k", "write -z 2M 64k"]);
    disk[1 << 20..(1 << 20) + 65536].fill(9);
    disk[2 << 20..(2 << 20) + 65536].fill(0);
    assert!(fs::read(d.join("disk.img")).expect("read") == disk, "and that is the disk");
    ok(d, "check --allow-raw-device a.vmdk");
    ok(d, "repair --allow-raw-device a.vmdk");
    ok(d, &format!("{CREATE} disk.img --raw-read-only r.vmdk"));
    let out = io(d, "--allow-raw-device r.vmdk", &["write 0 512"]);
    assert!(text_of(&out.stderr).contains("only to be read"), "{}", text_of(&out.stderr));
    assert!(content(d, "r.vmdk") == disk);
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn chosen_partitions_are_seen_and_nothing_else() {
    let dir = scratch();
    let d = dir.path();
    let mbr = [(0, 2048), (8192, 1), (14192, 1)];
    let gpt = [(0, 34), (SECTORS - 33, 33)];
    for (disk, chosen, tables, parts) in [
        (with_mbr(), "1,6", &mbr[..], &[(2048, 4096), (14255, 5000)][..]),
        (with_mbr(), "5", &mbr[..], &[(8255, 4000)]),
        (with_mbr(), "4,1,6,5", &mbr[..], &[(2048, 4096), (8255, 4000), (14255, 5000), (22000, 2576)]),
        (with_gpt(), "3", &gpt[..], &[(10000, 10000)]),
        (with_gpt(), "1,3", &gpt[..], &[(2048, 6144), (10000, 10000)]),
    ] {
        fs::write(d.join("disk.img"), &disk).expect("write");
        ok(d, &format!("{CREATE} disk.img --partitions {chosen} a.vmdk"));
        let mut seen = only(&disk, &[tables, parts].concat());
        assert!(content(d, "a.vmdk") == seen, "{chosen}");
        let info = ok(d, "info --allow-raw-device a.vmdk");
        assert!(info.contains("vmdk, rawdisk"), "{info}");
        // the table is the image's own, a partition is the disk's, and what is hidden forgets
        let (first, hidden) = (parts[0].0 * 512, (parts[0].0 + parts[0].1) * 512);
        let in_first = format!("write -P 6 {first} 4k");
        let hidden_write = format!("write -P 5 {hidden} 4k");
        let hidden_read = format!("read -P 0 {hidden} 512");
        let commands =
            ["write -P 7 0 512", &in_first, &hidden_write, &hidden_read, "flush", "read -P 7 0 512"];
        io_ok(d, "--allow-raw-device a.vmdk", &commands);
        let mut now = disk.clone();
        for all in [&mut now, &mut seen] {
            all[first as usize..first as usize + 4096].fill(6);
        }
        seen[..512].fill(7);
        assert!(fs::read(d.join("disk.img")).expect("read") == now, "{chosen}: nothing else of the disk");
        assert!(content(d, "a.vmdk") == seen, "{chosen}");
        ["a.vmdk", "a-pt.vmdk"].iter().for_each(|f| fs::remove_file(d.join(f)).expect("remove"));
    }
}

#[test]
fn areas_may_be_read_only_and_have_devices_of_their_own() {
    let dir = scratch();
    let d = dir.path();
    let disk = with_mbr();
    fs::write(d.join("disk.img"), &disk).expect("write");
    fs::write(d.join("disk.img1"), &disk[sectors(2048, 4096)]).expect("write");
    fs::write(d.join("disk.img6"), &disk[sectors(14255, 5000)]).expect("write");
    ok(d, &format!("{CREATE} disk.img --partitions 1,6:ro --relative a.vmdk"));
    let text = fs::read_to_string(d.join("a.vmdk")).expect("read");
    for line in ["RW 4096 FLAT", "disk.img1\" 0\n", "RDONLY 5000 FLAT", "disk.img6\" 0\n"] {
        assert!(text.contains(line), "{text}");
    }
    assert!(!text.contains("disk.img\""), "{text}");
    let seen = only(&disk, &[(0, 2048), (8192, 1), (14192, 1), (2048, 4096), (14255, 5000)]);
    assert!(content(d, "a.vmdk") == seen);
    io_ok(d, "--allow-raw-device a.vmdk", &["write -P 3 1M 4k"]);
    let out = io(d, "--allow-raw-device a.vmdk", &[&format!("write -P 3 {} 4k", 14255 * 512)]);
    assert_eq!(out.status.code(), Some(1));
    let now = fs::read(d.join("disk.img1")).expect("read");
    assert!(now[..4096] == [3; 4096] && now[4096..] == disk[sectors(2048, 4096)][4096..]);
    assert!(fs::read(d.join("disk.img6")).expect("read") == disk[sectors(14255, 5000)]);
    assert!(fs::read(d.join("disk.img")).expect("read") == disk);
    fs::remove_file(d.join("disk.img6")).expect("remove");
    fs::remove_file(d.join("a.vmdk")).expect("remove");
    fs::remove_file(d.join("a-pt.vmdk")).expect("remove");
    for (args, status, word) in [
        ("--partitions 1,6 --relative", 1, "disk.img6"),
        ("--partitions 2", 1, "no partition 2"),
        ("--partitions 3", 1, "extended"),
        ("--partitions 1,1", 1, "twice"),
        ("--partitions 0", 2, "from 1 on"),
        ("--relative", 2, "--partitions"),
        ("--size 1M", 2, "--size"),
    ] {
        let said = fails(d, status, &format!("{CREATE} disk.img {args} a.vmdk"));
        assert!(said.contains(word), "{args}: {said}");
        assert!(!d.join("a.vmdk").exists() && !d.join("a-pt.vmdk").exists(), "{args}");
    }
    let said = fails(d, 1, "create --format vdi --raw-device disk.img a.vdi");
    assert!(said.contains("--format vmdk"), "{said}");
    let said = fails(d, 1, "create --format vmdk --variant flat --raw-device disk.img a.vmdk");
    assert!(said.contains("--variant rawdisk"), "{said}");
    fs::write(d.join("empty.img"), vec![0; 1 << 20]).expect("write");
    let said = fails(d, 1, &format!("{CREATE} empty.img --partitions 1 a.vmdk"));
    assert!(said.contains("no partition table"), "{said}");
}

/// Nobody opens a disk of the host because an image says so.
#[test]
fn a_device_is_opened_only_if_that_is_allowed() {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("disk.img"), with_mbr()).expect("write");
    ok(d, &format!("{CREATE} disk.img a.vmdk"));
    ok(d, &format!("{CREATE} disk.img --partitions 1 p.vmdk"));
    for image in ["a.vmdk", "p.vmdk"] {
        for command in
            ["info", "check", "repair", "map", "io -c read -c flush", "convert --output-format raw"]
        {
            let args = match command {
                "convert --output-format raw" => format!("{command} {image} out.raw"),
                c if c.starts_with("io") => format!("io -c flush {image}"),
                c => format!("{c} {image}"),
            };
            let said = fails(d, 1, &args);
            assert!(said.contains("--allow-raw-device"), "{args}: {said}");
        }
        fails(d, 2, &format!("compare {image} {image}"));
        let serve = |more: &[&str]| {
            let mut c = Command::new(env!("CARGO_BIN_EXE_vdblk"));
            c.current_dir(d).args(["--socket-path", "s", "--blk-file", image]).args(more);
            c.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start")
        };
        let out = serve(&[]).wait_with_output().expect("wait");
        let said = text_of(&out.stderr);
        assert!(out.status.code() == Some(1) && said.contains("--allow-raw-device"), "{said}");
        let mut child = serve(&["--allow-raw-device"]);
        wait_for(|| d.join("s").exists());
        child.kill().expect("kill");
        child.wait().expect("wait");
        let _ = fs::remove_file(d.join("s"));
    }
    // the word alone allows nothing: an image that is no raw disk stays in its folder
    let text = "# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"/dev/zero\" 0\n";
    fs::write(d.join("b.vmdk"), text).expect("write");
    let said = fails(d, 1, "info --allow-raw-device b.vmdk");
    assert!(said.contains("own folder"), "{said}");
    let text = text.replace("monolithicFlat", "fullDevice");
    fs::write(d.join("b.vmdk"), text).expect("write");
    let said = fails(d, 1, "info --allow-raw-device b.vmdk");
    assert!(said.contains("character device"), "{said}");
}

fn wait_for(mut done: impl FnMut() -> bool) {
    for _ in 0..600 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("it never happened");
}

/// A loop device that goes away again.
struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn loop_devices_are_disks() {
    let dir = scratch();
    let d = dir.path();
    let disk = with_mbr();
    fs::write(d.join("disk.img"), &disk).expect("write");
    let made = Command::new("losetup").args(["-f", "--show"]).arg(d.join("disk.img")).output();
    let device = match made {
        Ok(out) if out.status.success() => Loop(text_of(&out.stdout).trim().into()),
        _ => {
            eprintln!("skipped: no loop device can be made here");
            return;
        }
    };
    let name = device.0.display().to_string();
    ok(d, &format!("{CREATE} {name} a.vmdk"));
    assert!(content(d, "a.vmdk") == disk);
    ok(d, &format!("{CREATE} {name} --partitions 1,5 p.vmdk"));
    let seen = only(&disk, &[(0, 2048), (8192, 1), (14192, 1), (2048, 4096), (8255, 4000)]);
    assert!(content(d, "p.vmdk") == seen);
    io_ok(d, "--allow-raw-device p.vmdk", &["write -P 4 1M 1M", "flush"]);
    drop(device);
    let mut now = vec![0; 1 << 20];
    fs::File::open(d.join("disk.img")).and_then(|f| f.read_exact_at(&mut now, 1 << 20)).expect("read");
    assert!(now.iter().all(|b| *b == 4));
}

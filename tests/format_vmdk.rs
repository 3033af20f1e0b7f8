//! VMDKs that other programs made: every byte of the good ones, a clear refusal of the broken ones. Opened as the daemon
//! opens them, with the files and the parents they name.

mod format_support;

use format_support::unpacked;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use vdblk::error::{Error, ErrorKind};
use vdblk::map::{ExtentKind, ExtentList, GuestOffset, GuestRange, HostOffset};
use vdblk::vd::{Disk, ImageSpec, Lack, OpenDisk, open_disk, unpack};

fn fixtures() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| unpacked("vmdk"))
}

fn table(which: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vmdk.json");
    let all: Value = serde_json::from_slice(&std::fs::read(path).expect("table")).expect("JSON");
    all[which].as_array().expect("a list").clone()
}

fn text(v: &Value) -> &str {
    v.as_str().expect("a string")
}

fn hex(digest: impl IntoIterator<Item = u8>) -> String {
    digest.into_iter().map(|b| format!("{b:02x}")).collect()
}

/// Hands the bytes of a range to `each`, in order; zeros as `None`.
fn read(disk: &Disk, range: GuestRange, each: &mut dyn FnMut(GuestRange, Option<&[u8]>)) {
    let mut list = ExtentList::new();
    let mut rest = range;
    while !rest.is_empty() {
        match disk.chain().map(rest, &mut list) {
            Ok(()) => {}
            Err(Lack::Page { layer, key }) => {
                disk.load_page(layer, key).expect("a page of a table");
                continue;
            }
            Err(other) => panic!("{rest}: {other:?}"),
        }
        for e in list.as_slice() {
            let here = rest.take(e.len);
            rest = rest.skip(e.len);
            let read_at = |file, off: HostOffset, len| {
                let mut buf = vec![0; len];
                let n = disk.host_file(file).read_at(off.0, &mut buf).expect("data");
                assert_eq!(n, buf.len(), "data behind the end of a file");
                buf
            };
            match e.kind {
                ExtentKind::Data { file, off } => each(here, Some(&read_at(file, off, e.len as usize))),
                ExtentKind::Packed { packed, into } => {
                    let mut unit = vec![0; packed.unit as usize];
                    let bytes = read_at(packed.file, packed.off, packed.len as usize);
                    unpack(packed.codec, &bytes, &mut unit).expect("a sound grain");
                    each(here, Some(&unit[into as usize..][..e.len as usize]));
                }
                ExtentKind::Zero | ExtentKind::Parent => each(here, None),
            }
        }
    }
}

fn whole(disk: &Disk) -> GuestRange {
    GuestRange::between(GuestOffset(0), GuestOffset(disk.size_bytes()))
}

fn sha(disk: &Disk, range: GuestRange) -> String {
    let mut sum = Sha256::new();
    read(disk, range, &mut |r, bytes| match bytes {
        Some(b) => sum.update(b),
        None => sum.update(vec![0; r.len() as usize]),
    });
    hex(sum.finalize())
}

fn open(path: &Path) -> Result<std::sync::Arc<Disk>, Error> {
    open_disk(&OpenDisk::new(path)).map(|d| d.disk)
}

fn assert_content(e: &Value, disk: &Disk) {
    let id = text(&e["id"]);
    assert_eq!(disk.size_bytes(), e["size"].as_u64().expect("size"), "{id}");
    if let Some(wanted) = e["sha256"].as_str() {
        assert_eq!(sha(disk, whole(disk)), wanted, "{id}");
        return;
    }
    let runs = e["runs"].as_array().expect("runs");
    let range = |r: &Value| {
        GuestRange::new(GuestOffset(r[0].as_u64().expect("start")), r[1].as_u64().expect("length"))
            .expect("a range")
    };
    runs.iter().for_each(|r| assert_eq!(sha(disk, range(r)), text(&r[2]), "{id}: run {r}"));
    read(disk, whole(disk), &mut |at, bytes| {
        for (b, n) in bytes.unwrap_or_default().iter().zip(0..) {
            let here = GuestRange::new(GuestOffset(at.start().0 + n), 1).expect("a byte");
            assert!(
                *b == 0 || runs.iter().any(|r| range(r).contains(here)),
                "{id}: a byte outside the runs at {here}"
            );
        }
    });
}

#[test]
fn good_images_read_byte_for_byte() {
    let good = table("good");
    assert_eq!(good.len(), 20);
    for e in &good {
        let disk =
            open(&fixtures().join(text(&e["file"]))).unwrap_or_else(|err| panic!("{}: {err}", e["id"]));
        assert_content(e, &disk);
    }
}

#[test]
fn broken_images_are_refused_with_one_clear_line() {
    let (mut refused, mut opened) = (0, 0);
    for e in table("broken") {
        let path = fixtures().join(text(&e["file"]));
        if let Some(twin) = e["opens_as"].as_str() {
            let good = table("good");
            let twin = good.iter().find(|g| g["id"] == twin).expect("a good image");
            assert_content(twin, &open(&path).unwrap_or_else(|err| panic!("{}: {err}", e["id"])));
            opened += 1;
            continue;
        }
        let err = open(&path).expect_err(text(&e["id"]));
        let line = err.to_string();
        assert!(line.contains(text(&e["refused_with"])) && !line.contains('\n'), "{}: {line}", e["id"]);
        refused += 1;
    }
    assert_eq!((refused, opened), (20, 2));
}

#[test]
fn what_is_not_read_is_refused_with_the_reason() {
    for (file, word) in
        [("vmdk-stream-vbox.vmdk", "only to be read"), ("vmdk-openvmdk.vmdk", "compressed grains")]
    {
        let mut how = OpenDisk::new(fixtures().join(file));
        how.options.read_only = false;
        let e = open_disk(&how).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
        assert!(e.to_string().contains(word) && e.to_string().contains("--read-only"), "{e}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vmdk");
    for (text, word) in [
        ("createType=\"fullDevice\"\nRW 8 FLAT \"/dev/null\" 0", "--allow-raw-device"),
        ("createType=\"vmfsRawDeviceMap\"\nRW 8 FLAT \"/dev/null\" 0", "raw disks"),
        ("RW 8 VMFSRDM \"x\"", "VMFSRDM"),
        ("RW 8 SESPARSE \"a.vmdk\"", "more than once"),
        ("RW 8 SESPARSE \"gone.vmdk\"", "missing"),
        ("RW 8 FLAT \"../x\" 0", "own folder"),
        ("NOACCESS 8 FLAT \"x\" 0", "missing"),
        ("RW 99999999999999999 ZERO", "no size"),
        ("RW 18014398509481984 ZERO", "hold more than"),
    ] {
        std::fs::write(&path, format!("# Disk DescriptorFile\nversion=1\n{text}\n")).unwrap();
        let e = open(&path).unwrap_err().to_string();
        assert!(e.contains(word), "{text}: {e}");
    }
    let part = fixtures().join("vmdk-qemu-twoGbMaxExtentSparse-s001.vmdk");
    let e = open(&part).unwrap_err().to_string();
    assert!(e.contains("without its descriptor") && e.contains("lists the extents"), "{e}");
}

#[test]
fn info_tells_what_the_descriptor_says() {
    let info = |file: &str| {
        let opened = open_disk(&OpenDisk::new(fixtures().join(file))).unwrap();
        opened.images[0].info.clone()
    };
    let i = info("vmdk-sparse-vbox.vmdk");
    assert_eq!((i.format, i.variant, i.block_size), ("vmdk", "sparse", Some(65536)));
    assert_eq!(i.uuid.unwrap().to_string(), "5eed00d0-0064-4064-80d0-000000640064");
    assert_eq!((i.content_id, i.parent_content_id, i.parent_uuid), (Some(0x2358_9e06), None, None));
    assert_eq!(i.comment.unwrap(), "line one\nline two = \"quoted\"");
    assert_eq!(i.allocated_blocks, Some(16));
    let i = info("vmdk-chain-1.vmdk");
    assert_eq!((i.variant, i.parent_content_id), ("diff", None));
    assert_eq!(i.parent_uuid.unwrap().to_string(), "5eed00d0-0032-4032-80d0-000000320032");
    let i = info("vmdk-qchain-1.vmdk");
    assert_eq!((i.variant, i.parent_content_id, i.parent_uuid), ("diff", Some(0x222f_41aa), None));
    assert_eq!(i.parent_names, ["vmdk-qchain-0.vmdk"]);
    assert_eq!(info("vmdk-esx-vbox.vmdk").variant, "esx");
    assert_eq!(info("vmdk-flat-vbox.vmdk").geometry, Some((32, 16, 63)));
    assert_eq!(info("vmdk-big-split-vbox.vmdk").variant, "split2g");
}

fn le(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// ESX's sparse extents: one sector a grain, tables of 4096 entries, of which only those that are needed exist.
#[test]
fn extents_of_esx_are_read_and_never_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.vmdk");
    let text = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"vmfsSparse\"\n\
        RW 5000 VMFSSPARSE \"c-delta.vmdk\"\nRDONLY 3 ZERO\nRW 2 FLAT \"c-flat.vmdk\" 1\n";
    std::fs::write(&path, text).unwrap();
    // header, directory at sector 4 with the second table alone, at sector 5, then data
    let mut c = [b"COWD".to_vec(), le(&[1, 3, 5000, 1, 4, 2, 38])].concat();
    c.resize(4 * 512, 0);
    c.extend(le(&[0, 5]));
    c.resize(5 * 512, 0);
    c.extend(le(&[0, 37]));
    c.resize(37 * 512, 0);
    c.extend([7; 512]);
    std::fs::write(dir.path().join("c-delta.vmdk"), &c).unwrap();
    std::fs::write(dir.path().join("c-flat.vmdk"), [[1; 512], [2; 512], [3; 512]].concat()).unwrap();
    let disk = open(&path).unwrap();
    assert_eq!(disk.size_bytes(), 5005 * 512);
    let mut expected = vec![0; 5005 * 512];
    expected[4097 * 512..4098 * 512].fill(7);
    expected[5003 * 512..5004 * 512].fill(2);
    expected[5004 * 512..].fill(3);
    assert_eq!(sha(&disk, whole(&disk)), hex(Sha256::digest(&expected)));
    let opened = open_disk(&OpenDisk::new(&path)).unwrap();
    let info = &opened.images[0].info;
    assert_eq!(
        (info.variant, info.block_size, info.version.as_deref()),
        ("vmfs-sparse", Some(512), Some("COWD"))
    );
    let mut how = OpenDisk::new(&path);
    how.options.read_only = false;
    let e = open_disk(&how).unwrap_err().to_string();
    assert!(e.contains("only read") && e.contains("--read-only"), "{e}");
}

fn le8(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A seSparse extent of 40 MiB: three tables, of which the last two exist and lie in the other order.
fn se_sparse() -> Vec<u8> {
    let allocated = |number: u64| 3 << 60 | (number & 0xfff) << 48 | number >> 12;
    let mut f = le8(&[0xcafe_babe, 0x2_0000_0001, 81920, 8, 64, 0, 0, 0, 0, 0]);
    f.extend(le8(&[1, 1, 2, 1, 3, 1, 4, 1, 8, 128, 136, 1, 137, 1, 144, 40960 * 8]));
    f.resize(512, 0);
    f.extend(le8(&[0xcafe_cafe, 2, 1, 0]));
    f.resize(4 * 512, 0);
    f.extend(le8(&[0, 1 << 60 | 1, 1 << 60]));
    f.resize(8 * 512, 0);
    let mut tables = vec![0u64; 2 * 4096];
    tables[0] = allocated(1); // of the third table
    tables[2047] = allocated(4099);
    tables[1] = 2 << 60;
    tables[4096 + 5] = allocated(0); // of the second
    tables[4096 + 4095] = 1 << 60;
    f.extend(le8(&tables));
    f.resize((144 << 9) + 4096, 7);
    f.resize((144 << 9) + 2 * 4096, 8);
    f.resize((144 << 9) + 4099 * 4096, 0);
    f.resize((144 << 9) + 4100 * 4096, 9);
    f
}

#[test]
fn extents_of_esx_with_large_tables_are_read_as_qemu_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.vmdk");
    let text = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"seSparse\"\n\
        RW 81920 SESPARSE \"s-sesparse.vmdk\"\n";
    std::fs::write(&path, text).unwrap();
    let sound = se_sparse();
    let extent = dir.path().join("s-sesparse.vmdk");
    std::fs::write(&extent, &sound).unwrap();
    let disk = open(&path).unwrap();
    let mut expected = vec![0; 40 << 20];
    expected[32 << 20..(32 << 20) + 4096].fill(8);
    expected[(40 << 20) - 4096..].fill(9);
    expected[(16 << 20) + 5 * 4096..(16 << 20) + 6 * 4096].fill(7);
    assert_eq!(sha(&disk, whole(&disk)), hex(Sha256::digest(&expected)));
    let opened = open_disk(&OpenDisk::new(&path)).unwrap();
    let info = &opened.images[0].info;
    assert_eq!(
        (info.variant, info.block_size, info.version.as_deref()),
        ("se-sparse", Some(4096), Some("seSparse 2.1"))
    );
    let report = check_image(&path);
    assert!(report.is_clean() && report.allocated == 3 && report.blocks == 10240, "{report:?}");
    let raw = dir.path().join("q.raw");
    let qemu = std::process::Command::new("qemu-img")
        .args(["convert", "-f", "vmdk", "-O", "raw"])
        .args([&path, &raw])
        .output();
    match qemu {
        Err(_) => eprintln!("no qemu-img: what it reads was not compared"),
        Ok(out) => {
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            assert!(std::fs::read(&raw).unwrap() == expected, "QEMU reads something else");
        }
    }
    let mut how = OpenDisk::new(&path);
    how.options.read_only = false;
    let e = open_disk(&how).unwrap_err().to_string();
    assert!(e.contains("only read") && e.contains("--read-only"), "{e}");
    // what is not known, or cannot be, is refused
    for (at, byte, word) in [
        (0, 1, "signature"),
        (8, 2, "version"),
        (24, 16, "grains of 16"),
        (40, 1, "flags"),
        (48, 1, "unknown fields"),
        (511, 1, "unknown fields"),
        (22, 9, "sectors"),
        (512, 1, "second header"),
        (512 + 24, 1, "journal"),
        (4 * 512 + 8, 0, "names table 0"),
        (4 * 512 + 8, 2, "names table 2"),
        (4 * 512 + 15, 0x20, "directory is"),
    ] {
        let mut broken = sound.clone();
        broken[at] = byte;
        std::fs::write(&extent, broken).unwrap();
        let e = open(&path).expect_err(word).to_string();
        assert!(e.contains(word) && !e.contains('\n'), "{at}: {e}");
    }
    // an entry that cannot be fails the request that needs it, and the check
    for (at, byte) in [(8 * 512 + 7, 0x40), (8 * 512 + 1, 9), (8 * 512 + 3 * 8, 1)] {
        let mut broken = sound.clone();
        broken[at] = byte;
        std::fs::write(&extent, broken).unwrap();
        open(&path).unwrap();
        assert_eq!(check_image(&path).corruptions, 1, "{at}");
    }
}

/// Whatever such an extent says of itself, it is refused or shows bytes of its own file.
#[test]
fn any_extent_of_esx_is_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.vmdk");
    std::fs::write(&path, "# Disk DescriptorFile\nversion=1\nRW 81920 SESPARSE \"e.vmdk\"\n").unwrap();
    let sound = se_sparse();
    let mut random = 1u64;
    let mut draw = |n: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % n
    };
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..400 {
        let mut bytes = sound.clone();
        for _ in 0..1 + draw(4) {
            // a word of the headers, the directory, or one of the entries in use
            let words = [draw(26), 64 + draw(4), 256 + draw(3), 512 + draw(2), 512 + 2047, 512 + 4096 + 5];
            let at = 8 * words[draw(6)];
            let word = match draw(4) {
                0 => 1u64 << draw(64),
                1 => draw(256) as u64 | (draw(16) as u64) << 60,
                2 => u64::MAX - draw(3) as u64,
                _ => u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) ^ (1 << draw(64)),
            };
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        if draw(8) == 0 {
            bytes.truncate(draw(sound.len()));
        }
        std::fs::write(dir.path().join("e.vmdk"), &bytes).unwrap();
        let spec = ImageSpec { path: path.clone(), format: None };
        let checked = vdblk::job::check_image(&spec, std::time::Duration::ZERO);
        match open(&path) {
            Err(e) => {
                refused += 1;
                assert!(!e.to_string().contains('\n'), "{e}");
            }
            Ok(disk) => {
                opened += 1;
                checked.unwrap();
                let mut list = ExtentList::new();
                for unit in 0..10240 {
                    let r = GuestRange::new(GuestOffset(unit * 4096), 4096).unwrap();
                    let mapped = loop {
                        match disk.chain().map(r, &mut list) {
                            Err(Lack::Page { layer, key }) => disk.load_page(layer, key).unwrap(),
                            other => break other,
                        }
                    };
                    for e in list.as_slice().iter().filter(|_| mapped.is_ok()) {
                        if let ExtentKind::Data { off, .. } = e.kind {
                            assert!(off.0 + e.len <= bytes.len() as u64, "{e:?}");
                        }
                    }
                }
            }
        }
    }
    assert!(opened > 50 && refused > 50, "{opened} {refused}");
}

fn check_image(path: &Path) -> vdblk::format::CheckReport {
    let spec = ImageSpec { path: path.into(), format: None };
    vdblk::job::check_image(&spec, std::time::Duration::ZERO)
        .unwrap()
        .report
        .expect("something that can be wrong")
}

/// Where an image names its own tables twice, or another's, writing one would change the other.
#[test]
fn a_file_belongs_to_an_image_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vmdk");
    std::fs::write(dir.path().join("a-flat.vmdk"), vec![5; 1024]).unwrap();
    std::os::unix::fs::symlink("a-flat.vmdk", dir.path().join("b-flat.vmdk")).unwrap();
    let of = |lines: &str| std::fs::write(&path, format!("# Disk DescriptorFile\n{lines}\n")).unwrap();
    of("RW 1 FLAT \"a-flat.vmdk\" 0\nRW 1 FLAT \"a-flat.vmdk\" 1");
    assert_eq!(open(&path).unwrap().size_bytes(), 1024, "two parts of one file");
    for name in ["b-flat.vmdk", "a.vmdk"] {
        of(&format!("RW 1 FLAT \"{name}\" 0"));
        open(&path).unwrap_err();
    }
    of("RW 1 FLAT \"a-flat.vmdk\" 0\nRW 2 FLAT \"a-flat.vmdk\" 1");
    let e = open(&path).unwrap_err().to_string();
    assert!(e.contains("1024 bytes"), "{e}");
}

/// A parent that QEMU wrote to since has another content ID: its child would show something else.
#[test]
fn a_parent_with_another_content_id_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for f in ["vmdk-qchain-0.vmdk", "vmdk-qchain-1.vmdk"] {
        std::fs::copy(fixtures().join(f), dir.path().join(f)).unwrap();
    }
    let base = dir.path().join("vmdk-qchain-0.vmdk");
    let bytes = std::fs::read(&base).unwrap();
    let at = bytes.windows(12).position(|w| w == b"CID=222f41aa").expect("its content ID");
    let mut changed = bytes.clone();
    changed[at + 11] = b'b';
    std::fs::write(&base, changed).unwrap();
    let child = dir.path().join("vmdk-qchain-1.vmdk");
    let e = open(&child).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::ParentMismatch);
    assert!(e.to_string().contains("222f41aa") && e.to_string().contains("222f41ab"), "{e}");
    let how = OpenDisk { allow_parent_mismatch: true, ..OpenDisk::new(&child) };
    open_disk(&how).expect("the operator's choice");
}

#[test]
fn the_whole_set_reads_byte_for_byte() {
    let Some(dir) = std::env::var_os("VDBLK_FIXTURES").map(PathBuf::from) else {
        eprintln!("VDBLK_FIXTURES is not set: only the fixtures of the repository were read");
        return;
    };
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).expect("manifest")).expect("JSON");
    let mut read = 0;
    for e in manifest["images"].as_array().expect("images").iter().filter(|e| e["format"] == "VMDK") {
        let disk = open(&dir.join(text(&e["file"]))).unwrap_or_else(|err| panic!("{}: {err}", e["id"]));
        let crashed = &e["tools"]["qemu-sid"]["convert_readonly"]["sha256"];
        let sha = if e["sha256"].is_string() { &e["sha256"] } else { crashed };
        let entry = serde_json::json!({"id": e["id"], "size": e["virtual_size"], "sha256": sha, "runs": e["data_runs"]});
        assert_content(&entry, &disk);
        read += 1;
    }
    assert_eq!(read, 25);
}

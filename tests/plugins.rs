//! Plug-ins: loaded and unloaded by file and by folder, on the command lines of both programs, and at work.

mod plugin_support;
mod vdimg_support;

use plugin_support::{example, hostile};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vdblk::ErrorKind;
use vdblk::container::{
    BackendCaps, Container, CreateBase, OpenFlags, backend_info, backend_info_one, get_format, plugin_info,
    plugin_load, plugin_load_dir, plugin_unload, plugin_unload_dir,
};
use vdblk::filter::{filter_info, filter_info_one, open_filter};
use vdblk::format::Format;
use vdblk::map::{DeviceType, GuestOffset};
use vdimg_support::{KIB, MIB, Rng, fails, io, io_ok, ok, random_raw, scratch, vdimg};

/// What is loaded is the process's.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn folder() -> tempfile::TempDir {
    let dir = scratch();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    dir
}

fn kind_of<T>(result: vdblk::Result<T>) -> ErrorKind {
    result.err().expect("an error").kind()
}

#[test]
fn a_plug_in_brings_formats_and_filters_and_takes_them_away() {
    let _turn = turn();
    let dir = folder();
    let path = example(dir.path());
    let before = (backend_info().len(), filter_info().len());
    assert_eq!(kind_of("blkmap".parse::<Format>()), ErrorKind::InvalidArgument);
    let info = plugin_load(&path).unwrap();
    assert_eq!((info.name.as_str(), info.version.as_str()), ("example", "1.0"));
    assert_eq!(info.path, path);
    assert_eq!(plugin_info(), std::slice::from_ref(&info));
    assert_eq!((info.formats.len(), info.filters.as_slice()), (1, &["ROT".to_string()][..]));

    let format: Format = "BLKmap".parse().unwrap();
    assert_eq!(info.formats, [format]);
    let all = backend_info();
    assert_eq!(all.len(), before.0 + 1);
    let last = all.last().unwrap();
    assert_eq!((last.format, last.plugin), (format, path.to_str()));
    assert_eq!(backend_info_one("blkmap").unwrap(), *last);
    let caps = [
        BackendCaps::UUID,
        BackendCaps::CREATE_DYNAMIC,
        BackendCaps::DIFF,
        BackendCaps::ASYNC,
        BackendCaps::FILE,
        BackendCaps::DISCARD,
    ];
    assert!(caps.into_iter().all(|c| last.caps.contains(c)), "{:?}", last.caps);
    assert!(
        !last.caps.contains(BackendCaps::CREATE_FIXED) && !last.caps.contains(BackendCaps::CREATE_SPLIT_2G)
    );
    assert_eq!((last.extensions.len(), last.extensions[0].extension), (1, "blkmap"));
    assert_eq!((last.config.len(), last.config[0].key), (1, "block_size"));
    assert_eq!(filter_info().len(), before.1 + 1);
    assert_eq!(filter_info_one("rot").unwrap().origin.as_deref(), path.to_str());

    assert_eq!(kind_of(plugin_load(&path)), ErrorKind::Exists, "twice");
    let other_name = dir.path().join("other.so");
    std::fs::hard_link(&path, &other_name).unwrap();
    assert_eq!(kind_of(plugin_load(&other_name)), ErrorKind::Exists, "by another name");
    let copy = dir.path().join("copy.so");
    std::fs::copy(&path, &copy).unwrap();
    let e = plugin_load(&copy).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Exists, "its formats are there");
    assert!(e.to_string().contains("blkmap"), "{e}");
    assert_eq!(plugin_info().len(), 1);

    plugin_unload(&path).unwrap();
    assert_eq!(kind_of(plugin_unload(&path)), ErrorKind::NotFound);
    assert_eq!((backend_info().len(), filter_info().len()), before);
    assert_eq!(kind_of("blkmap".parse::<Format>()), ErrorKind::InvalidArgument);
    // a value that somebody has kept
    assert_eq!(format.name(), "blkmap");
    let bytes = vec![0u8; 8192];
    let files = [vdblk::format::ImageFile { id: vdblk::map::FileId(0), source: &bytes }];
    assert_eq!(kind_of(vdblk::format::open(format, &files, Default::default())), ErrorKind::State);
    // and again
    plugin_load(&path).unwrap();
    assert_eq!("blkmap".parse::<Format>().unwrap().name(), "blkmap");
    assert_ne!("blkmap".parse::<Format>().unwrap(), format, "another life of it");
    plugin_unload(&other_name).unwrap();
}

#[test]
fn a_plug_in_in_use_is_not_unloaded() {
    let _turn = turn();
    let dir = folder();
    let path = example(dir.path());
    plugin_load(&path).unwrap();
    let image = dir.path().join("a.blkmap");
    let mut disk = Container::new(DeviceType::HardDisk);
    disk.create_base("BLKMAP", &image, MIB, &CreateBase::default(), OpenFlags::NONE).unwrap();
    disk.write(0, &[7; 512]).unwrap();
    let e = plugin_unload(&path).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::State);
    assert!(e.to_string().contains("in use"), "{e}");
    assert_eq!(kind_of(plugin_unload_dir(dir.path())), ErrorKind::State);
    let mut sector = [0; 512];
    disk.read(0, &mut sector).unwrap();
    assert_eq!(sector, [7; 512]);
    disk.close_all().unwrap();
    drop(disk);
    assert_eq!(get_format(&image).unwrap().0.name, "blkmap");

    let filter = open_filter("ROT", "5").unwrap();
    assert_eq!(kind_of(plugin_unload(&path)), ErrorKind::State);
    let mut bytes = vec![1; 1024];
    filter.on_write(GuestOffset(1024), &mut bytes);
    assert_eq!((bytes[0], bytes[512]), (1 + 5 + 2, 1 + 5 + 3));
    filter.on_read(GuestOffset(1024), &mut bytes);
    assert_eq!(bytes, [1; 1024]);
    assert!(filter.may_write_zeros());
    assert_eq!(kind_of(open_filter("ROT", "256")), ErrorKind::InvalidArgument);
    assert_eq!(kind_of(open_filter("CRYPT", "")), ErrorKind::Unsupported);
    drop(filter);
    assert_eq!(plugin_unload_dir(dir.path()).unwrap(), [path]);
    assert_eq!(get_format(&image).unwrap().0.name, "RAW", "nobody knows it any more");
}

#[test]
fn a_folder_is_loaded_whatever_else_is_in_it() {
    let _turn = turn();
    let dir = folder();
    let good = example(dir.path());
    let whole = std::fs::read(&good).unwrap();
    let file = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let mut bad = vec![
        (file("vdblk-plugin-empty.so", b""), ErrorKind::NotThisFormat),
        (file("vdblk-plugin-text.so", &b"#!/bin/sh\n".repeat(100)), ErrorKind::NotThisFormat),
        (hostile(dir.path(), "NO_SYMBOL"), ErrorKind::NotThisFormat),
        (hostile(dir.path(), "MAGIC_WRONG"), ErrorKind::NotThisFormat),
        (hostile(dir.path(), "MAJOR_WRONG"), ErrorKind::Unsupported),
        (hostile(dir.path(), "ENTRY_REFUSES"), ErrorKind::Unsupported),
        (hostile(dir.path(), "FORMAT_NAME_TAKEN"), ErrorKind::Exists),
    ];
    // cut anywhere
    for (n, len) in [1, 63, 64, 200, 4096, whole.len() / 4].into_iter().enumerate() {
        bad.push((file(&format!("libvdblk_plugin_cut{n}.so"), &whole[..len]), ErrorKind::NotThisFormat));
    }
    let writable = file("vdblk-plugin-writable.so", &whole);
    std::fs::set_permissions(&writable, PermissionsExt::from_mode(0o757)).unwrap();
    bad.push((writable, ErrorKind::PermissionDenied));
    let folder = dir.path().join("vdblk-plugin-folder.so");
    std::fs::create_dir(&folder).unwrap();
    bad.push((folder, ErrorKind::InvalidArgument));
    let missing = dir.path().join("vdblk-plugin-dangling.so");
    std::os::unix::fs::symlink("nowhere", &missing).unwrap();
    bad.push((missing, ErrorKind::NotFound));
    // not looked at
    for name in ["plugin.so", "vdblk-plugin-.so", "vdblk-plugin-x.so.1", "README"] {
        file(name, b"?");
    }
    let scanned = plugin_load_dir(dir.path()).unwrap();
    assert_eq!(scanned.len(), bad.len() + 1);
    for (path, loaded) in &scanned {
        match bad.iter().find(|(p, _)| p == path) {
            None => assert_eq!((path, loaded.is_ok()), (&good, true)),
            Some((_, kind)) => {
                let e = loaded.as_ref().expect_err("a bad one");
                assert_eq!((e.kind(), e.path()), (*kind, Some(&**path)), "{e}");
            }
        }
    }
    assert_eq!(plugin_info().len(), 1);
    // a second time there is nothing new but what is wrong
    assert_eq!(plugin_load_dir(dir.path()).unwrap().len(), bad.len());
    assert_eq!(plugin_unload_dir(dir.path()).unwrap(), [good]);
    assert!(plugin_info().is_empty());
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    assert_eq!(kind_of(plugin_load_dir(dir.path())), ErrorKind::PermissionDenied);
    assert_eq!(kind_of(plugin_load_dir(&dir.path().join("no"))), ErrorKind::NotFound);
}

/// What was loaded is what was looked at, not what has its name by then; and a library that has gone is not taken for another.
#[test]
fn plug_ins_are_loaded_again_and_again() {
    let _turn = turn();
    let dir = folder();
    for round in 0..8 {
        let path = if round % 2 == 0 { example(dir.path()) } else { hostile(dir.path(), "SOUND") };
        let info = plugin_load(&path).unwrap();
        assert_eq!(info.name, if round % 2 == 0 { "example" } else { "hostile" });
        plugin_unload(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn vdimg_does_all_it_can_with_a_format_of_a_plug_in() {
    let dir = folder();
    let d = dir.path();
    example(d);
    let mut rng = Rng(6);
    random_raw(&d.join("a.raw"), 9 * MIB + 512, &mut rng);
    let p = "--plugin vdblk-plugin-example.so";
    let formats = ok(d, &format!("formats {p}"));
    assert!(
        formats.contains("blkmap: --format blkmap") && formats.contains("filter ROT: --filter ROT"),
        "{formats}"
    );
    assert!(
        formats.contains(&format!("plug-in: {}", d.join("vdblk-plugin-example.so").display())),
        "{formats}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&ok(d, &format!("formats --output json {p}"))).unwrap();
    let last = json.as_array().unwrap().last().unwrap();
    assert_eq!((&last["format"], last["plugin"].is_string()), (&"blkmap".into(), true));
    assert!(json[0]["plugin"].is_null());
    assert!(!ok(d, "formats").contains("blkmap"));

    ok(d, &format!("{p} convert a.raw a.blkmap -o block_size=64k"));
    ok(d, &format!("{p} compare a.raw a.blkmap"));
    ok(d, &format!("{p} check a.blkmap"));
    let info = ok(d, &format!("info --output json a.blkmap {p}"));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["format"], &info["variant"]), (&"blkmap".into(), &"dynamic".into()));
    assert_eq!((&info["virtual_size"], &info["block_size"]), (&(9 * MIB + 512).into(), &(64 * KIB).into()));
    assert!(info["uuid"].is_string() && info["allocated_blocks"].as_u64() > Some(0), "{info}");
    ok(d, &format!("{p} convert a.blkmap b.vdi"));
    ok(d, "compare a.raw b.vdi");
    ok(d, &format!("{p} clone a.blkmap c.blkmap"));
    ok(d, &format!("{p} compare b.vdi c.blkmap"));
    assert!(ok(d, &format!("{p} map a.blkmap")).lines().count() > 1);

    // a chain of both, either way
    ok(d, &format!("{p} create --format blkmap --parent b.vdi --comment hello d.blkmap"));
    io_ok(d, &format!("{p} d.blkmap"), &["write -P 0xab 100k 70k", "write -z 512k 256k", "flush"]);
    io_ok(d, "a.raw", &["write -P 0xab 100k 70k", "write -z 512k 256k"]);
    ok(d, &format!("{p} compare a.raw d.blkmap"));
    let shown = ok(d, &format!("{p} info d.blkmap"));
    assert!(shown.contains("diff") && shown.contains("hello"), "{shown}");
    ok(d, &format!("{p} check d.blkmap"));
    // what it cannot
    for (args, what) in [
        ("resize d.blkmap 20M", "not supported"),
        ("compact d.blkmap", "not supported"),
        ("setuuid d.blkmap", "no place"),
        ("create --format blkmap --size 1M --variant fixed x.blkmap", "variant"),
        ("create --format blkmap --size 1M -o nonsense=1 x.blkmap", "nonsense"),
        ("create --format blkmap --size 1M -o block_size=777 x.blkmap", "512"),
    ] {
        let said = fails(d, 1, &format!("{p} {args}"));
        assert!(said.contains(what), "{args}: {said}");
    }
    assert!(!d.join("x.blkmap").exists());
    // as a parent it is as good as any
    ok(d, &format!("{p} create --format vdi --parent d.blkmap --parent-dir . e.vdi"));
    ok(d, &format!("{p} compare a.raw e.vdi"));
    let said = io(d, &format!("{p} d.blkmap"), &["write 0 512"]);
    assert!(String::from_utf8_lossy(&said.stderr).contains("is the parent of"), "{said:?}");
    // damage
    let bytes = std::fs::read(d.join("a.blkmap")).unwrap();
    let mut twice = bytes.clone();
    let used: Vec<_> = (0..140).map(|n| 4096 + 4 * n).filter(|at| bytes[*at] > 1).collect();
    twice.copy_within(used[0]..used[0] + 4, used[1]);
    std::fs::write(d.join("twice.blkmap"), &twice).unwrap();
    let said = vdimg(d, &format!("{p} check twice.blkmap")).output().unwrap();
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    assert!(String::from_utf8_lossy(&said.stdout).contains("share their place"), "{said:?}");
    for len in [0, 3, 4095, 4096, 4200] {
        std::fs::write(d.join("cut.blkmap"), &bytes[..len]).unwrap();
        fails(d, 1, &format!("{p} info -f blkmap cut.blkmap"));
    }
}

#[test]
fn plug_ins_come_by_option_folder_and_environment() {
    let dir = folder();
    let d = dir.path();
    let plugins = d.join("plugins");
    std::fs::create_dir(&plugins).unwrap();
    example(&plugins);
    std::fs::write(plugins.join("vdblk-plugin-bad.so"), "?").unwrap();
    let has = |out: std::process::Output| {
        let said = String::from_utf8_lossy(&out.stderr).to_string();
        assert!(
            out.status.success() && said.contains("warning") && said.contains("vdblk-plugin-bad.so"),
            "{said}"
        );
        assert!(String::from_utf8_lossy(&out.stdout).contains("--format blkmap"), "{out:?}");
    };
    has(vdimg(d, "formats --plugin-dir plugins").output().unwrap());
    has(vdimg(d, "--plugin-dir=plugins formats").output().unwrap());
    has(vdimg(d, "formats").env("VDBLK_PLUGIN_PATH", ":/nowhere:plugins").output().unwrap());
    fails(d, 1, "formats --plugin-dir nowhere");
    let said = fails(d, 1, "formats --plugin plugins/vdblk-plugin-bad.so");
    assert!(said.contains("vdblk-plugin-bad.so") && said.contains("library"), "{said}");
    let said = fails(d, 1, "formats --plugin nowhere.so");
    assert!(said.contains("No such file"), "{said}");
    fails(d, 2, "info --format blkmap x");
    fails(d, 2, "info --filter ROT x.raw");
}

/// A disk behind a filter of a plug-in, sectors of zeros included: what it writes may be zeros, and is then no less written.
#[test]
fn filters_of_plug_ins_nest_and_keep_every_byte() {
    let dir = folder();
    let d = dir.path();
    example(d);
    let p = "--plugin vdblk-plugin-example.so";
    ok(d, "create --format vdi --size 2M b.vdi");
    let filters = "--filter ROT --filter rot=200";
    let (mut all, mut script) = (Vec::new(), Vec::new());
    for n in 0..256usize {
        all.resize(all.len() + 8192, n as u8);
        script.push(format!("write -P {n} {} 8192", n * 8192));
    }
    let script: Vec<_> = script.iter().map(String::as_str).collect();
    io_ok(d, &format!("{p} {filters} b.vdi"), &script);
    let shown = vdimg(d, &format!("{p} cat {filters} b.vdi")).output().unwrap();
    assert!(shown.status.success() && shown.stdout == all);
    let held = vdimg(d, "cat b.vdi").output().unwrap().stdout;
    let made: Vec<u8> = all
        .iter()
        .enumerate()
        .map(|(n, b)| b.wrapping_add(213).wrapping_add(((n / 512) * 2) as u8))
        .collect();
    assert!(held == made);
    let one = vdimg(d, &format!("{p} cat --filter ROT=213 b.vdi")).output().unwrap().stdout;
    assert_eq!(one[..512], all[..512]);
}

/// A sector that a filter makes zeros of was written all the same.
#[test]
fn zeros_that_a_filter_makes_are_no_unwritten_sector() {
    let dir = folder();
    let d = dir.path();
    example(d);
    let p = "--plugin vdblk-plugin-example.so --filter ROT=13";
    ok(d, "create --format vdi --size 1M b.vdi");
    io_ok(d, &format!("{p} b.vdi"), &["write -P 243 0 512", "write -P 9 512 512"]);
    let held = vdimg(d, "cat b.vdi").output().unwrap().stdout;
    assert_eq!(held[..512], [0; 512]);
    let shown = vdimg(d, &format!("cat {p} b.vdi")).output().unwrap().stdout;
    assert_eq!((&shown[..512], &shown[512..1024]), (&[243; 512][..], &[9; 512][..]));
}

fn program(name: &str) -> PathBuf {
    let bins = Path::new(env!("CARGO_BIN_EXE_vdblk")).parent().expect("a folder");
    let found = if name == "vubench" { bins.join("examples/vubench") } else { bins.join(name) };
    assert!(found.exists(), "{} is missing: cargo build --bins --examples", found.display());
    found
}

/// The daemon on an image of the plug-in's format, under a load that verifies; killed again and again.
fn served(dir: &Path, image: &str, more: &str, args: &str) -> serde_json::Value {
    let daemon = format!(
        "{} --socket-path @S --plugin {} --blk-file {} --num-queues 2 --log-level warn --lock-wait 50 {more}",
        program("vdblk").display(),
        dir.join("vdblk-plugin-example.so").display(),
        dir.join(image).display()
    );
    let mut c = Command::new(program("vubench"));
    c.current_dir(dir).arg("--socket").arg(dir.join("s")).arg("--server-cmd").arg(daemon);
    c.args("--queues 2 --unit 4k --max-units 16 --seed 7 --size 64m".split_whitespace());
    c.arg("--shadow").arg(format!("{image}.model"));
    let done = c.args(args.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "vubench {args}: {done:?}");
    let text = String::from_utf8_lossy(&done.stdout);
    serde_json::from_str(text.lines().last().unwrap_or("")).unwrap()
}

#[test]
fn a_format_of_a_plug_in_is_served_and_survives_kills() {
    let dir = folder();
    let d = dir.path();
    example(d);
    let p = "--plugin vdblk-plugin-example.so";
    for (image, make) in [
        ("a.blkmap", "create --format blkmap --size 64M -o block_size=64k a.blkmap"),
        ("c.blkmap", "create --format blkmap --parent b.vdi -o block_size=64k c.blkmap"),
    ] {
        if image == "c.blkmap" {
            ok(d, "create --format vdi --size 64M b.vdi");
        }
        ok(d, &format!("{p} {make}"));
        let run = "--verify --assume-zero --runtime 2 --dump-model model.raw";
        served(d, image, "", run);
        ok(d, &format!("{p} compare {image} model.raw"));
        let checked = ok(d, &format!("{p} check {image}"));
        assert!(!checked.contains("leak"), "{checked}");
        // not from the beginning: the model goes on
        let kills = 5;
        let fresh = if image == "a.blkmap" { "k.blkmap" } else { "l.blkmap" };
        ok(d, &format!("{p} {}", make.replace(image, fresh)));
        let run = format!(
            "--reconnect-kill {kills} --assume-zero --iodepth 32 --mix 45,30,8,12,5 --runtime {} --dump-model model.raw --image {fresh}",
            f64::from(kills + 1) * 0.6
        );
        let r = served(d, fresh, "", &run);
        for field in ["duplicates", "lost", "mismatches", "errors", "bad_used_len", "stale_after_crash"] {
            assert_eq!(r[field], 0, "{field} in {r}");
        }
        assert_eq!(r["kills"], kills, "{r}");
        ok(d, &format!("{p} compare {fresh} model.raw"));
        // leaks at most, which the next session that ends in order leaves behind
        let checked = vdimg(d, &format!("{p} check {fresh}")).output().unwrap();
        assert!([Some(0), Some(3)].contains(&checked.status.code()), "{checked:?}");
    }
}

#[test]
fn a_disk_is_served_through_a_filter_of_a_plug_in() {
    let dir = folder();
    let d = dir.path();
    example(d);
    let p = "--plugin vdblk-plugin-example.so";
    ok(d, &format!("{p} create --format blkmap --size 64M -o block_size=64k a.blkmap"));
    let run = "--verify --runtime 2 --dump-model model.raw";
    served(d, "a.blkmap", "--filter ROT=77", run);
    ok(d, &format!("{p} check a.blkmap"));
}

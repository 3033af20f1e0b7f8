//! Encrypted disks through vdimg: what VirtualBox encrypted reads right; encrypting, decrypting, changing keys.

#[path = "format_support/mod.rs"]
mod format_support;
#[path = "vdimg_support/mod.rs"]
mod vdimg_support;

use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use vdimg_support::{MIB, Rng, failed, fails, ok, random_raw, run, scratch, vdimg};

const KEYS: &str = "--password-file password --key-store store.txt";

/// A VMDK of 1 MiB that VirtualBox 7.2.22 has encrypted (`VBoxManage encryptmedium`), with its machine's file.
fn fixture() -> TempDir {
    let dir = scratch();
    for file in fs::read_dir(format_support::unpacked("crypt")).expect("fixtures") {
        let file = file.expect("a fixture");
        fs::copy(file.path(), dir.path().join(file.file_name())).expect("copy a fixture");
    }
    dir
}

fn sha(path: &Path) -> String {
    let sum = Sha256::digest(fs::read(path).expect("read a result"));
    sum.iter().map(|b| format!("{b:02x}")).collect()
}

/// What VirtualBox read before it encrypted the disk.
const PLAIN: &str = "e75acf28c27aeb885eee373b207268e634555ac0c0ea690823137f5450e0b773";
/// What it read afterwards (`VBoxManage mediumio cat`): noise where nothing was ever written.
const NOISE: &str = "902ead61115ab76080d2c396194842386b394e88540627753e6f6f00465da141";

#[test]
fn what_virtualbox_encrypted_reads_as_before_or_as_it_reads_it() {
    let dir = fixture();
    let d = dir.path();
    for (store, more, sum) in [
        ("store.txt", "", PLAIN),
        ("machine.vbox", "", PLAIN),
        ("store.txt", "--unallocated virtualbox", NOISE),
    ] {
        let args = format!(
            "convert --output-format raw --password-file password --key-store {store} {more} xts256.vmdk out.raw"
        );
        ok(d, &args);
        assert_eq!(sha(&d.join("out.raw")), sum, "{args}");
        fs::remove_file(d.join("out.raw")).unwrap();
    }
    ok(d, "convert --output-format raw xts256.vmdk bare.raw");
    assert!(
        ![PLAIN, NOISE].contains(&sha(&d.join("bare.raw")).as_str()),
        "without keys it is what the image holds"
    );
    ok(d, &format!("convert --output-format raw {KEYS} xts256.vmdk plain.raw"));
    let second = "--password-file2 password --key-store2 store.txt";
    ok(d, &format!("compare {KEYS} xts256.vmdk plain.raw"));
    ok(d, &format!("compare plain.raw xts256.vmdk {second}"));
    ok(d, &format!("compare {KEYS} xts256.vmdk xts256.vmdk {second}"));
    ok(d, "compare bare.raw xts256.vmdk");
    vdimg(d, &format!("compare {KEYS} xts256.vmdk xts256.vmdk"))
        .status()
        .map(|s| assert_eq!(s.code(), Some(1)))
        .unwrap();
}

#[test]
fn the_set_s_fixture_reads_right() {
    let Some(set) = std::env::var_os("VDBLK_FIXTURES").map(PathBuf::from) else {
        eprintln!("skipped: VDBLK_FIXTURES does not say where the set of fixtures is");
        return;
    };
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(set.join("manifest.json")).unwrap()).unwrap();
    let images = manifest["images"].as_array().unwrap();
    let image = images.iter().find(|i| i["id"] == "vdi-encrypted-xts128").expect("an encrypted image");
    let dir = scratch();
    let store = &image["keystore_properties_from_vbox_xml"][1][1];
    fs::write(dir.path().join("store.txt"), store.as_str().unwrap()).unwrap();
    fs::write(dir.path().join("password"), image["password"].as_str().unwrap()).unwrap();
    let file = set.join(image["file"].as_str().unwrap());
    ok(dir.path(), &format!("convert --output-format raw {KEYS} {} out.raw", file.display()));
    assert_eq!(sha(&dir.path().join("out.raw")), image["sha256"].as_str().unwrap());
}

#[test]
fn wrong_keys_are_refused_in_one_line() {
    let dir = fixture();
    let d = dir.path();
    fs::write(d.join("wrong"), "vdblk-dew\n").unwrap();
    fs::write(d.join("empty"), "\n").unwrap();
    fs::write(d.join("nonsense"), "not a key store").unwrap();
    fs::write(d.join("other.vbox"), "<VirtualBox/>").unwrap();
    for (keys, status, wanted) in [
        (
            "--password-file wrong --key-store store.txt",
            1,
            "wrong: the password is not the one of the key store",
        ),
        ("--password-file empty --key-store store.txt", 1, "empty: holds no password"),
        ("--password-file none --key-store store.txt", 1, "none: cannot open it"),
        ("--password-file password --key-store none", 1, "none: cannot open it"),
        ("--password-file password --key-store nonsense", 1, "nonsense: is not a key store"),
        ("--password-file password --key-store xts256.vmdk", 1, "xts256.vmdk: is not a key store"),
        ("--password-file password --key-store other.vbox", 1, "other.vbox: names no key store"),
        ("--password-file password", 2, "--key-store"),
        ("--key-store store.txt", 2, "--password-file"),
    ] {
        let line = fails(d, status, &format!("map {keys} xts256.vmdk"));
        assert!(line.contains(wanted), "{keys}: {line}");
    }
}

#[test]
fn the_password_may_come_from_standard_input() {
    let dir = fixture();
    let mut c = vdimg(dir.path(), "io --password-file - --key-store store.txt xts256.vmdk");
    c.args(["-c", "write -P 0x41 4k 8k", "-c", "write -z 64k 64k", "-c", "read -P 0x41 8k 4k"]);
    c.args(["-c", "read -P 0 64k 64k", "-c", "discard 4k 4k", "-c", "read -P 0 4k 4k"]);
    let out = c.stdin(fs::File::open(dir.path().join("password")).unwrap()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let c = vdimg(dir.path(), "map --password-file - --key-store store.txt xts256.vmdk").output().unwrap();
    let line = failed("an empty standard input", 1, c);
    assert!(line.contains("standard input: holds no password"), "{line}");
    // zeros that were written are there for programs that decrypt all there is
    ok(
        dir.path(),
        &format!("convert --output-format raw {KEYS} --unallocated virtualbox xts256.vmdk out.raw"),
    );
    let shown = fs::read(dir.path().join("out.raw")).unwrap();
    assert!(shown[64 << 10..128 << 10].iter().all(|b| *b == 0));
    assert!(shown[8 << 10..12 << 10].iter().all(|b| *b == 0x41));
}

/// A folder with passwords, and an image of 16 MiB with data here and there.
fn image(format: &str, name: &str) -> TempDir {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("pw"), "first\n").unwrap();
    fs::write(d.join("pw2"), "second").unwrap();
    ok(d, &format!("create --format {format} --size 16M {name}"));
    fill(d, name, "");
    dir
}

fn fill(d: &Path, name: &str, keys: &str) {
    let mut c = vdimg(d, &format!("io {keys} {name}"));
    for command in
        ["write -P 0x11 0 300k", "write -P 0x22 5M 1M", "write -z 9M 64k", "write -P 0x33 16776704 512"]
    {
        c.args(["-c", command]);
    }
    assert!(c.status().unwrap().success());
}

fn uuid_of(d: &Path, name: &str) -> String {
    let info: serde_json::Value =
        serde_json::from_str(&ok(d, &format!("info --output json {name}"))).unwrap();
    info["uuid"].to_string() + &info["modification_uuid"].to_string()
}

#[test]
fn encrypted_rekeyed_and_decrypted_it_shows_the_same() {
    for (format, name) in
        [("vdi", "a.vdi"), ("raw", "a.raw"), ("vmdk", "a.vmdk"), ("vhd", "a.vhd"), ("qcow2", "a.qcow2")]
    {
        for place in ["", "--in-place"] {
            let dir = image(format, name);
            let d = dir.path();
            ok(d, &format!("convert --output-format raw {name} plain.raw"));
            let before = uuid_of(d, name);
            ok(
                d,
                &format!(
                    "encrypt {place} --password-file pw --key-store k1 --cipher aes-xts128-plain64 {name}"
                ),
            );
            assert_eq!(uuid_of(d, name), before, "{format} {place}");
            let keys = "--password-file pw --key-store k1";
            ok(d, &format!("compare {keys} {name} plain.raw"));
            assert!(
                !fs::read(d.join(name)).unwrap().windows(64).any(|w| w == [0x22; 64]),
                "{format} {place}"
            );
            ok(d, &format!("check {name}"));
            ok(d, &format!("rekey {place} {keys} --new-password-file pw2 --new-key-store k2 {name}"));
            let keys = "--password-file pw2 --key-store k2";
            ok(d, &format!("compare {keys} {name} plain.raw"));
            ok(d, &format!("rekey --password-only {keys} --new-password-file pw --new-key-store k3 {name}"));
            ok(d, &format!("compare --password-file pw --key-store k3 {name} plain.raw"));
            ok(d, &format!("decrypt {place} {keys} {name}"));
            ok(d, &format!("compare {name} plain.raw"));
            assert_eq!(uuid_of(d, name), before, "{format} {place}");
            let left: Vec<_> =
                fs::read_dir(d).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            assert!(!left.iter().any(|n| n.contains("recrypt")), "{left:?}");
        }
    }
}

#[test]
fn key_stores_are_private_and_never_overwritten() {
    use std::os::unix::fs::PermissionsExt;
    let dir = image("vdi", "a.vdi");
    let d = dir.path();
    ok(d, "encrypt --password-file pw --key-store k1 --output b.vdi a.vdi");
    assert_eq!(fs::metadata(d.join("k1")).unwrap().permissions().mode() & 0o777, 0o600);
    let line = fails(d, 1, "encrypt --password-file pw --key-store k1 a.vdi");
    assert!(line.contains("k1: cannot make it") && line.contains("nothing is overwritten"), "{line}");
    // a command that fails leaves no key store behind, and no copy
    let line = fails(d, 1, "encrypt --password-file pw --key-store k2 --output b.vdi a.vdi");
    assert!(line.contains("b.vdi") && !d.join("k2").exists(), "{line}");
    fills_nothing(d);
}

fn fills_nothing(d: &Path) {
    let files = fs::read_dir(d).unwrap().count();
    assert_eq!(files, 5, "a.vdi, b.vdi, k1, pw, pw2");
}

#[test]
fn a_chain_changes_as_a_whole() {
    let dir = image("vdi", "base.vdi");
    let d = dir.path();
    ok(d, "create --format vdi --parent base.vdi mid.vdi");
    let mut c = vdimg(d, "io mid.vdi");
    assert!(c.args(["-c", "write -P 0x44 4M 3M"]).status().unwrap().success());
    ok(d, "create --format vmdk --parent base.vdi --parent mid.vdi top.vmdk");
    let mut c = vdimg(d, "io top.vmdk --parent base.vdi --parent mid.vdi");
    assert!(c.args(["-c", "write -P 0x55 6M 64k"]).status().unwrap().success());
    let chain = "--parent base.vdi --parent mid.vdi";
    ok(d, &format!("convert --output-format raw {chain} top.vmdk plain.raw"));
    let line = fails(d, 1, &format!("encrypt --password-file pw --key-store k1 {chain} top.vmdk"));
    assert!(line.contains("has parents") && line.contains("--in-place"), "{line}");
    let line = fails(d, 1, "encrypt --in-place --password-file pw --key-store k1 base.vdi");
    assert!(line.contains("base.vdi: is the parent of") && line.contains("keep the old key"), "{line}");
    assert!(!d.join("k1").exists());
    let encrypt = format!("encrypt --in-place --password-file pw --key-store k1 {chain} top.vmdk");
    if killed_once(d, &encrypt) {
        ok(d, &encrypt);
    }
    let keys = "--password-file pw --key-store k1";
    ok(d, &format!("compare {keys} {chain} top.vmdk plain.raw"));
    // written to as an encrypted chain, merged without the key, read with it
    let mut c = vdimg(d, &format!("io {keys} {chain} top.vmdk"));
    assert!(
        c.args(["-c", "write -P 0x66 1M 2M"])
            .args(["-c", "write -P 0x11 0 128k"])
            .status()
            .unwrap()
            .success()
    );
    ok(d, &format!("convert --output-format raw {keys} {chain} top.vmdk later.raw"));
    ok(d, &format!("merge {chain} top.vmdk --from mid.vdi --into base.vdi"));
    ok(d, &format!("compare {keys} --parent base.vdi top.vmdk later.raw"));
    ok(d, &format!("compact {keys} --parent base.vdi top.vmdk"));
    ok(d, &format!("compare {keys} --parent base.vdi top.vmdk later.raw"));
}

/// Kills the command once the chain has its side files; the base by itself is refused then. False: it was quicker.
fn killed_once(d: &Path, args: &str) -> bool {
    let mut child = vdimg(d, args).stderr(std::process::Stdio::null()).spawn().unwrap();
    let side = |name: &str| fs::metadata(d.join(name)).map_or(0, |m| m.len());
    while side("top.vmdk.recrypt") == 0 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
    child.kill().unwrap();
    if child.wait().unwrap().success() {
        return false;
    }
    assert!(side("base.vdi.recrypt") > 0 && side("mid.vdi.recrypt") > 0);
    let line = fails(d, 1, "map base.vdi");
    assert!(line.contains("its key was being changed"), "{line}");
    let wild = "encrypt --in-place --allow-write-to-parent --password-file pw --key-store k1 base.vdi";
    let line = fails(d, 1, wild);
    assert!(line.contains("base.vdi.recrypt: belongs to a change of keys of other images"), "{line}");
    true
}

#[test]
fn killed_in_place_it_is_refused_and_completed() {
    let dir = image("vdi", "a.vdi");
    let d = dir.path();
    ok(d, "resize a.vdi 64M");
    let mut c = vdimg(d, "io a.vdi");
    assert!(c.args(["-c", "write -P 0x77 0 60M"]).status().unwrap().success());
    ok(d, "convert --output-format raw a.vdi plain.raw");
    ok(d, "encrypt --password-file pw --key-store k0 --output e.vdi a.vdi");
    let noted = || fs::metadata(d.join("a.vdi.recrypt")).map_or(0, |m| m.len());
    let mut completed = 0;
    for (n, args) in [
        "encrypt --in-place --password-file pw --key-store k1 a.vdi",
        "rekey --in-place --password-file pw --key-store k1 --new-password-file pw2 --new-key-store k2 a.vdi",
        "decrypt --in-place --password-file pw2 --key-store k2 a.vdi",
    ]
    .into_iter()
    .enumerate()
    {
        // killed as soon as the side file has its head, or a record, and a few times more on its way
        for round in 0..4u64 {
            let mut child = vdimg(d, args).stderr(std::process::Stdio::null()).spawn().unwrap();
            let begun = std::time::Instant::now();
            let enough = if round == 0 { 1 } else { 1 << 20 };
            while noted() < enough && begun.elapsed().as_secs() < 60 && child.try_wait().unwrap().is_none() {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            std::thread::sleep(std::time::Duration::from_millis(round.saturating_sub(1) * 3));
            child.kill().unwrap();
            let status = child.wait().unwrap();
            if status.success() || !d.join("a.vdi.recrypt").exists() {
                break;
            }
            let line = fails(d, 1, "convert --output-format raw a.vdi no.raw");
            assert!(line.contains("its key was being changed") && line.contains("--in-place"), "{line}");
            // before that nothing of the image was touched, and any command may begin
            if noted() > 4096 {
                let line = fails(d, 1, "encrypt --in-place --password-file pw --key-store k0 a.vdi");
                assert!(line.contains("belongs to a change"), "{line}");
                completed += 1;
            }
        }
        if d.join("a.vdi.recrypt").exists() {
            ok(d, args);
        }
        let keys = ["--password-file pw --key-store k1", "--password-file pw2 --key-store k2", ""][n];
        ok(d, &format!("compare {keys} a.vdi plain.raw"));
    }
    assert!(completed > 0, "none was killed in time");
}

#[test]
fn conversions_and_clones_may_be_encrypted() {
    let dir = scratch();
    let d = dir.path();
    let mut rng = Rng(9);
    random_raw(&d.join("a.raw"), 6 * MIB, &mut rng);
    fs::write(d.join("pw"), "first\n").expect("write");
    let new = |keys: &str| format!("--new-password-file pw --new-key-store {keys}");
    ok(d, &format!("convert {} a.raw b.vdi", new("b.keys")));
    ok(d, "compare --password-file2 pw --key-store2 b.keys a.raw b.vdi");
    assert_eq!(run(d, "compare a.raw b.vdi").status.code(), Some(1), "it is encrypted");
    // From one key to another, and another cipher.
    let old = "--password-file pw --key-store b.keys";
    ok(d, &format!("clone {old} {} --new-cipher AES-XTS128-PLAIN64 b.vdi c.vdi", new("c.keys")));
    ok(d, &format!("compare {old} --password-file2 pw --key-store2 c.keys b.vdi c.vdi"));
    ok(d, "convert --password-file pw --key-store c.keys c.vdi d.qcow2");
    ok(d, "compare a.raw d.qcow2");
    // A key store of what could not be made goes again; one that is there stays.
    fails(d, 1, &format!("convert {} -O vmdk --variant stream a.raw s.vmdk", new("s.keys")));
    fails(d, 1, &format!("convert {} a.raw b.vdi", new("s.keys")));
    assert!(!d.join("s.keys").exists() && !d.join("s.vmdk").exists());
    fails(d, 1, &format!("convert {} a.raw e.vdi", new("b.keys")));
    assert!(d.join("b.keys").exists() && !d.join("e.vdi").exists());
    fails(d, 2, "convert --new-key-store x.keys a.raw e.vdi");
}

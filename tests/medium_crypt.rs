//! Encrypted known media: the key store goes where the bytes go, and a change of keys that is killed ends with the same command.

mod vdimg_support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vdimg_support::*;

const REGISTRY: &str = "medium --registry media.sqlite";

fn medium(dir: &Path, args: &str) -> String {
    ok(dir, &format!("{REGISTRY} {args}"))
}

fn refused(dir: &Path, args: &str, part: &str) {
    let said = fails(dir, 1, &format!("{REGISTRY} {args}"));
    assert!(said.contains(part), "{args}: {said}");
}

/// A registry with a base of random bytes and a diff over it; `plain.raw` is what the diff shows.
fn chain(size: u64) -> tempfile::TempDir {
    let dir = scratch();
    let d = dir.path();
    random_raw(&d.join("random.raw"), size, &mut Rng(0x6372_7970));
    ok(d, "convert --output-format vdi random.raw base.vdi");
    ok(d, "create --format vdi --parent base.vdi top.vdi");
    io_ok(d, "top.vdi", &["write -P 7 1M 512k", "write -P 9 2560k 64k"]);
    ok(d, "convert top.vdi plain.raw");
    medium(d, "add top.vdi");
    for (name, password) in [("pw", "secret\n"), ("pw2", "other"), ("wrong", "guess\n")] {
        fs::write(d.join(name), password).expect("write");
    }
    dir
}

/// What the medium shows with its key store and this password.
fn assert_shows_plain(d: &Path, image: &str, base: &str, password: &str) {
    let keys = medium(d, &format!("property {base} CRYPT/KeyStore"));
    fs::write(d.join("keys"), keys).expect("write");
    ok(d, &format!("compare --password-file {password} --key-store keys {image} plain.raw"));
}

fn differs(d: &Path, image: &str) {
    assert_eq!(run(d, &format!("compare {image} plain.raw")).status.code(), Some(1));
}

#[test]
fn a_chain_is_encrypted_gets_another_password_another_key_and_none() {
    let dir = chain(4 << 20);
    let d = dir.path();
    refused(d, "encryption top.vdi", "VBOX_E_NOT_SUPPORTED");
    refused(d, "decrypt --password-file pw top.vdi", "VBOX_E_NOT_SUPPORTED");
    refused(d, "encrypt --password-file pw base.vdi", "VBOX_E_OBJECT_IN_USE");
    medium(d, "encrypt --cipher aes-xts128-plain64 --password-file pw --password-id one top.vdi");
    differs(d, "top.vdi");
    assert_shows_plain(d, "top.vdi", "base.vdi", "pw");
    assert_eq!(medium(d, "encryption --password-file pw top.vdi"), "AES-XTS128-PLAIN64, password one\n");
    refused(d, "encryption --password-file wrong base.vdi", "VBOX_E_PASSWORD_INCORRECT");
    refused(d, "encrypt --password-file pw2 top.vdi", "VBOX_E_PASSWORD_INCORRECT");
    refused(d, "encrypt --old-password-file wrong --password-file pw2 top.vdi", "VBOX_E_PASSWORD_INCORRECT");
    // Another password leaves the bytes alone.
    let before = (fs::read(d.join("base.vdi")).expect("read"), fs::read(d.join("top.vdi")).expect("read"));
    medium(d, "set-password --old-password-file pw --password-file pw2 --password-id two top.vdi");
    refused(d, "encryption --password-file pw top.vdi", "VBOX_E_PASSWORD_INCORRECT");
    assert_shows_plain(d, "top.vdi", "base.vdi", "pw2");
    let after = (fs::read(d.join("base.vdi")).expect("read"), fs::read(d.join("top.vdi")).expect("read"));
    assert!(before == after, "a new password changed an image");
    // Another key does not.
    medium(d, "encrypt --old-password-file pw2 --password-file pw top.vdi");
    assert!(before.0 != fs::read(d.join("base.vdi")).expect("read"));
    assert_eq!(medium(d, "encryption --password-file pw base.vdi"), "AES-XTS256-PLAIN64\n");
    assert_shows_plain(d, "top.vdi", "base.vdi", "pw");
    medium(d, "decrypt --password-file pw top.vdi");
    ok(d, "compare top.vdi plain.raw");
    ok(d, "check top.vdi");
    refused(d, "property base.vdi CRYPT/KeyStore", "has no property");
    assert!(!medium(d, "show base.vdi --output json").contains("vdblk/encryption"));
}

#[test]
fn the_key_store_goes_where_the_bytes_go_and_is_not_lost_by_mistake() {
    let dir = chain(4 << 20);
    let d = dir.path();
    medium(d, "encrypt --password-file pw top.vdi");
    refused(d, "property --delete base.vdi CRYPT/KeyStore", "decrypt");
    refused(d, "property base.vdi CRYPT/KeyStore AAAA", "VBOX_E_OBJECT_IN_USE");
    refused(d, "property base.vdi vdblk/encryption {}", "E_INVALIDARG");
    refused(d, "property top.vdi CRYPT/KeyStore AAAA", "is not a key store");
    medium(d, "property top.vdi note hello");
    assert_eq!(medium(d, "property top.vdi"), "note=hello\n");
    assert_eq!(medium(d, "property top.vdi note"), "hello\n");
    medium(d, "property --delete top.vdi note");
    refused(d, "property top.vdi note", "has no property");
    medium(d, "clone --format vmdk top.vdi clone.vmdk");
    assert_shows_plain(d, "clone.vmdk", "clone.vmdk", "pw");
    // Upwards: the diff becomes the base.
    medium(d, "merge base.vdi --into top.vdi");
    assert!(!d.join("base.vdi").exists());
    assert_shows_plain(d, "top.vdi", "top.vdi", "pw");
    medium(d, "decrypt --password-file pw top.vdi");
    ok(d, "compare top.vdi plain.raw");
}

/// Runs a command and kills it after `delay`; whether it had ended by itself.
fn killed(d: &Path, args: &str, delay: Duration) -> bool {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vdimg"));
    c.current_dir(d).args(REGISTRY.split(' ')).args(args.split(' '));
    let mut child = c.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start");
    std::thread::sleep(delay);
    let ended = child.try_wait().expect("wait").is_some();
    child.kill().expect("kill");
    child.wait().expect("wait");
    ended
}

#[test]
fn killed_at_any_moment_the_same_command_completes_a_change() {
    let dir = chain(32 << 20);
    let d = dir.path();
    let commands = [
        "encrypt --password-file pw top.vdi",
        "encrypt --old-password-file pw --password-file pw2 top.vdi",
        "decrypt --password-file pw2 top.vdi",
    ];
    let began = Instant::now();
    for command in commands {
        medium(d, command);
    }
    let whole = began.elapsed() / 3;
    let mut rng = Rng(0x6b69_6c6c);
    let mut cut = 0;
    let rounds = std::env::var("VDBLK_MEDIUM_KILLS").map_or(9, |n| n.parse().expect("a number"));
    for round in 0..rounds {
        let command = commands[round % 3];
        for _ in 0..3 {
            let micros = u64::try_from(whole.as_micros()).expect("seconds") + 1;
            if killed(d, command, Duration::from_micros(rng.below(micros))) {
                break;
            }
            cut += 1;
        }
        let again = run(d, &format!("{REGISTRY} {command}"));
        let said = text(&again.stderr);
        // It may have ended just before it was killed: then what it was to do is done.
        let done = ["VBOX_E_PASSWORD_INCORRECT", "VBOX_E_NOT_SUPPORTED"].iter().any(|c| said.contains(c));
        assert!(again.status.success() || done, "{command}: {said}");
        match round % 3 {
            0 => assert_shows_plain(d, "top.vdi", "base.vdi", "pw"),
            1 => assert_shows_plain(d, "top.vdi", "base.vdi", "pw2"),
            _ => drop(ok(d, "compare top.vdi plain.raw")),
        }
    }
    assert!(cut > rounds / 3, "{cut} kills hit something");
    println!("{cut} kills in {rounds} changes, {whole:?} each");
}

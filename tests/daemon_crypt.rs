//! Encrypted chains served to a front-end: what it writes it reads, nothing of it is in the files, and vdimg reads it with the key.

mod daemon_support;

use daemon_support::images::MIB;
use daemon_support::process::{Daemon, run, vdblk};
use daemon_support::scratch;
use daemon_support::vubench::{number, vubench};
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn vdimg(dir: &Path, words: &str) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vdimg"));
    c.current_dir(dir).args(words.split_whitespace()).output().expect("vdimg")
}

#[track_caller]
fn ok(dir: &Path, words: &str) {
    let out = vdimg(dir, words);
    assert!(out.status.success(), "{words}: {out:?}");
}

const KEYS: &str = "--password-file pw --key-store keys";

/// An encrypted base, which is written to by this command, and a diff over it.
fn chain(command: &str) -> tempfile::TempDir {
    let dir = scratch();
    let d = dir.path();
    fs::write(d.join("pw"), "secret\n").expect("write");
    ok(d, "create --format vdi --size 12M base.vdi");
    ok(d, "encrypt --password-file pw --key-store keys base.vdi");
    let mut c = Command::new(env!("CARGO_BIN_EXE_vdimg"));
    c.current_dir(d).arg("io").args(KEYS.split(' ')).args(["base.vdi", "-c", command]);
    assert!(c.output().expect("vdimg").status.success());
    ok(d, "create --format vdi --parent base.vdi top.vdi");
    dir
}

fn serve(d: &Path, more: &[&str]) -> Daemon {
    let (pw, keys) = (d.join("pw"), d.join("keys"));
    let own = ["--password-file", pw.to_str().expect("text"), "--key-store", keys.to_str().expect("text")];
    Daemon::serve(&d.join("top.vdi"), &[&own[..], more].concat())
}

#[test]
fn random_requests_on_an_encrypted_chain() {
    for (cache, engine) in [("writeback", "io_uring"), ("none", "io_uring"), ("writethrough", "threads")] {
        let dir = chain("write -z 1M 5M");
        let d = dir.path();
        let daemon = serve(d, &["--num-queues", "2", "--cache", cache, "--io-engine", engine]);
        assert!(daemon.log().contains("encrypted"), "{}", daemon.log());
        let model = d.join("model.raw");
        let (ended, result) = vubench(
            &daemon.socket,
            &[
                "--verify",
                "--assume-zero",
                "--dump-model",
                model.to_str().expect("text"),
                "--runtime",
                "1",
                "--queues",
                "2",
            ],
        );
        assert!(ended.status.success(), "{cache}: {ended:?}");
        for key in ["mismatches", "errors", "lost", "duplicates"] {
            assert_eq!(number(&result, key), 0, "{cache}: {key} in {result}");
        }
        assert!(number(&result, "writes") > 20 && number(&result, "reads") > 5, "{cache}: {result}");
        assert!(daemon.stop().status.success());
        ok(d, &format!("compare {KEYS} top.vdi model.raw"));
        ok(d, "check top.vdi");
    }
}

#[test]
fn a_guest_s_bytes_are_not_in_the_files() {
    let dir = chain("write -P 0x6b 1M 5M");
    let d = dir.path();
    let daemon = serve(d, &[]);
    let mut guest = daemon.connect();
    for n in 0..20 {
        guest.mark(n * 300 * 1024 / 512 * 512, 7);
    }
    guest.assert_marked(0, 7);
    assert_eq!(guest.flush(), 0);
    assert_eq!(guest.read(2 * MIB + 4096, 512), vec![0x6b; 512], "what shows through");
    drop(guest);
    assert!(daemon.stop().status.success());
    let marked = daemon_support::client::pattern(7);
    for name in ["top.vdi", "base.vdi"] {
        let bytes = fs::read(d.join(name)).expect("read");
        assert!(!bytes.windows(64).any(|w| w == &marked[..64] || w == [0x6b; 64]), "{name}");
    }
    // an overlay takes its key from the same options
    let daemon = serve(d, &["--overlay", d.join("over.vdi").to_str().expect("text")]);
    let mut guest = daemon.connect();
    guest.assert_marked(0, 7);
    guest.mark(8 * MIB, 9);
    guest.assert_marked(8 * MIB, 9);
    drop(guest);
    assert!(daemon.stop().status.success());
    assert!(
        !fs::read(d.join("over.vdi"))
            .expect("read")
            .windows(64)
            .any(|w| w == &daemon_support::client::pattern(9)[..64])
    );
}

#[test]
fn wrong_keys_end_the_start_with_one_line() {
    let dir = chain("flush");
    let d = dir.path();
    fs::write(d.join("wrong"), "other\n").expect("write");
    let path = |n: &str| d.join(n).to_str().expect("text").to_string();
    let socket = path("socket");
    let image = path("top.vdi");
    let (wrong, keys) = (path("wrong"), path("keys"));
    let common = ["--socket-path", &socket, "--blk-file", &image, "--password-file", &wrong];
    run(vdblk(&[&common[..], &["--key-store", &keys]].concat()))
        .assert_refused(&["wrong", "password is not the one"]);
}

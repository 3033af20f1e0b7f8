//! VirtualBox and QEMU on images of every kind that vdblk writes, in turn with vdblk itself: a few of each here, sixty by
//! `scripts/oracle/interop.sh formats`. Only where the oracle is set up (`scripts/oracle/setup.sh`).

use std::path::{Path, PathBuf};
use std::process::Command;

/// Of each kind; a format has one to seven kinds.
const IMAGES: &str = "2";

fn chroot() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/vdblk-oracle/sid");
    std::env::var_os("ORACLE_CHROOT").map_or_else(home, PathBuf::from)
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output();
    id.is_ok_and(|o| o.stdout == b"0\n")
}

#[test]
fn images_go_round_between_vdblk_qemu_and_virtualbox() {
    if !is_root() || !chroot().join("usr/bin/VBoxManage").exists() {
        return println!("skipped: VirtualBox and QEMU are not set up, or this is not root");
    }
    let programs = Path::new(env!("CARGO_BIN_EXE_vdblk")).parent().expect("their folder");
    if !programs.join("examples/vubench").exists() {
        return println!("skipped: vubench is not built");
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/oracle/interop.sh");
    let out = Command::new(script).args(["formats", "--images", IMAGES, "--bin"]).arg(programs).output();
    let out = out.expect("start the script");
    let said = String::from_utf8_lossy(&out.stdout);
    println!("{said}");
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    assert!(said.contains("all compared equal"), "{said}");
}

#[test]
fn virtualbox_and_vdimg_read_what_the_other_has_encrypted() {
    if !is_root() || !chroot().join("usr/bin/VBoxManage").exists() {
        return println!("skipped: VirtualBox is not set up, or this is not root");
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/oracle/crypt.sh");
    let out =
        Command::new(script).env("VDIMG", env!("CARGO_BIN_EXE_vdimg")).output().expect("start the script");
    let said = String::from_utf8_lossy(&out.stdout);
    println!("{said}");
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(said.matches("VirtualBox and vdimg read each other's").count(), 4, "{said}");
}

#!/bin/bash
# demo.sh - on a fresh Debian 12: builds vdblk, makes an 8 GiB VDI, serves it, boots a Linux guest on it
# and prints what fio measures in that guest. About 2 minutes after the build; leaves nothing behind but
# the build and the guest's kernel in ~/.cache/vdblk-guest.
#   demo.sh [--bin DIR] [options of guest/guest-test.sh]
#   --bin DIR      take vdblk and vdimg from there instead of building them
#   --accel kvm    where /dev/kvm works; without it QEMU interprets the guest, which costs it speed
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=''
case ${1:-} in
-h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
--bin) BIN=$(realpath "$2"); shift 2 ;;
esac

step() { printf '\n== %s\n' "$*"; }

if [ -z "$BIN" ]; then
    command -v cargo >/dev/null || PATH=$PATH:$(getent passwd "${SUDO_USER:-$(id -un)}" | cut -d: -f6)/.cargo/bin
    command -v cargo >/dev/null || { echo "demo: there is no cargo; install Rust first (rustup)" >&2; exit 1; }
    v=$(cargo --version | cut -d' ' -f2)
    [ "$(printf '1.88\n%s\n' "$v" | sort -V | head -1)" = 1.88 ] || {
        echo "demo: cargo $v is too old; Rust 1.88 or newer is needed (rustup has it)" >&2
        exit 1
    }
fi

step "packages"
"$HERE/guest/deps.sh"

if [ -z "$BIN" ]; then
    step "build"
    cargo build --release --locked --bins --manifest-path "$HERE/../Cargo.toml"
    BIN=${CARGO_TARGET_DIR:-$HERE/../target}/release
    BIN=$(realpath "$BIN")
fi

step "guest"
"$HERE/guest/mkguest.sh"

T=$(mktemp -d "${TMPDIR:-/tmp}/vdblk-demo.XXXXXX")
trap 'rm -rf "$T"' EXIT
trap 'exit 130' INT TERM

step "vdimg create --format vdi --size 8G demo.vdi"
"$BIN/vdimg" create --format vdi --size 8G "$T/demo.vdi"

step "vdblk --socket-path S --blk-file demo.vdi --num-queues 2, and a guest on it"
"$HERE/guest/guest-test.sh" --tests 'boot-check bench' --queues 2 --size $((8 << 30)) \
    --server-cmd "$BIN/vdblk --socket-path @S --blk-file $T/demo.vdi --num-queues 2" "$@"

#!/bin/bash
# demo.sh - on a fresh Debian 12: builds vdblk, makes an 8 GiB VDI, serves it, boots a Linux guest on it
# and prints what fio measures in that guest. About 2 minutes after the build; leaves nothing behind but
# the build and the guest's kernel in ~/.cache/vdblk-guest.
#   demo.sh [--bin DIR] [--accel kvm|tcg] [--queues N] [--timeout SEC] [other options of guest/guest-test.sh]
#   --bin DIR      take vdblk and vdimg from there instead of building them
#   --accel NAME   kvm or tcg, where QEMU interprets the guest (kvm where it works, else tcg)
#   --queues N     virtqueues, and CPUs of the guest, 1 to 64 (2)
#   --timeout SEC  for the guest (180; under tcg on a slow machine more may be needed)
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN='' ACCEL='' QUEUES=2 PASS=()

die() { echo "demo: $*" >&2; exit 2; }
step() { printf '\n== %s\n' "$*"; }

while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --bin | --accel | --queues | --timeout | --env | --machine | --cpu | --mem | --queue-size | --qemu | --dev-opts | \
        --chardev-opts | --append | --arg | --guest | --console | --seed) ;;
    *) die "unknown option $1 (see demo.sh --help)" ;;
    esac
    [ $# -ge 2 ] || die "$1 wants a value"
    case $1 in
    --bin)
        BIN=$(realpath -e "$2") || die "there is no folder $2"
        for p in vdblk vdimg; do [ -x "$BIN/$p" ] || die "$2 has no program $p"; done
        ;;
    --accel)
        case $2 in kvm | tcg | tcg,*) ACCEL=$2 ;; *) die "--accel is kvm or tcg, not $2" ;; esac
        ;;
    --queues)
        case $2 in '' | *[!0-9]*) die "--queues wants a number" ;; esac
        { [ "$2" -ge 1 ] && [ "$2" -le 64 ]; } || die "--queues is 1 to 64"
        QUEUES=$2
        ;;
    --timeout)
        case $2 in '' | *[!0-9]*) die "--timeout wants seconds" ;; esac
        PASS+=("$1" "$2")
        ;;
    *) PASS+=("$1" "$2") ;;
    esac
    shift 2
done

if [ -z "$BIN" ]; then
    command -v cargo >/dev/null || PATH=$PATH:$(getent passwd "${SUDO_USER:-$(id -un)}" | cut -d: -f6)/.cargo/bin
    command -v cargo >/dev/null || { echo "demo: there is no cargo; install Rust first (rustup)" >&2; exit 1; }
    v=$(cargo --version | cut -d' ' -f2)
    [ "$(printf '1.88\n%s\n' "$v" | sort -V | head -1)" = 1.88 ] || {
        echo "demo: cargo $v is too old; Rust 1.88 or newer is needed (rustup has it)" >&2
        exit 1
    }
fi

T=$(mktemp -d "${TMPDIR:-/tmp}/vdblk-demo.XXXXXX")
trap 'rm -rf "$T"' EXIT
trap 'exit 130' INT TERM

# True if KVM runs a guest, and in a reasonable time: /dev/kvm alone says nothing (permissions, a machine that is virtual
# itself and whose KVM is slower than TCG). A boot sector writes 16 to a port at which QEMU ends with the status
# 2 * 16 + 1. That takes well under a second. On the processor the guest will have: some hosts refuse a part of it.
kvm_works() {
    { printf '\260\020\346\364\353\376'; head -c 504 /dev/zero; printf '\125\252'; } >"$T/boot"
    local rc=0
    timeout 5 qemu-system-x86_64 -accel kvm -cpu max -m 64 -nodefaults -no-user-config -display none \
        -drive "file=$T/boot,format=raw,if=ide" -device isa-debug-exit,iobase=0xf4,iosize=4 \
        </dev/null >/dev/null 2>"$T/kvm" || rc=$?
    case $rc in
    33) return 0 ;;
    124) WHY="a boot sector takes more than 5 s under it" ;;
    *) WHY=$(grep -v warning "$T/kvm" | head -1) ;;
    esac
    return 1
}

step "packages"
"$HERE/guest/deps.sh"

step "acceleration"
WHY=
if [ "$ACCEL" = kvm ]; then
    kvm_works || echo "demo: KVM does not look usable here: $WHY; it is used all the same, as --accel says" >&2
elif [ -z "$ACCEL" ]; then
    if kvm_works; then ACCEL=kvm; else ACCEL=tcg,thread=multi; fi
fi
if [ "$ACCEL" = kvm ]; then echo "KVM"; else echo "TCG${WHY:+, as KVM is not usable here: $WHY}"; fi

if [ -z "$BIN" ]; then
    step "build"
    cargo build --release --locked --bins --manifest-path "$HERE/../Cargo.toml"
    BIN=${CARGO_TARGET_DIR:-$HERE/../target}/release
    BIN=$(realpath "$BIN")
fi

step "guest"
"$HERE/guest/mkguest.sh"

step "vdimg create --format vdi --size 8G demo.vdi"
"$BIN/vdimg" create --format vdi --size 8G "$T/demo.vdi"

step "vdblk --socket-path S --blk-file demo.vdi --num-queues $QUEUES, and a guest on it"
"$HERE/guest/guest-test.sh" --tests 'boot-check bench' --queues "$QUEUES" --size $((8 << 30)) --accel "$ACCEL" \
    --server-cmd "$BIN/vdblk --socket-path @S --blk-file $T/demo.vdi --num-queues $QUEUES" ${PASS[@]+"${PASS[@]}"}
[ "$ACCEL" = kvm ] || echo "
These are figures of an interpreted CPU (TCG), and say little about vdblk's speed: the guest itself takes most of the
time. benches/vubench/README.md says how to measure vdblk without a guest."

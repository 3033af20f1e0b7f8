#!/usr/bin/env bash
# guest-bench.sh - fio in a real Linux guest with two disks in one boot: one served by vdblk, one by QEMU's storage daemon (of the
# folder of scripts/oracle/setup.sh, else of the PATH), each with a file of its own, of the same bytes. Which of the two disks is
# measured first alternates. Prints medians, and the ratio vdblk/QEMU.
#   guest-bench.sh [--bin DIR] [--format raw|vdi|…] [--size 1G] [--dir DIR] [--self] [options of guest/ab-fio.sh or run-guest.sh]
#   --format NAME  of the image (vdi)     --dir DIR  on the file system to be measured (default: a folder under /var/tmp)
#   --self         vdblk against itself: how much of a difference is noise
# Under KVM the figures mean something; where QEMU interprets the guest (TCG, the default where KVM is not usable) the guest takes most
# of the time, and both look alike.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../target/release FORMAT=vdi SIZE=1G DIR=/var/tmp SELF='' PASS=()
die() { echo "guest-bench: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --self) SELF=1; shift; continue ;;
    esac
    [ $# -ge 2 ] || die "$1 wants a value"
    case $1 in
    --bin) BIN=$2 ;;
    --format) FORMAT=$2 ;;
    --size) SIZE=$2 ;;
    --dir) DIR=$2 ;;
    *) PASS+=("$1" "$2") ;;
    esac
    shift 2
done
BIN=$(realpath -e "$BIN") || die "no programs in $BIN: cargo build --release"
[ -x "$BIN/vdblk" ] || die "no programs in $BIN: cargo build --release"

T=$(mktemp -d "$DIR/vdblk-guest-bench.XXXXXX")
SERVERS=()
ended() {
    [ ${#SERVERS[@]} = 0 ] || kill "${SERVERS[@]}" 2>/dev/null || true
    wait
    rm -rf "$T"
}
trap ended EXIT
trap 'exit 130' INT TERM

"$HERE/guest/deps.sh" >/dev/null
"$HERE/guest/mkguest.sh" >/dev/null

# serve NAME COMMAND…: starts it and waits for its socket
serve() {
    local name=$1 i
    shift
    "$@" >"$T/$name.log" 2>&1 &
    SERVERS+=($!)
    for i in $(seq 100); do
        [ ! -S "$T/$name.sock" ] || return 0
        sleep 0.1
    done
    die "$name does not listen: $(tail -3 "$T/$name.log")"
}
vdblk() { serve "$1" "$BIN/vdblk" --socket-path "$T/$1.sock" --blk-file "$T/$1.$FORMAT" --num-queues 1 --log-level error; }
qsd() {
    local command driver=$FORMAT
    [ "$FORMAT" != vhd ] || driver=vpc
    mapfile -t command < <(cd "$HERE/bench" && python3 -c 'import peers; print(*(peers.foreign("qemu-storage-daemon") or []), sep="\n")')
    [ -n "${command[*]}" ] || die "there is no qemu-storage-daemon (scripts/oracle/setup.sh, or --self)"
    serve "$1" "${command[@]}" --blockdev "driver=file,node-name=f,filename=$T/$1.$FORMAT,aio=io_uring" \
        --blockdev "driver=$driver,node-name=d,file=f" \
        --export "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=$T/$1.sock,writable=on,num-queues=1"
}

for n in a b; do "$BIN/vdimg" create --format "$FORMAT" --size "$SIZE" "$T/$n.$FORMAT" >/dev/null; done
vdblk a
if [ -n "$SELF" ]; then vdblk b; else qsd b; fi
NAME_B=qemu
[ -z "$SELF" ] || NAME_B=vdblk-again
# QEMU's daemon offers no change of the cache's mode: its guest would see write through
"$HERE/guest/ab-fio.sh" "$T/a.sock" "$T/b.sock" --name-a vdblk --name-b "$NAME_B" --dev-opts config-wce=off \
    ${PASS[@]+"${PASS[@]}"}

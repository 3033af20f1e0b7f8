#!/bin/bash
# test-images.sh - the tests of guest-test.sh on every kind of image: raw, VDI dynamic, fixed, diff, chain of 4.
# Each is served by vdblk to a guest with two queues; afterwards vdimg check, qemu-img check and a byte compare with the
# model, and for diffs: the parents are untouched. About a minute each. --kills N: instead kill-test.sh, the server killed N
# times under the guest's load.
#   test-images.sh [--bin DIR] [--engine io_uring|threads] [--cache MODE] [--kills N] [KIND …]
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../../target/release ENGINE=auto CACHE=writeback KILLS=0
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --bin) BIN=$2; shift 2 ;;
    --engine) ENGINE=$2; shift 2 ;;
    --cache) CACHE=$2; shift 2 ;;
    --kills) KILLS=$2; shift 2 ;;
    -*) echo "test-images: unknown $1" >&2; exit 2 ;;
    *) break ;;
    esac
done
BIN=$(realpath "$BIN")
KINDS=${*:-raw dynamic fixed diff chain}
SIZE=$((768 << 20))
W=$(mktemp -d "${TMPDIR:-/tmp}/vdi.XXXXXX")
trap 'rm -rf "$W"' EXIT
trap 'exit 130' INT TERM

vdimg() { "$BIN/vdimg" "$@"; }

# make_chain N: images 1 (base) to N, each with some data of its own; the top one is $W/N.vdi
make_chain() {
    local i
    vdimg create --format vdi --size $SIZE "$W/1.vdi"
    for ((i = 1; i <= $1; i++)); do
        [ $i = 1 ] || vdimg create --format vdi --parent "$W/$((i - 1)).vdi" "$W/$i.vdi"
        [ $i = "$1" ] || vdimg io "$W/$i.vdi" -c "write -P $((i + 64)) $((i * 777216)) 5M" \
            -c "write -P $((i + 96)) $((300 + i * 40))M 24M" -c flush
    done
}

make() { # KIND: makes it and sets IMAGE, TOP (the image as vdimg's options) and PARENTS
    PARENTS=()
    case $1 in
    raw) IMAGE=$W/a.raw; truncate -s $SIZE "$IMAGE" ;;
    dynamic) IMAGE=$W/a.vdi; vdimg create --format vdi --size $SIZE "$IMAGE" ;;
    fixed) IMAGE=$W/a.vdi; vdimg create --format vdi --variant fixed --size $SIZE "$IMAGE" ;;
    diff) make_chain 2; IMAGE=$W/2.vdi; PARENTS=("$W/1.vdi") ;;
    chain) make_chain 4; IMAGE=$W/4.vdi; PARENTS=("$W/1.vdi" "$W/2.vdi" "$W/3.vdi") ;;
    *) echo "test-images: no such kind: $1" >&2; exit 2 ;;
    esac
}

# KIND: what is left of the image, by our tool and by others. It is called as a condition, where -e does not hold.
judge() {
    local sums
    case $1 in
    raw) return ;;
    esac
    vdimg check "$IMAGE" || return 1
    case $1 in
    dynamic | fixed)
        qemu-img check -q -f vdi "$IMAGE" || return 1
        qemu-img convert -f vdi -O raw "$IMAGE" "$W/by-qemu.raw" || return 1
        vdimg compare "$IMAGE" "$W/by-qemu.raw" || return 1
        ;;
    esac
    if [ ${#PARENTS[@]} -gt 0 ]; then
        sums=$(sha256sum "${PARENTS[@]}")
        [ "$sums" = "$SUMS" ] || { echo "FAIL: a parent was changed"; return 1; }
    fi
}

run() { # on $IMAGE
    local server="$BIN/vdblk --socket-path @S --blk-file $IMAGE --num-queues 2 --io-engine $ENGINE --cache $CACHE"
    # what a killed one has under way may take long on a busy disk
    server="$server --lock-wait 25"
    if [ "$KILLS" -gt 0 ]; then
        "$HERE/kill-test.sh" --server-cmd "$server" --queues 2 --kills "$KILLS"
    else
        "$HERE/guest-test.sh" --tests 'boot-check fio-verify fs pattern' --queues 2 --size $SIZE \
            --server-cmd "$server" --export-cmd "$BIN/vdimg convert --output-format raw $IMAGE @O"
    fi
}

failed=''
for kind in $KINDS; do
    printf '\n######## %s\n' "$kind"
    make "$kind"
    SUMS=''
    [ ${#PARENTS[@]} = 0 ] || SUMS=$(sha256sum "${PARENTS[@]}")
    if run && judge "$kind"; then
        echo "######## $kind: ok"
    else
        failed="$failed $kind"
        echo "######## $kind: FAILED"
    fi
    rm -f "$W"/*
done
[ -z "$failed" ] || { echo "test-images: FAILED:$failed"; exit 1; }
echo "test-images: all ok ($KINDS)"

#!/bin/bash
# test-images.sh - the tests of guest-test.sh on every kind of image that vdblk writes: raw; VDI dynamic, fixed, diff, chain
# of 4; the variants of the other formats (--list names them; kinds of a format that vdimg does not create yet are left out).
# Each is served by vdblk to a guest with two queues; afterwards vdimg check, qemu-img check and a byte compare with the
# model, and for diffs: the parents are untouched. About a minute each. --kills N: instead kill-test.sh, the server killed N
# times under the guest's load.
#   test-images.sh [--bin DIR] [--engine io_uring|threads] [--cache MODE] [--kills N] [--timeout SEC] [--list] [KIND …]
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../../target/release ENGINE=auto CACHE=writeback KILLS=0 LIST='' TMO=180
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --bin) BIN=$2; shift 2 ;;
    --engine) ENGINE=$2; shift 2 ;;
    --cache) CACHE=$2; shift 2 ;;
    --kills) KILLS=$2; shift 2 ;;
    --timeout) TMO=$2; shift 2 ;;
    --list) LIST=1; shift ;;
    -*) echo "test-images: unknown $1" >&2; exit 2 ;;
    *) break ;;
    esac
done
BIN=$(realpath "$BIN")
SIZE=$((768 << 20))
W=$(mktemp -d "${TMPDIR:-/tmp}/vdi.XXXXXX")
trap 'rm -rf "$W"' EXIT
trap 'exit 130' INT TERM

vdimg() { "$BIN/vdimg" "$@"; }

# kind | format | extension | QEMU's name, or - where it cannot read the kind | what vdimg create is told
TABLE='
raw               | raw       | raw   | raw       |
dynamic           | vdi       | vdi   | vdi       |
fixed             | vdi       | vdi   | vdi       | --variant fixed
diff              | vdi       | vdi   | -         | diff
chain             | vdi       | vdi   | -         | chain of 4
vhd               | vhd       | vhd   | vpc       |
vhd-fixed         | vhd       | vhd   | vpc       | --variant fixed
vhd-diff          | vhd       | vhd   | -         | diff
vmdk              | vmdk      | vmdk  | vmdk      |
vmdk-split2g      | vmdk      | vmdk  | vmdk      | --variant split2g
vmdk-flat         | vmdk      | vmdk  | vmdk      | --variant flat
vmdk-diff         | vmdk      | vmdk  | vmdk      | diff
qcow2             | qcow2     | qcow2 | qcow2     |
qcow2-v2          | qcow2     | qcow2 | qcow2     | --option compat=0.10
qcow2-extended-l2 | qcow2     | qcow2 | qcow2     | --option extended_l2=on
qcow2-diff        | qcow2     | qcow2 | qcow2     | diff
parallels         | parallels | hdd   | parallels |
parallels-diff    | parallels | hdd   | -         | diff
vhdx              | vhdx      | vhdx  | vhdx      |
vhdx-fixed        | vhdx      | vhdx  | vhdx      | --variant fixed
vhdx-diff         | vhdx      | vhdx  | -         | diff
qed               | qed       | qed   | qed       |
qed-diff          | qed       | qed   | qed       | diff
qcow              | qcow      | qcow  | qcow      |
qcow-diff         | qcow      | qcow  | qcow      | diff
'

# row KIND: sets FORMAT, EXTENSION, QEMU, OPTIONS; fails for no kind
row() {
    local name rest
    while IFS='|' read -r name FORMAT EXTENSION QEMU rest; do
        read -r name <<<"$name"
        [ "$name" = "$1" ] || continue
        read -r FORMAT <<<"$FORMAT"
        read -r EXTENSION <<<"$EXTENSION"
        read -r QEMU <<<"$QEMU"
        read -r OPTIONS <<<"$rest" || true
        return 0
    done <<<"$TABLE"
    return 1
}

# all kinds of the formats that can be created
possible() {
    local name
    while IFS='|' read -r name _; do
        read -r name <<<"$name" || continue
        row "$name"
        vdimg create --format "$FORMAT" --size 1M "$W/try.$EXTENSION" 2>/dev/null && echo "$name"
        rm -f "$W"/try*
    done <<<"$TABLE"
}

[ -z "$LIST" ] || { possible; exit 0; }
KINDS=${*:-$(possible)}

# make_chain N: images 1 (base) to N, each with some data of its own; the top one is the last
make_chain() {
    local i named=()
    vdimg create --format "$FORMAT" --size $SIZE "$W/1.$EXTENSION"
    for ((i = 1; i <= $1; i++)); do
        IMAGE=$W/$i.$EXTENSION
        [ $i = 1 ] || vdimg create --format "$FORMAT" "${named[@]}" "$IMAGE"
        [ $i = "$1" ] && break
        vdimg io "$IMAGE" "${named[@]}" -c "write -P $((i + 64)) $((i * 777216)) 5M" \
            -c "write -P $((i + 96)) $((300 + i * 40))M 24M" -c flush
        PARENTS+=("$IMAGE")
        named+=(--parent "$IMAGE")
    done
    NAMED="${named[*]}"
}

make() { # KIND: makes it and sets IMAGE, PARENTS, and NAMED (the parents as options)
    PARENTS=() NAMED=''
    row "$1" || { echo "test-images: no such kind: $1" >&2; exit 2; }
    IMAGE=$W/a.$EXTENSION
    case $OPTIONS in
    diff) make_chain 2 ;;
    chain*) make_chain "${OPTIONS##* }" ;;
    # shellcheck disable=SC2086 # words
    *) vdimg create --format "$FORMAT" $OPTIONS --size $SIZE "$IMAGE" ;;
    esac
}

# What is left of the image, by our tool and by others. It is called as a condition, where -e does not hold.
judge() {
    local sums status=0
    [ "$FORMAT" != raw ] || return 0
    vdimg check "$IMAGE" || return 1
    if [ "$QEMU" != - ]; then
        # 63: this driver of QEMU has no check
        qemu-img check -q -f "$QEMU" "$IMAGE" || status=$?
        [ $status = 0 ] || [ $status = 63 ] || return 1
        qemu-img convert -f "$QEMU" -O raw "$IMAGE" "$W/by-qemu.raw" || return 1
        # shellcheck disable=SC2086 # words
        vdimg compare $NAMED "$IMAGE" "$W/by-qemu.raw" || return 1
    fi
    if [ ${#PARENTS[@]} -gt 0 ]; then
        sums=$(sha256sum "${PARENTS[@]}")
        [ "$sums" = "$SUMS" ] || { echo "FAIL: a parent was changed"; return 1; }
    fi
}

run() { # on $IMAGE
    local server="$BIN/vdblk --socket-path @S --blk-file $IMAGE $NAMED --num-queues 2 --io-engine $ENGINE --cache $CACHE"
    # what a killed one has under way may take long on a busy disk
    server="$server --lock-wait 25"
    if [ "$KILLS" -gt 0 ]; then
        "$HERE/kill-test.sh" --server-cmd "$server" --queues 2 --kills "$KILLS"
    else
        "$HERE/guest-test.sh" --tests 'boot-check fio-verify fs pattern' --queues 2 --size $SIZE --timeout "$TMO" \
            --server-cmd "$server" --export-cmd "$BIN/vdimg convert $NAMED --output-format raw $IMAGE @O"
    fi
}

failed=''
for kind in $KINDS; do
    printf '\n######## %s\n' "$kind"
    make "$kind"
    SUMS=''
    [ ${#PARENTS[@]} = 0 ] || SUMS=$(sha256sum "${PARENTS[@]}")
    if run && judge; then
        echo "######## $kind: ok"
    else
        failed="$failed $kind"
        echo "######## $kind: FAILED"
    fi
    rm -f "$W"/*
done
[ -z "$failed" ] || { echo "test-images: FAILED:$failed"; exit 1; }
echo "test-images: all ok ($(echo $KINDS))"

#!/usr/bin/env bash
# micro.sh - the parts of a request by themselves, in nanoseconds: the ring without a disk, and the look-up in the map of every format, full
# images of one layer, and a VDI of eight. One thread, no front-end (benches/hotpath); medians of 5.
#   micro.sh [--bin DIR]   of a release build with its examples (target/release)
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../target/release
[ "${1-}" != --bin ] || BIN=$2
HOTPATH=$BIN/examples/hotpath VDIMG=$BIN/vdimg
[ -x "$HOTPATH" ] && [ -x "$VDIMG" ] || { echo "micro: cargo build --release --bins --example hotpath" >&2; exit 2; }
T=$(mktemp -d /var/tmp/vdblk-micro.XXXXXX)
trap 'rm -rf "$T"' EXIT

# median PART IMAGE
median() {
    local n
    for n in 1 2 3 4 5; do "$HOTPATH" --part "$1" --batches 20000 "$2"; done |
        sed -n 's/.* \([0-9.]*\) ns each.*/\1/p' | sort -g | sed -n 3p
}
row() { printf '%-28s %8s ns\n' "$1" "$(median "$2" "$3")"; }

head -c 256M /dev/urandom >"$T/full.raw"
row 'ring' ring "$T/full.raw"
row 'map, raw' map "$T/full.raw"
for format in vdi vmdk vhd vhdx qcow2 qed qcow parallels; do
    file=$T/full.$("$VDIMG" formats --output json | python3 -c 'import json, sys
print(next(f["extensions"][0]["extension"] for f in json.load(sys.stdin) if f["name"].lower() == sys.argv[1]))' "$format")
    "$VDIMG" convert -t unsafe --output-format "$format" "$T/full.raw" "$file" >/dev/null
    row "map, $format" map "$file"
    rm -f "$file"
done
below=()
for n in 0 1 2 3 4 5 6 7; do
    size=(--size 256M)
    [ "$n" = 0 ] || size=()
    "$VDIMG" create --format vdi "${size[@]}" "${below[@]}" "$T/chain$n.vdi" >/dev/null
    below+=(--parent "$T/chain$n.vdi")
    for mib in $(seq "$n" 8 255); do echo "write -P $((n + 1)) ${mib}M 1M"; done | "$VDIMG" io "$T/chain$n.vdi" >/dev/null
done
row 'map, a VDI of 8 layers' map "$T/chain7.vdi"

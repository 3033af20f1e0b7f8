#!/usr/bin/env bash
# System calls that a batch of 32 requests costs: strace over benches/hotpath, the difference of two runs of different length, so what
# starting costs is not in it. More than the bound fails.
#   scripts/syscalls.sh [--bin DIR]
# Cached reads: one read each and one signal. Past the cache: what hands the batch over, the looks at what has ended, and one signal.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../target/release
[ "${1:-}" != --bin ] || BIN=$2
BIN=$(realpath "$BIN")
HOTPATH=$BIN/examples/hotpath
[ -x "$HOTPATH" ] || { echo "syscalls: no $HOTPATH: cargo build --release --bins --example hotpath" >&2; exit 2; }
command -v strace >/dev/null || { echo "syscalls: no strace" >&2; exit 2; }
W=$(mktemp -d "${TMPDIR:-/tmp}/syscalls.XXXXXX")
trap 'rm -rf "$W"' EXIT
head -c $((64 << 20)) /dev/urandom >"$W/data.raw"
"$BIN/vdimg" convert --output-format vdi "$W/data.raw" "$W/data.vdi" >/dev/null

# counted BATCHES OPTION…: system calls of a whole run
counted() {
    strace -f -c -U calls,name -o "$W/calls" "$HOTPATH" "$W/data.vdi" --batches "$1" "${@:2}" >/dev/null
    awk '$2 == "total" { print $1 }' "$W/calls"
}

FAILED=0
# judged WHAT BOUND OPTION…, the bound for 100 batches
judged() {
    local few many each best=
    for _ in 1 2 3; do
        few=$(counted 100 "${@:3}")
        many=$(counted 1100 "${@:3}")
        each=$(((many - few) / 10))
        [ -n "$best" ] && [ "$best" -le "$each" ] || best=$each
    done
    printf '%-24s %5d.%02d system calls a batch of 32 (at most %d.%02d)\n' "$1" $((best / 100)) $((best % 100)) $(($2 / 100)) $(($2 % 100))
    [ "$best" -le "$2" ] || FAILED=1
}
judged "cached reads" 3301
judged "reads past the cache" 400 --direct
exit $FAILED

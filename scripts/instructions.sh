#!/usr/bin/env bash
# Instructions in user space that a cached 4 KiB read costs from the ring to its answer, per format: valgrind's callgrind
# over benches/hotpath, the difference of two runs of different length. Hardly depends on what else the machine does. Compared
# with the figures in benches/hotpath/instructions.txt: more than 5 % off fails, also below them, for then they are to be
# committed anew. Another compiler makes other code: with one that is not named there figures are told, not judged.
#   scripts/instructions.sh [--bin DIR] [--update] [FORMAT …]
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../target/release UPDATE=
FIGURES=$HERE/../benches/hotpath/instructions.txt
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --bin) BIN=$2; shift 2 ;;
    --update) UPDATE=1; shift ;;
    -*) echo "instructions: unknown $1" >&2; exit 2 ;;
    *) break ;;
    esac
done
BIN=$(realpath "$BIN")
HOTPATH=$BIN/examples/hotpath
[ -x "$HOTPATH" ] || { echo "instructions: no $HOTPATH: cargo build --release --bins --example hotpath" >&2; exit 2; }
command -v valgrind >/dev/null || { echo "instructions: no valgrind" >&2; exit 2; }
W=$(mktemp -d "${TMPDIR:-/tmp}/instructions.XXXXXX")
trap 'rm -rf "$W"' EXIT
head -c $((64 << 20)) /dev/urandom >"$W/data.raw"

# counted IMAGE BATCHES: instructions of a whole run
counted() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$HOTPATH" "$1" --batches "$2" 2>&1 |
        sed -n 's/.*Collected : //p'
}

COMPILER=$(rustc --version)
JUDGED=
[ "$(sed -n 's/^# //p' "$FIGURES" 2>/dev/null)" != "$COMPILER" ] || JUDGED=1
[ -n "$JUDGED$UPDATE" ] || echo "instructions: the figures are another compiler's, not $COMPILER"

[ -z "$UPDATE" ] || [ $# = 0 ] || { echo "instructions: --update counts all formats" >&2; exit 2; }

FAILED=0
NEW="# $COMPILER"$'\n'
for f in ${*:-raw vdi vmdk vhd vhdx qcow2 qed qcow parallels}; do
    case $f in parallels) e=hdd ;; *) e=$f ;; esac
    IMAGE=$W/disk.$e
    "$BIN/vdimg" convert --output-format "$f" "$W/data.raw" "$IMAGE" >/dev/null
    BEST=
    # pages that are not in the cache for a moment make a run longer, never shorter
    for _ in 1 2 3; do
        FEW=$(counted "$IMAGE" 200)
        MANY=$(counted "$IMAGE" 700)
        EACH=$(((MANY - FEW) / (500 * 32)))
        [ -n "$BEST" ] && [ "$BEST" -le "$EACH" ] || BEST=$EACH
    done
    rm "$IMAGE"
    NEW+="$f $BEST"$'\n'
    WAS=$(sed -n "s/^$f //p" "$FIGURES" 2>/dev/null || true)
    if [ -n "$UPDATE" ] || [ -z "$WAS" ]; then
        printf '%-10s %5d instructions\n' "$f" "$BEST"
        [ -n "$UPDATE" ] || FAILED=1
    elif [ -n "$JUDGED" ] && { [ $((BEST * 100)) -gt $((WAS * 105)) ] || [ $((BEST * 100)) -lt $((WAS * 95)) ]; }; then
        printf '%-10s %5d instructions, %d in the repository: more than 5 %% off\n' "$f" "$BEST" "$WAS"
        FAILED=1
    else
        printf '%-10s %5d instructions (%d in the repository)\n' "$f" "$BEST" "$WAS"
    fi
done
[ -z "$UPDATE" ] || printf '%s' "$NEW" >"$FIGURES"
exit $FAILED

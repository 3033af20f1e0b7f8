#!/usr/bin/env bash
# What a 4 KiB read that hits the page cache costs the server, per format, against VDI: each format's image is full of the same
# 64 MiB. Two figures a format: CPU time per read (vubench, queue depth 32), in rounds of alternating order, the median of
# them; and instructions per read in user space, which hardly depend on what else the machine does (perf, where it counts
# them, otherwise valgrind's callgrind, where that is installed).
#   scripts/hot-read.sh [--bin DIR] [--rounds N] [FORMAT …]
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../target/release ROUNDS=5 RUNTIME=${RUNTIME:-1}
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --bin) BIN=$2; shift 2 ;;
    --rounds) ROUNDS=$2; shift 2 ;;
    -*) echo "hot-read: unknown $1" >&2; exit 2 ;;
    *) break ;;
    esac
done
BIN=$(realpath "$BIN")
V=$BIN/examples/vubench
[ -x "$V" ] || { echo "hot-read: no $V: cargo build --release --bins --example vubench" >&2; exit 2; }
W=$(mktemp -d "${TMPDIR:-/tmp}/hot-read.XXXXXX")
trap 'rm -rf "$W"' EXIT
SIZE=$((64 << 20))

head -c $SIZE /dev/urandom >"$W/data.raw"
FORMATS=()
for f in vdi ${*:-raw vmdk vhd vhdx qcow2 qed qcow parallels}; do
    case $f in parallels) e=hdd ;; *) e=$f ;; esac
    if "$BIN/vdimg" convert --output-format "$f" "$W/data.raw" "$W/$f.$e" 2>/dev/null; then
        FORMATS+=("$f")
        ln -s "$f.$e" "$W/$f"
    fi
done

OPTIONS="--log-level warn --read-only --blk-file"

# load FORMAT RUNTIME OPTION…: random reads of what vubench finds at the socket; a line of JSON
load() {
    local f=$1 runtime=$2
    shift 2
    "$V" --socket "$W/s" --rw randread --bs 4k --iodepth 32 --runtime "$runtime" --ramp 0.2 --tag "$f" "$@"
}

# serve FORMAT COMMAND…: starts a server, waits until it listens, sets PID
serve() {
    local f=$1
    shift
    rm -f "$W/s"
    # shellcheck disable=SC2086 # words
    "$@" $OPTIONS "$(realpath "$W/$f")" --socket-path "$W/s" 2>"$W/err" &
    PID=$!
    until [ -S "$W/s" ]; do sleep 0.1; kill -0 $PID; done
}

stop() {
    kill $PID
    wait $PID || true
}

for ((r = 0; r < ROUNDS; r++)); do
    order=("${FORMATS[@]}")
    [ $((r % 2)) = 0 ] || mapfile -t order < <(printf '%s\n' "${FORMATS[@]}" | tac)
    for f in "${order[@]}"; do
        load "$f" "$RUNTIME" --server-cmd "$BIN/vdblk --socket-path @S $OPTIONS $(realpath "$W/$f")" >>"$W/times"
    done
done

ios() { python3 -c 'import json, sys; print(json.load(sys.stdin)["ios"])'; }

# Instructions of the server in a short run and in a longer one, and their reads: count FORMAT RUNTIME
if perf stat -x, -e instructions:u true 2>&1 | grep -q '^[0-9]'; then
    HOW=perf
    count() {
        serve "$1" "$BIN/vdblk"
        perf stat -x, -o "$W/perf" -e instructions:u -p $PID -- \
            "$V" --socket "$W/s" --rw randread --bs 4k --iodepth 32 --runtime "$2" --ramp 0 >"$W/line"
        stop
        echo "$(sed -n 's/^\([0-9]*\),.*instructions.*/\1/p' "$W/perf") $(ios <"$W/line")"
    }
elif command -v valgrind >/dev/null; then
    HOW=callgrind
    count() {
        serve "$1" valgrind --tool=callgrind "--callgrind-out-file=$W/callgrind" "$BIN/vdblk" --io-engine threads
        load "$1" "$2" >"$W/line"
        stop
        echo "$(sed -n 's/^\(summary\|totals\): //p' "$W/callgrind" | tail -1) $(ios <"$W/line")"
    }
else
    HOW=none
fi
if [ $HOW != none ]; then
    for f in "${FORMATS[@]}"; do
        echo "$f $(count "$f" 0.5) $(count "$f" 2)" >>"$W/counts"
    done
fi

python3 - "$W" "$HOW" <<'P'
import json, os, statistics, sys
folder, how = sys.argv[1:]
times = {}
for line in open(folder + "/times"):
    run = json.loads(line)
    times.setdefault(run["tag"], []).append(run["srv_us_io"])
counts = {}
if os.path.exists(folder + "/counts"):
    for line in open(folder + "/counts"):
        f, *numbers = line.split()
        few, few_ios, many, many_ios = map(int, numbers)
        # What starting, connecting and the ramp take is in both runs.
        counts[f] = (many - few) / max(many_ios - few_ios, 1)
print(f"{'':10} {'us a read':>10} {'of VDI':>7}   {'instructions':>12} {'of VDI':>7}   ({how})")
base, base_n = statistics.median(times["vdi"]), counts.get("vdi")
for f, runs in times.items():
    us = statistics.median(runs)
    line = f"{f:10} {us:10.3f} {us / base:7.2f}"
    if f in counts:
        line += f"   {counts[f]:12.0f} {counts[f] / base_n:7.2f}"
    print(line)
P

#!/bin/bash
# ab-fio.sh SOCKET_A SOCKET_B [options] - compares two servers in one guest with two disks, A and B.
# Each round runs every job on both, A B in odd rounds and B A in even ones, so that drift of the machine
# falls on both alike. Prints medians, and the mean ratio B/A of the rounds with its spread; it says
# slower or faster only where all rounds agree beyond 5 %. Overwrites the disks.
# Options:
#   --rounds N (4)   --rt SEC (2)   --ramp SEC (0)   --size 128M   --jobs 'a b c' (of fio/)
#   --name-a X   --name-b Y   any other goes to run-guest.sh with its value
# For a statement: at least 8 rounds of 3 s on an idle machine, and A against A once to see the noise.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
case ${1:-} in '' | -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
A=$1 B=$2
shift 2
ROUNDS=4 RT=2 RAMP=0 SIZE=128M NAME_A=A NAME_B=B PASS=()
JOBS="rr-4k-q1 rr-4k-q32 rw-4k-q1 rw-4k-q32 sr-128k-q8 sw-128k-q8 sync-4k"
while [ $# -gt 1 ]; do
    case $1 in
    --rounds) ROUNDS=$2 ;;
    --rt) RT=$2 ;;
    --ramp) RAMP=$2 ;;
    --size) SIZE=$2 ;;
    --jobs) JOBS=$2 ;;
    --name-a) NAME_A=$2 ;;
    --name-b) NAME_B=$2 ;;
    *) PASS+=("$1" "$2") ;;
    esac
    shift 2
done

T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
printf '%s\n' "export SIZE=$SIZE RT=$RT RAMP=$RAMP" "MB=${SIZE%M} ROUNDS=$ROUNDS JOBS='$JOBS'" >"$T/script"
cat >>"$T/script" <<'E2'
for d in vda vdb; do
    echo "$d size=$(cat /sys/block/$d/size) cache='$(cat /sys/block/$d/cache_type)' queues=$(ls /sys/block/$d/mq | wc -l)"
    # both areas allocated before anything is measured
    dd if=/dev/zero of=/dev/$d bs=1M count=$MB oflag=direct 2>/dev/null
done
one() { # ROUND JOB DISK -> D ROUND JOB DISK IOPS KB/S CLAT_MEAN CLAT_MAX
    DEV=/dev/$3 fio --minimal "/files/$2.fio" >/tmp/o 2>/tmp/e || { echo "failed: $*: $(cat /tmp/e)"; return; }
    awk -F';' -v h="D $1 $2 $3" 'NF > 80 {
        w = $49 > $8
        print h, $8 + $49, $7 + $48, $(w ? 57 : 16), $(w ? 56 : 15)
    }' /tmp/o
}
r=1
while [ $r -le $ROUNDS ]; do
    for j in $JOBS; do
        case $((r % 2)) in
        1) one $r $j vda; one $r $j vdb ;;
        0) one $r $j vdb; one $r $j vda ;;
        esac
    done
    r=$((r + 1))
done
E2
files=()
for j in $JOBS; do files+=(--file "$HERE/fio/$j.fio"); done
jobs=$(echo "$JOBS" | wc -w)
"$HERE/run-guest.sh" --socket "$A" --socket "$B" --script "$T/script" "${files[@]}" --stats "$T/stats" \
    --timeout $((90 + 2 * ROUNDS * jobs * (RT + RAMP + 2))) ${PASS[@]+"${PASS[@]}"} >"$T/out"
rc=$?
cat "$T/stats"
python3 "$HERE/ab-table.py" "$T/out" "$NAME_A" "$NAME_B"
exit $rc

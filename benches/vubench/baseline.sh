#!/bin/bash
# baseline.sh SERVERS OUT.jsonl — run a table of workloads against a list of servers.
#
# SERVERS: one server a line, "name | command"; @S in the command stands for the socket path.
#   Lines starting with # are skipped. The command must stay in the foreground (it is exec'ed).
#   The name "fio:PATH" instead runs fio/io_uring on PATH itself: the bare limit
#   (fio:PATH,direct for O_DIRECT).
# Environment: VUBENCH (the program), WORK (workloads, "rw:bs:qd:queues" separated by blanks; a trailing :once covers the
#   range once and re-creates nothing — the command has to make a fresh image itself),
#   ROUNDS=3, RUNTIME=1.5, VRING=512, POLL=auto (client spins at qd 1, sleeps on the eventfd above; 1, 0: always, never), QUIET=0.3 (CPUs used by others that we tolerate),
#   MAXWAIT=20 (seconds to wait for quiet), SIZE (range in bytes; 0 = all).
# The order of servers is reversed in every second round. Every run appends one JSON line with
# the server's name in "tag"; summary.py prints medians.
set -u
here=$(cd "$(dirname "$0")" && pwd)
V=${VUBENCH:-$here/../../target/release/examples/vubench}
[ -x "$V" ] || { echo "baseline: no $V; cargo build --release --example vubench" >&2; exit 2; }
servers=$1; out=$2
WORK=${WORK:-"randread:4k:1:1 randwrite:4k:1:1 randread:4k:32:1 randwrite:4k:32:1 randread:4k:64:2 read:64k:16:1 write:64k:16:1 read:128k:16:1 write:128k:16:1"}
ROUNDS=${ROUNDS:-3}; RUNTIME=${RUNTIME:-1.5}; VRING=${VRING:-512}; POLL=${POLL:-auto}
QUIET=${QUIET:-0.3}; MAXWAIT=${MAXWAIT:-20}; SIZE=${SIZE:-0}
S=$(mktemp -d /tmp/vub.XXXXXX)/s
trap 'rm -rf "$(dirname "$S")"' EXIT

busy() { # CPUs in use over 0.3 s
  local a b
  a=$(awk '/^cpu /{print $2+$3+$4+$7+$8+$9}' /proc/stat); sleep 0.3
  b=$(awk '/^cpu /{print $2+$3+$4+$7+$8+$9}' /proc/stat)
  awk -v a="$a" -v b="$b" 'BEGIN{printf "%.2f", (b-a)/30}'
}
quiet() {
  local t=$SECONDS
  while awk -v b="$(busy)" -v q="$QUIET" 'BEGIN{exit !(b>q)}'; do
    [ $((SECONDS - t)) -ge "$MAXWAIT" ] && return
  done
}
runfio() { # tag path[,direct] rw bs qd queues
  local p=${2%,direct} d=0
  [ "$p" != "$2" ] && d=1
  python3 "$here/fiorow.py" "$1" "$p" "$d" "$3" "$4" "$5" "$6" "$RUNTIME" >>"$out"
}
mapfile -t list < <(grep -v '^ *#' "$servers" | grep '|\|^fio:')
for ((r = 0; r < ROUNDS; r++)); do
  for w in $WORK; do
    IFS=: read -r rw bs qd nq once <<<"$w"
    for ((i = 0; i < ${#list[@]}; i++)); do
      k=$i; [ $((r % 2)) = 1 ] && k=$((${#list[@]} - 1 - i))
      line=${list[$k]}
      quiet
      case $line in
      fio:*) [ "$once" ] || runfio "bare-fio" "${line#fio:}" "$rw" "$bs" "$qd" "$nq"; continue ;;
      esac
      name=$(echo "${line%%|*}" | xargs); cmd=${line#*|}; cmd=${cmd//@S/$S}
      a=(--socket "$S" --server-cmd "$cmd" --rw "$rw" --bs "$bs" --iodepth "$qd" --queues "$nq" --vring "$VRING" --runtime "$RUNTIME" --seed $((r + 1)) --tag "$name")
      case $POLL$qd in 1*|auto1) a+=(--poll) ;; esac
      [ "$once" ] && a+=(--once)
      [ "$SIZE" != 0 ] && a+=(--size "$SIZE")
      timeout 60 "$V" "${a[@]}" >>"$out" 2>>"$out.err" || echo "FAILED $name $w (round $r)" >>"$out.err"
    done
  done
done
python3 "$here/summary.py" "$out"

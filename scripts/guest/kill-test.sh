#!/bin/bash
# kill-test.sh - boots a guest that writes and verifies with fio while the server is killed (-9) and started again, and
# fails if the guest sees an error, a wrong block, or the server does not come back in time. Overwrites the image.
#   kill-test.sh --server-cmd 'CMD with @S for the socket' [--kills N (5)] [--pause SEC (3)] [--queues N (2)]
#                [--area MiB (64)] [--timeout SEC (240)]
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
CMD='' KILLS=5 PAUSE=3 QUEUES=2 AREA=64 TMO=240

die() { echo "kill-test: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac
    [ $# -ge 2 ] || die "$1 wants a value"
    case $1 in
    --server-cmd) CMD=$2 ;;
    --kills) KILLS=$2 ;;
    --pause) PAUSE=$2 ;;
    --queues) QUEUES=$2 ;;
    --area) AREA=$2 ;;
    --timeout) TMO=$2 ;;
    *) die "unknown option $1" ;;
    esac
    shift 2
done
[ -n "$CMD" ] || die "--server-cmd is missing"

W=$(mktemp -d "${TMPDIR:-/tmp}/vdk.XXXXXX")
S=$W/s SERVER='' GUEST=''
cleanup() {
    [ -z "$GUEST" ] || kill "$GUEST" 2>/dev/null
    [ -z "$SERVER" ] || kill -9 "$SERVER" 2>/dev/null
    rm -rf "$W"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

start_server() {
    local i
    sh -c "exec ${CMD//@S/$S}" </dev/null >>"$W/server.out" 2>&1 &
    SERVER=$!
    for ((i = 0; i < 600; i++)); do
        # a name left by the one that was killed is no socket anybody listens on
        grep -q " 00010000 .* $S\$" /proc/net/unix && return 0
        kill -0 "$SERVER" 2>/dev/null || break
        sleep .05
    done
    cat "$W/server.out" >&2
    die "the server did not come up"
}

# the guest tells when its load runs, and goes on with it until the host has killed often enough
cat >"$W/script" <<E2
cat >/tmp/kill.fio <<F
[global]
filename=/dev/vda
direct=1
ioengine=libaio
iodepth=32
rw=randwrite
bsrange=4k-64k
verify=crc32c
verify_fatal=1
verify_backlog=256
do_verify=1
fsync=64
size=$((AREA / 2))m
offset_increment=$((AREA / 2))m
numjobs=2
time_based=1
runtime=$((KILLS * (PAUSE + 2) + 5))
group_reporting=1
[kill]
F
host begin
fio --minimal /tmp/kill.fio >/tmp/fio.out 2>/tmp/fio.err
rc=\$?
[ \$rc = 0 ] || head -5 /tmp/fio.err
grep -q 'verify: bad\|crc32c: verify failed' /tmp/fio.out /tmp/fio.err && { echo "FAIL: wrong content"; rc=1; }
dmesg | grep -q 'I/O error' && { echo "FAIL: the guest saw an I/O error"; rc=1; }
exit \$rc
E2
printf '#!/bin/sh\ntouch "%s/begun"\n' "$W" >"$W/hook"
chmod +x "$W/hook"

start_server
"$HERE/run-guest.sh" --socket "$S" --script "$W/script" --hook "$W/hook" --queues "$QUEUES" --smp "$QUEUES" \
    --chardev-opts reconnect=1 --timeout "$TMO" &
GUEST=$!
for ((i = 0; i < TMO * 10; i++)); do
    [ ! -e "$W/begun" ] || break
    kill -0 "$GUEST" 2>/dev/null || break
    sleep .1
done
done=0
while [ $done -lt "$KILLS" ] && kill -0 "$GUEST" 2>/dev/null; do
    sleep "$PAUSE"
    kill -9 "$SERVER"
    { wait "$SERVER"; } 2>/dev/null
    start_server
    done=$((done + 1))
done
wait "$GUEST"
rc=$?
GUEST=''
grep 'repeated' "$W/server.out" | sed 's/^ *INFO/server:/'
[ $done = "$KILLS" ] || { echo "FAIL: the guest ended after $done kills"; rc=1; }
[ $rc = 0 ] && echo "kill-test: ok ($done kills)" || echo "kill-test: FAILED"
exit $rc

#!/bin/bash
# kill-test.sh - boots a guest that writes, verifies and discards with fio while the server is killed (-9) and started again, and
# fails if the guest sees an error, a wrong block, or the server does not come back in time; and if too few of the kills met
# requests in flight, as vdblk's log tells: the others prove little. Overwrites the image.
#   kill-test.sh --server-cmd 'CMD with @S for the socket' [--kills N (5)] [--pause SEC (3)] [--queues N (2)]
#                [--area MiB (64)] [--timeout SEC (240)]
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
CMD='' KILLS=5 PAUSE=3 QUEUES=2 AREA=64 TMO=240
MEET_ONE_IN=3 # of the kills, at least one in so many

. "$HERE/server.sh"
options "--server-cmd=CMD --kills=KILLS --pause=PAUSE --queues=QUEUES --area=AREA --timeout=TMO" "$@"
[ -n "$CMD" ] || die "--server-cmd is missing"

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
time_based=1
runtime=$((KILLS * (PAUSE + 3) + 5))
group_reporting=1
[write]
numjobs=2
offset_increment=$((AREA / 2))m
[discard]
rw=randtrim
verify=0
offset=${AREA}m
thinktime=5ms
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
done=0 early=0
while [ $done -lt "$KILLS" ] && kill -0 "$GUEST" 2>/dev/null; do
    sleep "$PAUSE"
    # a guest that is interpreted leaves the server idle most of the time
    "$HERE/stop-in-flight.py" "$SERVER" 2 >/dev/null || echo "nothing was in flight for 2 s"
    kill_server || { echo "FAIL: the server had ended by itself"; early=1; }
    start_server
    done=$((done + 1))
done
wait "$GUEST"
rc=$?
GUEST=''
[ $early = 0 ] || rc=1
grep 'repeated' "$W/server.out" | sed 's/^ *INFO/server:/'
# one for each start after which a queue had something to repeat
met=$(awk '/INFO serving /{n++} / requests in flight are repeated/{met[n]} END{print length(met)}' "$W/server.out")
echo "$met of $done kills met requests in flight"
[ $((met * MEET_ONE_IN)) -ge "$KILLS" ] || { echo "FAIL: too few"; rc=1; }
stop_server || rc=1
[ $done = "$KILLS" ] || { echo "FAIL: the guest ended after $done kills"; rc=1; }
[ $rc = 0 ] && echo "kill-test: ok ($done kills)" || echo "kill-test: FAILED"
exit $rc

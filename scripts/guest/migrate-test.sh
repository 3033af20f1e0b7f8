#!/bin/bash
# migrate-test.sh - saves a running guest to a file and goes on with it in another QEMU, on another server process with
# the same image: a migration with dirty logging. The guest writes and verifies all the while. Overwrites the image.
#   migrate-test.sh --server-cmd 'CMD with @S for the socket' [--timeout SEC (240)]
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
CMD='' TMO=240 G=${VD_GUEST_DIR:-$HOME/.cache/vdblk-guest}

. "$HERE/server.sh"
options "--server-cmd=CMD --timeout=TMO" "$@"
[ -n "$CMD" ] || die "--server-cmd is missing"
[ -s "$G/initrd.cpio" ] || die "no guest in $G: run mkguest.sh first"

mkdir -p "$W/s0/files"
cat >"$W/s0/script" <<'E2'
cat >/tmp/m.fio <<F
[global]
filename=/dev/vda
direct=1
ioengine=libaio
iodepth=16
rw=randwrite
bsrange=4k-64k
verify=crc32c
verify_fatal=1
verify_backlog=128
do_verify=1
size=48m
time_based=1
runtime=25
[m]
F
echo BEGIN
fio --minimal /tmp/m.fio >/tmp/fio.out 2>/tmp/fio.err
rc=$?
[ $rc = 0 ] || head -5 /tmp/fio.err
dmesg | grep -q 'I/O error' && rc=1
exit $rc
E2
{ cat "$G/initrd.cpio"; (cd "$W/s0" && find script files | cpio -o -H newc --quiet -R 0:0); } >"$W/initrd"

start_qemu() { # LOG of the guest's lines, further options
    local log=$1
    shift
    qemu-system-x86_64 -M q35,memory-backend=mem -accel tcg,thread=multi -cpu max -smp 2 -m 384M \
        -object memory-backend-memfd,id=mem,size=384M,share=on -nodefaults -no-user-config -display none -no-reboot \
        -serial "file:$W/console" -chardev "file,id=o,path=$log" -device isa-serial,chardev=o,index=1 \
        -kernel "$G/vmlinuz" -initrd "$W/initrd" -append "console=ttyS0 quiet panic=-1 vd.out=/dev/ttyS1 vd.nonce=m vd.disks=1" \
        -chardev "socket,id=c0,path=$S" -device vhost-user-blk-pci,id=d0,chardev=c0,num-queues=2 \
        -qmp "unix:$W/qmp,server=on,wait=off" "$@" >"$W/qemu.log" 2>&1 &
    GUEST=$!
}

kill_guest() {
    kill -9 "$GUEST" 2>/dev/null
    { wait "$GUEST"; } 2>/dev/null
    GUEST=''
}

until_line() { # PATTERN LOG: waits for it
    local i
    for ((i = 0; i < TMO * 5; i++)); do
        grep -q "$1" "$2" 2>/dev/null && return 0
        kill -0 "$GUEST" 2>/dev/null || { grep -q "$1" "$2"; return; }
        sleep .2
    done
    return 1
}

failed() { echo "migrate-test: FAILED: $1"; tail -5 "$W/qemu.log" "$W/server.out" "$W/first" "$W/second" 2>/dev/null; exit 1; }

start_server
start_qemu "$W/first"
until_line BEGIN "$W/first" || failed "the guest did not begin"
sleep 3
python3 "$HERE/qmp.py" "$W/qmp" 'migrate {"uri":"exec:cat >'"$W"'/state"}' >"$W/said" || failed "migrate: $(cat "$W/said")"
for ((i = 0; i < TMO; i++)); do
    python3 "$HERE/qmp.py" "$W/qmp" query-migrate >"$W/said" 2>&1
    grep -q '"status": "\(completed\|failed\)"' "$W/said" && break
    sleep 1
done
grep -q '"status": "completed"' "$W/said" || failed "the migration: $(cat "$W/said")"
grep -q '@@VD-END' "$W/first" && failed "the guest had ended before it was saved"
kill_guest
stop_server || failed "the first server did not end well"
start_server
start_qemu "$W/second" -incoming "exec:cat $W/state"
until_line '@@VD-END m' "$W/second" || failed "the guest did not end"
grep -q '@@VD-END m 0' "$W/second" || failed "the guest saw something wrong"
kill_guest
stop_server || failed "the server did not end well"
echo "migrate-test: ok ($(stat -c %s "$W/state") bytes of state)"

#!/bin/bash
# resize-test.sh - a disk grows under a running guest: the file of a raw image is lengthened and vdblk gets SIGHUP, twice,
# while fio writes and verifies; the guest sees the new size, grows its mounted file system, fills what is new, and is clean
# by fsck. At the end the image is what the guest read. Needs QEMU 10 or newer (7.2 does not tell its guest).
#   resize-test.sh [--vdblk PATH] [--qemu BIN] [--timeout SEC (180)]
# With the oracle's QEMU: --qemu scripts/oracle/qemu.sh
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
VDBLK=$HERE/../../target/release/vdblk QEMU=${QEMU:-qemu-system-x86_64} TMO=180

. "$HERE/server.sh"
options "--vdblk=VDBLK --qemu=QEMU --timeout=TMO" "$@"
MAJOR=$("$QEMU" --version | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p')
[ "${MAJOR:-0}" -ge 10 ] || die "$QEMU is of version ${MAJOR:-?}, 10 is needed"

cat >"$W/script" <<'E2'
fail() { echo "FAIL: $*"; exit 1; }
step() { "$@" >/tmp/step 2>&1 || { cat /tmp/step; fail "$*"; }; }
step /bin/mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 /dev/vda
mkdir -p /mnt
step mount -t ext4 /dev/vda /mnt
cat >/tmp/load.fio <<F
[load]
filename=/mnt/load
direct=1
ioengine=libaio
iodepth=8
rw=randwrite
bsrange=4k-64k
verify=crc32c
verify_fatal=1
verify_backlog=64
size=16m
time_based=1
runtime=20
F
/bin/fio --minimal /tmp/load.fio >/tmp/load.out 2>&1 &
load=$!
for mib in 128 192; do
    host grow $mib >/dev/null || fail "host grow"
    i=0
    while [ "$(cat /sys/block/vda/size)" != $((mib * 2048)) ]; do
        i=$((i + 1))
        [ $i -lt 300 ] || fail "the size stays $(cat /sys/block/vda/size)"
        sleep 0.1
    done
    dmesg | grep "new size: $((mib * 2048)) " | tail -1 | sed 's/^\[[^]]*\] //'
    step /bin/resize2fs /dev/vda
    # more than there was room for before
    head -c $((56 * 1024 * 1024)) /dev/urandom >/mnt/fill$mib || fail "cannot fill $mib MiB"
    sync
done
sums=$(cat /mnt/fill* | sha256sum)
wait $load || { head -5 /tmp/load.out; fail "fio"; }
step umount /mnt
step /bin/fsck.ext4 -f -n /dev/vda
echo 3 >/proc/sys/vm/drop_caches
step mount -o ro -t ext4 /dev/vda /mnt
[ "$sums" = "$(cat /mnt/fill* | sha256sum)" ] || fail "files have changed"
step umount /mnt
dmesg | grep 'I/O error' && fail "the guest saw an I/O error"
echo "disk $(sha256sum </dev/vda | cut -d' ' -f1)"
E2
cat >"$W/hook" <<E2
#!/bin/sh
# grow MIB
truncate -s "\$2M" "$W/disk.raw" && kill -HUP "\$(cat "$W/pid")"
E2
chmod +x "$W/hook"

truncate -s 64M "$W/disk.raw"
CMD="'$VDBLK' --socket-path @S --blk-file '$W/disk.raw' --num-queues 2"
start_server
echo "$SERVER" >"$W/pid"
"$HERE/run-guest.sh" --qemu "$QEMU" --socket "$S" --script "$W/script" --hook "$W/hook" --queues 2 --smp 2 \
    --timeout "$TMO" >"$W/said"
bad=$?
grep -v '^disk ' "$W/said"
stop_server || bad=1
[ "$(sed -n 's/^disk //p' "$W/said")" = "$(sha256sum <"$W/disk.raw" | cut -d' ' -f1)" ] ||
    { echo "FAIL: the image is not what the guest read"; bad=1; }
[ "$bad" = 0 ] && echo "resize-test: ok" || { cat "$W/server.out"; echo "resize-test: FAILED"; }
exit "$bad"

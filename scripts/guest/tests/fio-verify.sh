# fio-verify.sh (runs in the guest) - checksummed random writes with flushes on half of the disk,
# while pieces of another region are discarded; fails on the first wrong block. Overwrites the disk.
# From /files/env or the environment: DEV (vda), VERIFY_MB (the most that is written, 48), SEED.
# Programs by their path: the shell would else take busybox's of the same name.
[ ! -r /files/env ] || . /files/env
DEV=${DEV:-vda} SEED=${SEED:-1}
fail() { echo "FAIL: $*"; [ -z "${discarder:-}" ] || kill $discarder 2>/dev/null; exit 1; }

total=$(($(cat "/sys/block/$DEV/size") / 2048)) # MiB
half=$((total / 2))
area=${VERIFY_MB:-48}
[ $area -le $half ] || area=$half
[ $area -ge 2 ] || fail "the disk is too small for this"
piece=1048576
[ $((half / 4)) -lt 16 ] && pieces=$((half / 4)) || pieces=16

# the region for discards: behind the middle, filled with one byte that is neither 0 nor the checksums'
region() { dd "if=/dev/$DEV" bs=$piece skip=$((half + $1)) count=$2 iflag=direct 2>/dev/null; }
discards=$(cat "/sys/block/$DEV/queue/discard_max_bytes")
if [ "$discards" -gt 0 ]; then
    tr '\0' '\245' </dev/zero | dd bs=$piece "of=/dev/$DEV" seek=$half count=$pieces iflag=fullblock oflag=direct 2>/dev/null ||
        fail "cannot fill the region for discards"
    [ "$(region 0 $pieces | tr -d '\245' | wc -c)" = 0 ] || fail "the region for discards does not read as written"
    # the second quarter of each piece goes, in 8 parts, while fio writes
    (
        i=0
        while [ $i -lt $((pieces * 8)) ]; do
            at=$((half * piece + i / 8 * piece + piece / 4 + i % 8 * (piece / 32)))
            /bin/blkdiscard -o $at -l $((piece / 32)) "/dev/$DEV" || exit 1
            i=$((i + 1))
        done
    ) &
    discarder=$!
fi

# two jobs on areas of their own, so that more than one queue has work
cat >/tmp/verify.fio <<F
[global]
filename=/dev/$DEV
direct=1
ioengine=libaio
iodepth=16
rw=randwrite
bsrange=4k-128k
randseed=$SEED
verify=crc32c
verify_fatal=1
verify_dump=0
do_verify=1
fsync=64
size=$((area / 2))m
offset_increment=$((area / 2))m
numjobs=2
group_reporting=1
[verify]
F
fio --minimal /tmp/verify.fio >/tmp/fio.out 2>/tmp/fio.err || { head -5 /tmp/fio.err; fail "fio"; }
grep -q 'verify: bad\|crc32c: verify failed' /tmp/fio.out /tmp/fio.err && { head -5 /tmp/fio.err; fail "wrong content"; }
echo "fio: $area MiB written and verified"

if [ "$discards" -gt 0 ]; then
    wait $discarder || fail "a discard was refused"
    i=0
    while [ $i -lt $pieces ]; do
        region $i 1 >/tmp/piece
        kept=$({ head -c $((piece / 4)) /tmp/piece; tail -c $((piece / 2)) /tmp/piece; } | tr -d '\245' | wc -c)
        [ "$kept" = 0 ] || fail "$kept bytes beside a discard have changed (MiB $((half + i)))"
        other=$(tr -d '\0\245' </tmp/piece | wc -c)
        [ "$other" = 0 ] || fail "$other bytes of a discarded range are neither old nor zero (MiB $((half + i)))"
        i=$((i + 1))
    done
    echo "discard: $((pieces * 8)) ranges gone, their neighbours intact"
fi
sync

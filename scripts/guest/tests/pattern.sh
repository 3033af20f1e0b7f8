# pattern.sh (runs in the guest) - carries out /files/plan with the content in /files/data, both by
# model.py, so that the host can compare the image with its model byte for byte afterwards.
# From /files/env or the environment: DEV (vda). A line of the plan: OPERATION OFFSET LENGTH [FROM].
# Programs by their path: the shell would else take busybox's of the same name.
[ ! -r /files/env ] || . /files/env
DISK=/dev/${DEV:-vda}
fail() { echo "FAIL: $*"; exit 1; }

discards=$(cat "/sys/block/${DEV:-vda}/queue/discard_max_bytes")
n=0
while read -r op at len from; do
    case $op in
    write)
        dd if=/files/data "of=$DISK" bs=4096 skip=$((from / 4096)) seek=$((at / 4096)) count=$((len / 4096)) \
            oflag=direct conv=notrunc 2>/tmp/e || { cat /tmp/e; fail "$op $at $len"; }
        ;;
    zero) /bin/blkdiscard -z -o "$at" -l "$len" $DISK || fail "$op $at $len" ;;
    discard) [ "$discards" = 0 ] || /bin/blkdiscard -o "$at" -l "$len" $DISK || fail "$op $at $len" ;;
    flush) sync || fail "$op" ;;
    *) fail "no such operation: $op" ;;
    esac
    n=$((n + 1))
done </files/plan
sync
echo "pattern: $n operations"

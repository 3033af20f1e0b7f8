# fs.sh (runs in the guest) - a file system lives on the disk: make, fill, delete, trim, check, read again.
# Overwrites the disk. From /files/env or the environment: DEV (vda), FS_MB (its size at most, 512).
# Programs by their path: the shell would else take busybox's of the same name.
[ ! -r /files/env ] || . /files/env
DEV=${DEV:-vda}
fail() { echo "FAIL: $*"; exit 1; }
step() { "$@" >/tmp/step 2>&1 || { cat /tmp/step; fail "$*"; }; }

total=$(($(cat "/sys/block/$DEV/size") / 2048))
size=${FS_MB:-512}
[ "$size" -le $total ] || size=$total
step /bin/mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 "/dev/$DEV" "${size}m"
mkdir -p /mnt
step mount -t ext4 "/dev/$DEV" /mnt

mkdir /mnt/many /mnt/gone
head -c $((size / 16 * 1024 * 1024)) /dev/urandom >/mnt/large || fail "cannot write"
cp -r /bin /lib /mnt/many/ || fail "cannot copy"
i=0
while [ $i -lt 200 ]; do
    echo "file $i" >"/mnt/gone/$i" || fail "cannot create"
    i=$((i + 1))
done
head -c $((size / 16 * 1024 * 1024)) /dev/zero | tr '\0' x >/mnt/gone/large
sync
large=$(sha256sum </mnt/large)
many=$(cd /mnt/many && find . -type f | sort | xargs sha256sum | sha256sum)
rm -rf /mnt/gone
sync
if [ "$(cat "/sys/block/$DEV/queue/discard_max_bytes")" -gt 0 ]; then
    step /bin/fstrim -v /mnt
    trimmed=$(sed -n 's/.*(\([0-9]*\) bytes).*/\1/p' /tmp/step)
    [ "${trimmed:-0}" -gt 0 ] || { cat /tmp/step; fail "fstrim trimmed nothing"; }
    echo "fstrim: $trimmed bytes"
fi
step umount /mnt
step /bin/fsck.ext4 -f -n "/dev/$DEV"
# nothing of it may come from the page cache
echo 3 >/proc/sys/vm/drop_caches
step mount -t ext4 "/dev/$DEV" /mnt
[ "$large" = "$(sha256sum </mnt/large)" ] || fail "a file has changed"
[ "$many" = "$(cd /mnt/many && find . -type f | sort | xargs sha256sum | sha256sum)" ] || fail "files have changed"
[ ! -e /mnt/gone ] || fail "deleted files are back"
step umount /mnt
echo "ext4: $size MiB made, filled, trimmed, checked clean, read again"

#!/bin/bash
# run.sh SOCKET [WORD...] - boots nano under QEMU on one vhost-user-blk socket (about a second).
# Prints what it saw; fails unless it says NANO-OK. It writes to the first 16 KiB of the disk.
# WORDs for its command line: loops=N qd=N (N random reads), has=SECTOR, keep=SECTOR (nano.c).
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
G=${VD_GUEST_DIR:-$HOME/.cache/vdblk-guest}
S=$1
shift
mkdir -p "$G"
[ "$G/nano.elf" -nt "$HERE/nano.c" ] || "$HERE/mk.sh" "$G/nano.elf"
rc=0
# its exit port takes 0 for good, which QEMU makes 1
said=$(timeout 60 "${QEMU:-qemu-system-x86_64}" -M q35,memory-backend=mem -accel tcg -m 64M \
    -object memory-backend-memfd,id=mem,size=64M,share=on -nodefaults -no-user-config -display none \
    -no-reboot -serial stdio -device isa-debug-exit,iobase=0xf4,iosize=4 -kernel "$G/nano.elf" \
    -append "exit=qemu $*" -chardev "socket,id=c,path=$S" -device vhost-user-blk-pci,chardev=c,num-queues=1 </dev/null) || rc=$?
echo "$said"
case $said in
*NANO-OK*) ;;
*) echo "nano: failed (QEMU: $rc)" >&2; exit 1 ;;
esac

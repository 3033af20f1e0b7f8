#!/bin/sh
# qemu.sh ARGS… - the chroot's qemu-system-x86_64, with its own libraries, on the host's files: for run-guest.sh --qemu.
# Needs no root, but setup.sh first.
CHROOT=${ORACLE_CHROOT:-$HOME/.cache/vdblk-oracle/sid}
LIB=$CHROOT/usr/lib/x86_64-linux-gnu
[ -x "$CHROOT/usr/bin/qemu-system-x86_64" ] || { echo "qemu.sh: run setup.sh first" >&2; exit 2; }
export QEMU_MODULE_DIR="$LIB/qemu"
exec "$LIB/ld-linux-x86-64.so.2" --library-path "$LIB" "$CHROOT/usr/bin/qemu-system-x86_64" \
    -L "$CHROOT/usr/share/qemu" -L "$CHROOT/usr/share/seabios" "$@"

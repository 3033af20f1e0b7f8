#!/bin/sh
# libblkio.sh - QEMU's block layer as front-end: qemu-io, qemu-img bench and qemu-img compare of the chroot reach images that
# vdblk serves through libblkio (driver virtio-blk-vhost-user). See libblkio.sh --help. Root, after setup.sh and
#   cargo build --release --bins
HERE=$(cd "$(dirname "$0")" && pwd)
exec "$HERE/in-oracle.sh" env VDBLK_ORACLE=1 python3 "$HERE/libblkio.py" "$@"

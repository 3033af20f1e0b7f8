#!/bin/sh
# interop.sh - proves that what vdblk and vdimg write is good for VirtualBox and QEMU, and stays good when these write
# to it as well. See README.md and interop.sh --help. Root, after setup.sh and
#   cargo build --release --bins --example vubench
HERE=$(cd "$(dirname "$0")" && pwd)
exec "$HERE/in-oracle.sh" env VDBLK_ORACLE=1 python3 "$HERE/interop.py" "$@"

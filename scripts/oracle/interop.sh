#!/bin/sh
# interop.sh - proves that what vdblk and vdimg write is good for VirtualBox and QEMU, and stays good when these write
# to it as well: all kinds of VDI through all steps, or with `formats` as the first word images of every format that is
# written. See README.md and interop.sh [formats] --help. Root, after setup.sh and
#   cargo build --release --bins --example vubench
HERE=$(cd "$(dirname "$0")" && pwd)
PROGRAM=interop.py
[ "$1" != formats ] || { PROGRAM=formats.py; shift; }
exec "$HERE/in-oracle.sh" env VDBLK_ORACLE=1 python3 "$HERE/$PROGRAM" "$@"

#!/bin/sh
# container.sh - random sequences of operations on chains of images, done by VirtualBox's engine and by vdblk::container: after each step both
# have to show the same bytes, and in the end each has to open what the other left. container.sh --help tells the rest. Root, after setup.sh and
#   cargo build --example vdtool
HERE=$(cd "$(dirname "$0")" && pwd)
exec "$HERE/in-oracle.sh" env VDBLK_ORACLE=1 VDTOOL="${VDTOOL:-${CARGO_TARGET_DIR:-$HERE/../../target}/debug/examples/vdtool}" \
    python3 "$HERE/container.py" "$@"

#!/bin/sh
# fixtures.sh DIR - reads every image of the unpacked set of fixtures in DIR by vdimg and compares it with
# the manifest, and shows those of killed writers and the broken ones to vdimg and vdblk. See fixtures.sh --help. Needs neither root nor chroot, but
#   cargo build --release --bins
HERE=$(cd "$(dirname "$0")" && pwd)
exec python3 "$HERE/fixtures.py" "$@"

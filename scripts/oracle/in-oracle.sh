#!/bin/sh
# in-oracle.sh CMD… - runs CMD in a mount namespace of its own in which the work folder and this folder are visible
# inside the chroot under the same paths. Root.
HERE=$(cd "$(dirname "$0")" && pwd)
CHROOT=${ORACLE_CHROOT:-$HOME/.cache/vdblk-oracle/sid}
WORK=${ORACLE_WORK:-$HOME/.cache/vdblk-oracle/work}
[ "$(id -u)" = 0 ] || { echo "in-oracle: needs root" >&2; exit 2; }
[ -x "$CHROOT/usr/bin/VBoxManage" ] || { echo "in-oracle: run setup.sh first" >&2; exit 2; }
mkdir -p "$WORK/scratch/vboxhome" "$CHROOT$WORK" "$CHROOT$HERE"
export CHROOT WORK HERE
# shellcheck disable=SC2016 # expanded by the inner shell
exec unshare -m sh -c \
    'mount --bind "$WORK" "$CHROOT$WORK" && mount --bind "$HERE" "$CHROOT$HERE" && exec "$@"' sh "$@"

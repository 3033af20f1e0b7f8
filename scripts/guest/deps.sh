#!/bin/sh
# deps.sh - installs the Debian 12 packages that the guest tests need, only those that are missing.
#   deps.sh [--check] [PACKAGE...]      --check: installs nothing, says what is missing, fails if there is any
#                                       PACKAGE: needed as well
# Works as root or through sudo, asks nothing.
set -eu

# qemu-system-x86  the machine the guest runs in      qemu-utils  qemu-img, to look at images
# gcc binutils cpio xz-utils python3 ca-certificates  mkguest.sh: kernel and initramfs of the guest
# (fio, e2fsprogs, busybox for the guest itself are downloaded by mkguest.sh, not installed)
NEED="qemu-system-x86 qemu-utils gcc libc6-dev binutils cpio xz-utils python3 ca-certificates"

check=
[ "${1:-}" != --check ] || { check=yes; shift; }
NEED="$NEED $*"

say() { echo "deps: $*"; }

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

missing=
for p in $NEED; do
    installed "$p" || missing="$missing $p"
done
# mkguest.sh downloads by name, for which apt must know the names
lists=yes
apt-cache show busybox-static >/dev/null 2>&1 || lists=

if [ -n "$check" ]; then
    [ -z "$missing" ] || say "missing:$missing"
    [ -n "$lists" ] || say "missing: package lists (apt-get update)"
    [ -z "$missing" ] && [ -n "$lists" ]
    exit
fi
if [ -z "$missing" ] && [ -n "$lists" ]; then
    say "nothing is missing"
    exit 0
fi

as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { say "run this as root: there is no sudo" >&2; exit 1; }
    as_root=sudo
fi
say "apt-get update"
$as_root apt-get -qq update
[ -n "$missing" ] || exit 0
say "apt-get install$missing"
$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
    -o Dpkg::Use-Pty=0 install $missing

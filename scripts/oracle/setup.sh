#!/bin/bash
# setup.sh - installs the programs that judge our images into a chroot of Debian sid: VirtualBox (VBoxManage, vbox-img
# and its image library), the newest QEMU and its tools, 7-Zip. Nothing of the host changes but the package debootstrap.
# Root; about 2 minutes and 1.5 GB, once; calling it again only mounts what a restart has unmounted. VirtualBox's
# image tools need no kernel module: its warnings about vboxdrv mean nothing here.
# ORACLE_CHROOT and ORACLE_WORK place the chroot and the folder of the images elsewhere.
set -euo pipefail
CHROOT=${ORACLE_CHROOT:-$HOME/.cache/vdblk-oracle/sid}
WORK=${ORACLE_WORK:-$HOME/.cache/vdblk-oracle/work}
PACKAGES=(virtualbox virtualbox-source qemu-utils qemu-block-extra qemu-system-x86 seabios 7zip python3)

mount_pseudo() {
    mountpoint -q "$CHROOT/proc" || mount -t proc proc "$CHROOT/proc"
    mountpoint -q "$CHROOT/dev" || mount --bind /dev "$CHROOT/dev"
}

install_packages() {
    chroot "$CHROOT" apt-get update -q
    chroot "$CHROOT" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -q --no-install-recommends "${PACKAGES[@]}"
}

[ "$(id -u)" = 0 ] || { echo "setup: needs root" >&2; exit 2; }
mkdir -p "$WORK/scratch"
if [ ! -x "$CHROOT/usr/bin/VBoxManage" ]; then
    command -v debootstrap >/dev/null || { apt-get update -q; apt-get install -y -q debootstrap; }
    mkdir -p "$(dirname "$CHROOT")"
    [ -d "$CHROOT/usr" ] || debootstrap --variant=minbase --components=main,contrib sid "$CHROOT"
    sed -i 's/ main.*$/ main contrib/' "$CHROOT/etc/apt/sources.list"
    # A mirror may be frozen at some day: its index is old then, and good all the same.
    echo 'Acquire::Check-Valid-Until "false";' >"$CHROOT/etc/apt/apt.conf.d/99-stale-mirror"
    mount_pseudo
    install_packages
fi
mount_pseudo
# one that was made before this package belonged to it
[ -x "$CHROOT/usr/bin/qemu-system-x86_64" ] || install_packages
chroot "$CHROOT" vbox-img --version
chroot "$CHROOT" qemu-img --version | head -1

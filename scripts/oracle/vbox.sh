#!/bin/sh
# vbox.sh TOOL ARGS… - a program of the chroot (VBoxManage, vbox-img, qemu-img, qemu-io, 7z, …), with a media
# registry of its own. The files must lie in the work folder:
#   vbox.sh VBoxManage createmedium disk --filename ~/.cache/vdblk-oracle/work/a.vdi --size 64
HERE=$(cd "$(dirname "$0")" && pwd)
CHROOT=${ORACLE_CHROOT:-$HOME/.cache/vdblk-oracle/sid}
WORK=${ORACLE_WORK:-$HOME/.cache/vdblk-oracle/work}
exec "$HERE/in-oracle.sh" chroot "$CHROOT" env -i \
    VBOX_USER_HOME="$WORK/scratch/vboxhome" VBOX_IPC_SOCKETID=vdblk-oracle HOME=/root \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 "$@"

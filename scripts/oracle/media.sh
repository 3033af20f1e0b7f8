#!/bin/sh
# media.sh - the real VirtualBox's registry, there and back: VBoxManage makes media, a machine with a snapshot and an immutable disk; vdimg
# imports them, checks them, and exports into the same files, which must stay what they were, byte for byte; VBoxManage reads them
# and takes another snapshot; a scan of the folder finds the same chains. Root; scripts/oracle/setup.sh first. VDIMG: the program.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
VDIMG=${VDIMG:-${CARGO_TARGET_DIR:-$HERE/../../target}/debug/vdimg}
ORACLE_WORK=$(mktemp -d /tmp/vdblk-media-XXXXXX)
export ORACLE_WORK
trap 'rm -rf "$ORACLE_WORK"' EXIT
mkdir "$ORACLE_WORK/home" "$ORACLE_WORK/m"
# A server of its own: it keeps the registry in memory, and ends some seconds after the last command.
vbox() {
    timeout 120 "$HERE/in-oracle.sh" chroot "${ORACLE_CHROOT:-$HOME/.cache/vdblk-oracle/sid}" env -i \
        VBOX_USER_HOME="$ORACLE_WORK/home" VBOX_IPC_SOCKETID="media-$$" HOME=/root \
        PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 VBoxManage -q "$@" 2>> "$ORACLE_WORK/log" \
        || { cat "$ORACLE_WORK/log" >&2; exit 1; }
}
medium() {
    registry=$1
    shift
    "$VDIMG" medium --registry "$ORACLE_WORK/$registry.sqlite" "$@"
}
cd "$ORACLE_WORK/m"
vbox createmedium disk --filename "$PWD/golden.vdi" --size 16 > /dev/null
vbox createmedium disk --filename "$PWD/loose.vmdk" --format VMDK --size 16 > /dev/null
vbox modifymedium disk "$PWD/loose.vmdk" --description 'a <loose> one & more' > /dev/null
vbox createvm --name vm1 --basefolder "$PWD" --register > /dev/null
vbox storagectl vm1 --name SATA --add sata > /dev/null
vbox storageattach vm1 --storagectl SATA --port 0 --device 0 --type hdd --medium "$PWD/golden.vdi" > /dev/null
vbox snapshot vm1 take first > /dev/null
vbox createmedium disk --filename "$PWD/imm.vdi" --size 16 > /dev/null
vbox modifymedium disk "$PWD/imm.vdi" --type immutable > /dev/null
vbox storageattach vm1 --storagectl SATA --port 1 --device 0 --type hdd --medium "$PWD/imm.vdi" > /dev/null
sleep 15
for f in home/VirtualBox.xml m/vm1/vm1.vbox; do cp "$ORACLE_WORK/$f" "$ORACLE_WORK/$(basename "$f").was"; done
medium a import "$ORACLE_WORK/home/VirtualBox.xml"
medium a check
for f in home/VirtualBox.xml m/vm1/vm1.vbox; do
    medium a export "$ORACLE_WORK/$f"
    cmp "$ORACLE_WORK/$f" "$ORACLE_WORK/$(basename "$f").was"
done
vbox list hdds | grep -c '^State: *created' | grep -qx 5
vbox snapshot vm1 take second > /dev/null
sleep 15
medium b scan "$ORACLE_WORK/m"
medium b check
medium b tree | sed 's|'"$ORACLE_WORK"'||' | grep -E '^ {4}.*Snapshots' > /dev/null
echo "media.sh: all as it should be"

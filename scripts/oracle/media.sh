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
# encrypted by us, with the key store in the machine's file: VirtualBox knows the password, and reads zeros where the guest did
printf secret > "$ORACLE_WORK/m/pw"
leaf=$(medium a list --no-check | awk '/m\/vm1\/Snapshots\/\{/ {print $NF; exit}')
"$VDIMG" io --parent-dir "$ORACLE_WORK/m" "$leaf" -c 'write -P 0x5a 1M 64k' > /dev/null
medium a encrypt --cipher AES-XTS256-PLAIN64 --password-file pw --password-id id1 "$leaf"
medium a export "$ORACLE_WORK/m/vm1/vm1.vbox"
vbox checkmediumpwd "$leaf" "$ORACLE_WORK/m/pw" | grep -q 'password is correct'
vbox mediumio --disk="$leaf" --password-file="$ORACLE_WORK/m/pw" cat --offset=1048576 --size=65536 --output="$ORACLE_WORK/m/part"
head -c 65536 /dev/zero | tr '\0' '\132' | cmp - "$ORACLE_WORK/m/part"
sleep 15
medium a decrypt --password-file pw "$leaf"
medium a export "$ORACLE_WORK/m/vm1/vm1.vbox"
cmp "$ORACLE_WORK/m/vm1/vm1.vbox" "$ORACLE_WORK/vm1.vbox.was"
"$VDIMG" io --parent-dir "$ORACLE_WORK/m" "$leaf" -c 'read -P 0x5a 1M 64k' > /dev/null
vbox list hdds | grep -c '^State: *created' | grep -qx 5
vbox snapshot vm1 take second > /dev/null
sleep 15
medium b scan "$ORACLE_WORK/m"
medium b check
medium b tree | sed 's|'"$ORACLE_WORK"'||' | grep -E '^ {4}.*Snapshots' > /dev/null
echo "media.sh: all as it should be"

#!/bin/bash
# crypt.sh - lets VirtualBox judge disk encryption: what vdimg encrypts it must read, and what it encrypts vdimg must read, both ciphers,
# VDI and VMDK, password changes included. VDIMG names the binary. Needs setup.sh.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
VDIMG=${VDIMG:-vdimg}
WORK=${ORACLE_WORK:-$HOME/.cache/vdblk-oracle/work}/crypt-$$
mkdir -p "$WORK"
cd "$WORK"

box() { "$HERE/vbox.sh" VBoxManage "$@" 2>>box.log >>box.log; }

# VirtualBox finds the key store of a disk in the file of a machine that has it.
machine() { # name, image
    box createvm --name "$1" --register --basefolder "$WORK/machines"
    box storagectl "$1" --name s --add sata
    box storageattach "$1" --storagectl s --port 0 --type hdd --medium "$WORK/$2"
}

forget() {
    box unregistervm "$1" || true
    box closemedium disk "$WORK/$2" || true
}

finish() {
    status=$?
    [ $status = 0 ] || { echo "crypt: failed; see $WORK/box.log" >&2; tail -5 box.log >&2; }
    for m in "${MACHINES[@]}"; do box unregistervm "$m" || true; done
    [ $status != 0 ] || rm -rf "$WORK"
    exit $status
}
MACHINES=()
trap finish EXIT

printf first >pw
printf second >pw2
CONTENT='[[0,4096,"txt",1],[130560,1024,"rnd",2],[2097152,1048576,"rnd",4],[8388096,512,"txt",3]]'

part() { # file, offset:length
    tail -c "+$((${2%:*} + 1))" "$1" | head -c "${2#*:}"
}

# Every byte, noise too.
as_virtualbox_reads() { # image, password, key store
    rm -f theirs.raw ours.raw
    box mediumio --disk="$WORK/$1" --password-file="$WORK/$2" cat --output="$WORK/theirs.raw"
    "$VDIMG" convert --output-format raw --unallocated virtualbox --password-file "$2" --key-store "$3" "$1" ours.raw
    cmp ours.raw theirs.raw
}

put_key_store() { # machine's file, key store
    python3 - "$1" "$2" <<'PY'
import re, sys
text, store = open(sys.argv[1]).read(), open(sys.argv[2]).read().strip().replace("\n", "&#10;")
text = re.sub(r'("CRYPT/KeyStore" value=")[^"]*', lambda m: m.group(1) + store, text)
open(sys.argv[1], "w").write(text)
PY
}

new_image() { # format, name
    box createmedium disk --filename "$WORK/$2" --sizebyte 8388608 --format "$1"
    "$HERE/vbox.sh" python3 "$HERE/vdtool.py" \
        "[[\"open\",\"$1\",\"$WORK/$2\",{}],[\"wspec\",$CONTENT],[\"closeall\"]]" >>box.log
}

for format in VDI VMDK; do
    for cipher in AES-XTS128-PLAIN64 AES-XTS256-PLAIN64; do
        image=$(echo "$cipher.$format" | tr '[:upper:]' '[:lower:]')
        name="crypt-$$-$image"
        MACHINES+=("$name")
        # VirtualBox encrypts
        new_image $format "$image"
        "$VDIMG" convert --output-format raw "$image" "$image.raw"
        machine "$name" "$image"
        box encryptmedium "$WORK/$image" --newpassword "$WORK/pw" --cipher $cipher --newpasswordid id1
        "$VDIMG" compare --password-file pw --key-store "machines/$name/$name.vbox" "$image" "$image.raw"
        as_virtualbox_reads "$image" pw "machines/$name/$name.vbox"
        # vdimg writes, and VirtualBox reads that
        "$VDIMG" io --password-file pw --key-store "machines/$name/$name.vbox" "$image" \
            -c 'write -P 0x5a 64k 1M' -c 'write -z -u 2M 128k' >/dev/null
        "$VDIMG" convert --output-format raw --password-file pw --key-store "machines/$name/$name.vbox" "$image" now.raw
        as_virtualbox_reads "$image" pw "machines/$name/$name.vbox"
        # vdimg changes the key, and a new process of VirtualBox's reads with a key store of ours
        "$VDIMG" rekey --password-file pw --key-store "machines/$name/$name.vbox" \
            --new-password-file pw2 --new-key-store "$image.keys" "$image"
        forget "$name" "$image"
        sleep 6
        put_key_store "machines/$name/$name.vbox" "$image.keys"
        box registervm "$WORK/machines/$name/$name.vbox"
        box checkmediumpwd "$WORK/$image" "$WORK/pw2"
        as_virtualbox_reads "$image" pw2 "$image.keys"
        # VirtualBox decrypts what vdimg has encrypted; where nothing was written it leaves noise
        box encryptmedium "$WORK/$image" --oldpassword "$WORK/pw2"
        "$VDIMG" convert --output-format raw "$image" decrypted.raw
        for written in 0:4096 65536:1048576 2097152:1048576 8388096:512; do
            cmp <(part now.raw "$written") <(part decrypted.raw "$written")
        done
        rm -f ./*.raw
        echo "$image: VirtualBox and vdimg read each other's"
    done
done

#!/bin/bash
# mkguest.sh - builds a kernel and one initramfs for guest tests of a vhost-user-blk back-end.
# Everything comes from Debian packages, fetched by name (apt-get download) and cached; no root needed.
#   mkguest.sh [--out DIR] [--kernel PKG] [--uml] [--no-xfs] [--force]
# --uml also takes user-mode-linux (Debian 12's does not start on CPUs with AMX).
# Leaves in DIR (${VD_GUEST_DIR:-~/.cache/vdblk-guest}):
#   vmlinuz   vmlinux (uncompressed ELF, has the PVH note)   linux.uml (--uml)
#   initrd.cpio (uncompressed: TCG has no time for gunzip)   manifest
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
OUT=${VD_GUEST_DIR:-$HOME/.cache/vdblk-guest}
KPKG=linux-image-cloud-amd64
UML=0 XFS=1 FORCE=0

die() { echo "mkguest: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
    --out) OUT=$2; shift ;;
    --kernel) KPKG=$2; shift ;;
    --uml) UML=1 ;;
    --no-xfs) XFS=0 ;;
    --force) FORCE=1 ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "mkguest: unknown option $1" >&2; exit 2 ;;
    esac
    shift
done

for t in apt-get dpkg-deb readelf strip gcc cpio xz python3; do
    command -v $t >/dev/null || die "no $t here; run $HERE/deps.sh"
done
mkdir -p "$OUT"
cd "$OUT"
sources=$(cat "$HERE"/{mkguest.sh,guest-init,stub-libs.py,extract-vmlinux.py} | sha256sum | cut -c1-16)
KEY="$KPKG uml=$UML xfs=$XFS sources=$sources"
if [ $FORCE = 0 ] && [ -s initrd.cpio ] && [ "$(cat manifest.key 2>/dev/null)" = "$KEY" ]; then
    echo "cached: $OUT"
    exit 0
fi

# --- packages -----------------------------------------------------------------------------------

# get NAME... : downloads (in one go) and unpacks each package once into root/NAME
get() {
    local p want=()
    for p; do [ -e "root/$p/.ok" ] || want+=("$p"); done
    [ ${#want[@]} -gt 0 ] || return 0
    rm -rf dl
    mkdir -p dl
    (cd dl && apt-get -qq -o APT::Sandbox::User=root download "${want[@]}") \
        || die "cannot download ${want[*]}; run $HERE/deps.sh"
    for p in "${want[@]}"; do
        rm -rf "root/$p"
        mkdir -p "root/$p"
        dpkg-deb -x dl/"$p"_*.deb "root/$p"
        (cd dl && ls "$p"_*.deb) >"root/$p/.ok"
    done
    rm -rf dl
}

# the real kernel package behind one that only depends on it
case $KPKG in
linux-image-[0-9]*) KREAL=$KPKG ;;
*) KREAL=$(apt-cache depends "$KPKG" 2>/dev/null | awk '/Depends: linux-image-[0-9]/{print $2; exit}') || true ;;
esac
[ -n "$KREAL" ] || die "apt does not know $KPKG; run $HERE/deps.sh"
LIBS="libc6 libaio1 libnuma1 zlib1g libext2fs2 libcom-err2 libss2 libblkid1 libuuid1 libmount1 libselinux1
    libpcre2-8-0 libsmartcols1 libudev1 libtinfo6"
get "$KREAL" busybox-static fio e2fsprogs util-linux util-linux-extra $LIBS
[ $XFS = 0 ] || get xfsprogs libinih1 liburcu8 libedit2 libbsd0 libmd0 libgcc-s1
[ $UML = 0 ] || get user-mode-linux

# --- kernel -------------------------------------------------------------------------------------

cp root/"$KREAL"/boot/vmlinuz-* vmlinuz
KV=$(basename root/"$KREAL"/boot/vmlinuz-*)
KV=${KV#vmlinuz-}
python3 "$HERE/extract-vmlinux.py" vmlinuz vmlinux

# --- programs and their libraries ---------------------------------------------------------------

S=$OUT/stage
rm -rf "$S"
mkdir -p "$S"/{bin,sbin,lib,lib64,proc,sys,dev,tmp,run,mnt,etc,usr}
ln -s ../bin "$S/usr/bin"
ln -s ../sbin "$S/usr/sbin"
ln -s ../lib "$S/usr/lib"
STUBBED="libgfapi.so.0 libnbd.so.0 libibverbs.so.1 librdmacm.so.1 librados.so.2 librbd.so.1
    libpmemblk.so.1 libpmem.so.1"

find_in() { find root/*/ -path "*/$1" \( -type f -o -type l \) -print -quit; }

add_libs() { # PROGRAM : what it needs, and what that needs
    local n f
    for n in $(readelf -dW "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
        [ ! -e "$S/lib/$n" ] || continue
        case " $(echo $STUBBED) " in *" $n "*) continue ;; esac
        f=$(find_in "$n")
        if [ -z "$f" ]; then
            case $n in libicu* | ld-linux*) continue ;; esac
            die "$1 wants $n, which is in none of the packages"
        fi
        cp -L "$f" "$S/lib/$n"
        add_libs "$S/lib/$n"
    done
}

add_bin() { # NAME [AS]
    local f
    f=$(find_in "bin/$1")
    [ -n "$f" ] || f=$(find_in "sbin/$1")
    [ -n "$f" ] || die "no $1 in the packages"
    cp -L "$f" "$S/bin/${2:-$1}"
    add_libs "$S/bin/${2:-$1}"
}

cp "$(find_in bin/busybox)" "$S/bin/"
ln -s busybox "$S/bin/sh"
add_bin mke2fs mkfs.ext4
add_bin e2fsck fsck.ext4
for t in fio resize2fs dumpe2fs blkdiscard fstrim blockdev lsblk; do add_bin $t; done
[ $XFS = 0 ] || for t in mkfs.xfs xfs_repair; do add_bin $t; done
cp -L "$(find_in ld-linux-x86-64.so.2)" "$S/lib/"
ln -s ../lib/ld-linux-x86-64.so.2 "$S/lib64/ld-linux-x86-64.so.2"
python3 "$HERE/stub-libs.py" "$S/bin/fio" "$S/lib" $STUBBED

# --- kernel modules, in the order they have to be loaded ----------------------------------------

declare -A SEEN
mods() { # DIR VERSION MODULE... : with what they need
    local dir=$1 kv=$2 m
    shift 2
    mkdir -p "$S/lib/modules/$kv"
    SEEN=()
    : >"$S/lib/modules/$kv/order"
    for m; do mod "$dir" "$kv" "$m"; done
}

mod() {
    local dir=$1 kv=$2 m=${3//-/_} f d to
    [ -z "${SEEN[$m]:-}" ] || return 0
    SEEN[$m]=1
    f=$(find "$dir" -regextype posix-extended -regex ".*/${m//_/[-_]}\.ko(\.xz|\.zst)?" -print -quit)
    [ -n "$f" ] || return 0 # built in
    to=$S/lib/modules/$kv/$m.ko
    case $f in
    *.xz) xz -dc "$f" >"$to" ;;
    *.zst) zstd -dcq "$f" >"$to" ;;
    *) cat "$f" >"$to" ;;
    esac
    for d in $(tr '\0' '\n' <"$to" | sed -n 's/^depends=//p' | head -1 | tr ',' ' '); do
        mod "$dir" "$kv" "$d"
    done
    strip --strip-debug "$to"
    echo "$m" >>"$S/lib/modules/$kv/order"
}

WANTED="virtio_blk ext4"
[ $XFS = 0 ] || WANTED="$WANTED xfs"
mods root/"$KREAL"/lib/modules "$KV" virtio_pci virtio_mmio virtio_console crc32c_intel $WANTED
if [ $UML = 1 ]; then
    cp root/user-mode-linux/usr/bin/linux.uml linux.uml
    UMLV=$(ls root/user-mode-linux/usr/lib/uml/modules)
    mods root/user-mode-linux/usr/lib/uml/modules "$UMLV" $WANTED
fi
# further UML kernels: directories of modules named by their version
for d in ${UML_MODULES:-}; do mods "$d" "$(basename "$d")" $WANTED; done

# --- the image ----------------------------------------------------------------------------------

cp "$HERE/guest-init" "$S/init"
chmod 755 "$S/init"
(cd "$S" && find . | LC_ALL=C sort | cpio -o -H newc --quiet -R 0:0) >initrd.cpio.tmp
mv initrd.cpio.tmp initrd.cpio
{
    echo "kernel $KV"
    [ $UML = 0 ] || echo "uml $UMLV"
    cat root/*/.ok
} >manifest
echo "$KEY" >manifest.key
rm -rf "$S"
echo "built: $OUT kernel $KV initrd $(stat -c %s initrd.cpio) bytes"

#!/bin/bash
# run-guest.sh - boots a real Linux guest on vhost-user-blk sockets, runs a shell script in it, prints
# the script's output and exits with its status.
#   run-guest.sh [--frontend qemu|uml|ch] --socket S [--socket S2 ...] --script FILE [options]
# Options:
#   --file PATH         copied to /files/ in the guest (repeatable)
#   --queues N          virtqueues of each disk (1)      --queue-size N  (128)
#   --smp N             CPUs (1)                         --mem MiB       (512)
#   --machine NAME      q35 or microvm (q35)             --cpu MODEL     (max)
#   --accel NAME        tcg or kvm (tcg)                 --qemu BIN      (qemu-system-x86_64)
#   --dev-opts 'k=v,…'  of the disk                      --chardev-opts 'reconnect=1'
#   --append 'WORDS'    for the kernel                   --arg WORD      for the front-end (repeatable)
#   --qmp SOCK          QEMU's monitor                   --no-disk       connect, but add no disk
#   --hook CMD          serves the guest's `host WORDS`: CMD WORDS; its first line and status go back
#   --timeout SEC       (120)                            --guest DIR     what mkguest.sh made
#   --console FILE      the guest's console              --stats FILE    times of this boot
#   --uml BIN
# Status: the script's own; 124 time-out; 125 the front-end ended without the script having ended.
set -u
FE=qemu MACH=q35 ACCEL=tcg,thread=multi CPU=max QEMU=qemu-system-x86_64 SMP=1 MEM=512 NQ=1 QS=128
SOCKS=() ARGS=() FILES=() SCRIPT='' DEVO='' CHO='' QMP='' APPEND='' HOOK='' CON='' STATS='' DISK=1 TMO=120
G=${VD_GUEST_DIR:-$HOME/.cache/vdblk-guest} CH=${CLOUD_HYPERVISOR:-cloud-hypervisor} UMLBIN=${UML_BIN:-}

usage() { echo "run-guest: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    k=$1
    case $k in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --no-disk) DISK=0; shift; continue ;;
    esac
    [ $# -ge 2 ] || usage "$k wants a value"
    v=$2
    shift 2
    case $k in
    --frontend) FE=$v ;;
    --socket) SOCKS+=("$v") ;;
    --script) SCRIPT=$v ;;
    --file) FILES+=("$v") ;;
    --queues) NQ=$v ;;
    --queue-size) QS=$v ;;
    --smp) SMP=$v ;;
    --mem) MEM=$v ;;
    --machine) MACH=$v ;;
    --cpu) CPU=$v ;;
    --accel) ACCEL=$v ;;
    --qemu) QEMU=$v ;;
    --dev-opts) DEVO=,$v ;;
    --chardev-opts) CHO=,$v ;;
    --append) APPEND=$v ;;
    --arg) ARGS+=("$v") ;;
    --qmp) QMP=$v ;;
    --hook) HOOK=$v ;;
    --timeout) TMO=$v ;;
    --guest) G=$v ;;
    --console) CON=$v ;;
    --stats) STATS=$v ;;
    --uml) UMLBIN=$v ;;
    *) usage "unknown option $k" ;;
    esac
done
[ -r "$SCRIPT" ] || usage "--script FILE is missing"
[ -s "$G/initrd.cpio" ] || usage "no guest in $G: run mkguest.sh first"

W=$(mktemp -d "${TMPDIR:-/tmp}/vdg.XXXXXX")
NONCE=$$-$RANDOM PID='' KIDS=''
[ -n "$CON" ] || CON=$W/console

gone() { # waits at most $1 tenths of a second for the front-end to end
    local i
    for ((i = 0; i < $1; i++)); do
        kill -0 "$PID" 2>/dev/null || return 0
        sleep .1
    done
    return 1
}

cleanup() {
    if [ -n "$PID" ]; then
        kill "$PID" 2>/dev/null
        gone 10 || kill -9 "$PID" 2>/dev/null
    fi
    [ -z "$KIDS" ] || kill -9 $KIDS 2>/dev/null
    exec 7>&- 8<&-
    rm -rf "$W"
}
trap cleanup EXIT
trap 'exit 130' INT TERM PIPE

# the script rides behind the base image: the kernel unpacks one archive after the other
mkdir -p "$W/s/files"
cp "$SCRIPT" "$W/s/script"
[ ${#FILES[@]} = 0 ] || cp "${FILES[@]}" "$W/s/files/"
{
    cat "$G/initrd.cpio"
    (cd "$W/s" && find script files | cpio -o -H newc --quiet -R 0:0)
} >"$W/initrd"
mkfifo "$W/o.in" "$W/o.out"
exec 8<>"$W/o.out" 7<>"$W/o.in"

now() { echo "${EPOCHREALTIME/./}"; }
disks=$((DISK ? ${#SOCKS[@]} : 0))
KA="panic=-1 vd.nonce=$NONCE vd.disks=$disks $APPEND"

start_qemu() {
    local m=() d=() n=0 s dev=vhost-user-blk-pci ko=vd.out=/dev/ttyS1
    case $MACH in
    microvm*)
        m=(-M "$MACH,memory-backend=mem,rtc=on,auto-kernel-cmdline=on" -global virtio-mmio.force-legacy=false
            -device virtio-serial-device -device virtconsole,chardev=o)
        dev=vhost-user-blk ko=vd.out=/dev/hvc0
        ;;
    *) m=(-M "$MACH,memory-backend=mem" -device isa-serial,chardev=o,index=1) ;;
    esac
    for s in ${SOCKS[@]+"${SOCKS[@]}"}; do
        d+=(-chardev "socket,id=c$n,path=$s$CHO")
        [ $DISK = 0 ] || d+=(-device "$dev,id=d$n,chardev=c$n,num-queues=$NQ,queue-size=$QS$DEVO")
        n=$((n + 1))
    done
    [ -z "$QMP" ] || d+=(-qmp "unix:$QMP,server=on,wait=off")
    "$QEMU" "${m[@]}" -accel "$ACCEL" -cpu "$CPU" -smp "$SMP" -m "${MEM}M" \
        -object "memory-backend-memfd,id=mem,size=${MEM}M,share=on" \
        -nodefaults -no-user-config -display none -no-reboot \
        -chardev "pipe,id=o,path=$W/o" -serial "file:$CON" \
        -kernel "$G/vmlinuz" -initrd "$W/initrd" -append "console=ttyS0 quiet $ko $KA" \
        ${d[@]+"${d[@]}"} ${ARGS[@]+"${ARGS[@]}"} >"$W/fe.log" 2>&1 7>&- 8<&- &
    PID=$!
}

start_uml() {
    local d=() s
    for s in ${SOCKS[@]+"${SOCKS[@]}"}; do d+=("virtio_uml.device=$s:2"); done
    "${UMLBIN:-$G/linux.uml}" "mem=${MEM}M" "initrd=$W/initrd" root=/dev/ram0 rdinit=/init \
        con=null con0=null,fd:2 ssl=null ssl1=fd:0,fd:1 quiet ${d[@]+"${d[@]}"} \
        vd.out=/dev/ttyS1 $KA ${ARGS[@]+"${ARGS[@]}"} <"$W/o.in" >"$W/o.out" 2>"$CON" 7>&- 8<&- &
    PID=$!
}

start_ch() {
    local d=() s
    for s in ${SOCKS[@]+"${SOCKS[@]}"}; do
        d+=("vhost_user=true,socket=$s,num_queues=$NQ,queue_size=$QS")
    done
    [ ${#d[@]} = 0 ] || d=(--disk "${d[@]}")
    "$CH" --kernel "$G/vmlinux" --initramfs "$W/initrd" --cmdline "console=ttyS0 quiet vd.out=/dev/hvc0 $KA" \
        --cpus "boot=$SMP" --memory "size=${MEM}M,shared=on" --serial "file=$CON" --console tty \
        ${d[@]+"${d[@]}"} ${ARGS[@]+"${ARGS[@]}"} <"$W/o.in" >"$W/o.out" 2>"$W/fe.log" 7>&- 8<&- &
    PID=$!
}

BEGUN='' STATUS='' HELD=0 T0=$(now)

serve_host() { # WORDS... : what the guest asks for; PID is the front-end's
    local answer rc
    if [ -z "$HOOK" ]; then
        echo "127 no hook" >&7
        return
    fi
    answer=$(PID=$PID "$HOOK" "$@" 2>>"$CON")
    rc=$?
    printf '%d %s\n' $rc "${answer%%$'\n'*}" >&7
}

take() { # LINE of the guest's
    case $1 in
    "@@VD-BEGIN $NONCE "*) BEGUN=$(now) UPTIME=${1##* } ;;
    "@@VD-END $NONCE "*) STATUS=${1##* } ;;
    "@@VD-HOST $NONCE "*) serve_host ${1#"@@VD-HOST $NONCE "} ;;
    "@@VD-DMESG "*) echo "run-guest: guest kernel: ${1#@@VD-DMESG }" >&2 ;;
    *)
        [ -n "$BEGUN" ] || return
        # a blank line is held back: the one before the end is not the script's
        if [ -z "$1" ]; then
            HELD=$((HELD + 1))
            return
        fi
        for (( ; HELD > 0; HELD--)); do echo; done
        printf '%s\n' "$1"
        ;;
    esac
}

follow() { # reads the guest's lines until the script has ended
    local end=$((SECONDS + TMO)) rest='' part dead=0
    while [ -z "$STATUS" ]; do
        if [ $SECONDS -ge $end ]; then
            STATUS=124
        elif IFS= read -r -t 0.5 -u 8 part; then
            part=$rest$part rest=''
            take "${part%$'\r'}"
        else
            rest=$rest$part
            # what it wrote last may still be in the pipe
            kill -0 "$PID" 2>/dev/null || dead=$((dead + 1))
            [ $dead -lt 2 ] || STATUS=125
        fi
    done
}

report_stats() {
    if [ -n "$BEGUN" ]; then
        echo "boot_to_script_ms=$(((BEGUN - T0) / 1000)) script_ms=$(((T2 - BEGUN) / 1000))" \
            "end_to_exit_ms=$((($(now) - T2) / 1000)) guest_uptime_at_script=$UPTIME"
    else
        echo "boot_to_script_ms=none"
    fi
}

case $FE in
qemu | uml | ch) start_$FE ;;
*) usage "unknown front-end $FE" ;;
esac
follow
T2=$(now)
[ $FE != uml ] || KIDS=$(ps -o pid= --ppid "$PID" 2>/dev/null)
[ "$STATUS" = 124 ] || gone 30
[ -z "$STATS" ] || report_stats >"$STATS"
case $STATUS in
124 | 125)
    {
        [ "$STATUS" = 124 ] && what="timed out" || what="the front-end ended early"
        echo "run-guest: $what (script begun: ${BEGUN:+yes}); the front-end says:"
        tail -5 "$W/fe.log" 2>/dev/null
        echo "the console:"
        tail -5 "$CON" 2>/dev/null
    } >&2
    ;;
esac
exit "$STATUS"

# bench.sh (runs in the guest) - fio's figures as a table. Overwrites the disk.
# From /files/env or the environment: DEV (vda), RT (seconds each, 2), RAMP (0), BENCH_MB (128), JOBS.
[ ! -r /files/env ] || . /files/env
NAME=${DEV:-vda} RT=${RT:-2} RAMP=${RAMP:-0} SIZE=${BENCH_MB:-128}
total=$(($(cat "/sys/block/$NAME/size") / 2048))
[ "$SIZE" -le $total ] || SIZE=$total
JOBS=${JOBS:-rr-4k-q1 rr-4k-q32 rw-4k-q1 rw-4k-q32 sr-128k-q8 sw-128k-q8}

# first writes allocate; what is measured here is an image in use
tr '\0' '\132' </dev/zero | dd bs=1M count="$SIZE" "of=/dev/$NAME" iflag=fullblock oflag=direct 2>/dev/null || exit 1
export DEV=/dev/$NAME SIZE=${SIZE}m RT RAMP
printf '%-12s %9s %8s %9s %9s %9s\n' job IOPS MB/s 'mean us' 'p99 us' 'max us'
for j in $JOBS; do
    fio --minimal "/files/$j.fio" >/tmp/o 2>/tmp/e || { cat /tmp/e; echo "FAIL: $j"; exit 1; }
    # terse format 3: the half that has more I/O counts
    awk -F';' -v j="$j" 'NF > 80 {
        w = $49 > $8; split($(w ? 71 : 30), p, "=")
        printf "%-12s %9d %8.1f %9.0f %9.0f %9.0f\n", j, $(w ? 49 : 8), $(w ? 48 : 7) * 1.024 / 1000,
            $(w ? 81 : 40), p[2], $(w ? 80 : 39)
    }' /tmp/o
done

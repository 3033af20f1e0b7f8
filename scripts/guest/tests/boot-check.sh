# boot-check.sh (runs in the guest) - the disk must look as the server is meant to offer it.
# From /files/env or the environment: DEV (vda), QUEUES, SIZE (bytes), RO=1, NO_DISCARD=1.
# Without write back the kernel never flushes, and no other test would test a flush.
[ ! -r /files/env ] || . /files/env
D=/sys/block/${DEV:-vda}
bad=0

must() { # WHAT IS WANTED
    if [ "$2" = "$3" ]; then echo "$1: $2"; else echo "FAIL: $1 is '$2', not '$3'"; bad=1; fi
}
offered() { [ "$(cut -c $(($1 + 1)) "$D/device/features")" = 1 ]; }
limit() { cat "$D/queue/$1"; }

[ -d "$D" ] || { echo "FAIL: there is no $D"; exit 1; }
queues=$(ls "$D/mq" | wc -l)
must "write cache" "$(limit write_cache)" "write back"
must "queues" "$queues" "${QUEUES:-$queues}"
bytes=$(($(cat "$D/size") * 512))
must "capacity" "$bytes" "${SIZE:-$bytes}"
must "read-only" "$(cat "$D/ro")" "${RO:-0}"
echo "blocks: logical $(limit logical_block_size) physical $(limit physical_block_size)" \
    "optimal $(limit optimal_io_size); serial '$(cat "$D/serial")'"
if [ "${RO:-0}" = 0 ] && [ -z "${NO_DISCARD:-}" ]; then
    offered 13 || { echo "FAIL: no discard offered"; bad=1; }
    offered 14 || { echo "FAIL: no write zeroes offered"; bad=1; }
fi
if offered 13; then
    echo "discard: max $(limit discard_max_bytes) granularity $(limit discard_granularity)"
    [ "$(limit discard_max_bytes)" -gt 0 ] || { echo "FAIL: discard offered, but limited to 0"; bad=1; }
fi
if offered 14; then
    echo "write zeroes: max $(limit write_zeroes_max_bytes)"
    [ "$(limit write_zeroes_max_bytes)" -gt 0 ] || { echo "FAIL: write zeroes offered, but limited to 0"; bad=1; }
fi
exit $bad

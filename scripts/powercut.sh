#!/usr/bin/env bash
# Power cuts by the million: all small workloads, also with their processes killed at every moment, then random ones, on
# each kind of image, until at least that many states of each were looked at. The first violation ends it.
#   scripts/powercut.sh [STATES [KIND …]]
set -euo pipefail
cd "$(dirname "$0")/.."
WANTED=${1:-1000000}
shift || true
cargo build --release --features sim --bin sim --locked
SIM=${CARGO_TARGET_DIR:-target}/release/sim
# All of them, unless some are named.
[ $# -gt 0 ] || mapfile -t KINDS < <("$SIM" --kinds)
[ $# -gt 0 ] || set -- "${KINDS[@]}"

for KIND in "$@"; do
  STATES=0
  SEED=0
  while [ "$STATES" -lt "$WANTED" ]; do
    if [ $((SEED % 2)) = 0 ]; then
      OUT=$("$SIM" $((SEED / 2)) --powercut "$KIND" --workloads --kills --exhaustive 12 --samples 200) || { echo "$OUT"; exit 1; }
    else
      OUT=$("$SIM" $((SEED * 1000)) --seeds 20 --powercut "$KIND" --exhaustive 8 --samples 100) || { echo "$OUT"; exit 1; }
    fi
    STATES=$((STATES + $(sed -n 's/.* \([0-9]*\) states.*/\1/p' <<<"$OUT")))
    SEED=$((SEED + 1))
  done
  printf '%-16s %9d states in %d rounds, no violation (%ds)\n' "$KIND" "$STATES" "$SEED" "$SECONDS"
done

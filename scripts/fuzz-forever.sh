#!/usr/bin/env bash
# Plays seeds of the simulator until it is stopped, from where it stopped last. Failing seeds go to DIR/failed.
#   scripts/fuzz-forever.sh [DIR] [SEEDS]       DIR: where to remember (default: sim-state), SEEDS: stop after so many
set -euo pipefail
cd "$(dirname "$0")/.."
DIR=${1:-sim-state}
LEFT=${2:--1}
BATCH=100
mkdir -p "$DIR"
cargo build --release --features sim --bin sim --locked
SIM=${CARGO_TARGET_DIR:-target}/release/sim
COMMIT=$(git rev-parse --short HEAD)
NEXT=$(cat "$DIR/next" 2>/dev/null || echo 0)

while [ "$LEFT" != 0 ]; do
  [ "$LEFT" -lt 0 ] || [ "$LEFT" -ge "$BATCH" ] || BATCH=$LEFT
  if ! OUT=$("$SIM" "$NEXT" --seeds "$BATCH" 2>&1); then
    sed "s/^/$COMMIT /" <<<"$OUT" | tee -a "$DIR/failed"
  fi
  NEXT=$((NEXT + BATCH))
  echo "$NEXT" >"$DIR/next"
  [ "$LEFT" -lt 0 ] || LEFT=$((LEFT - BATCH))
done
echo "next seed: $NEXT; failed so far: $(grep -c ' seed ' "$DIR/failed" 2>/dev/null || true)"

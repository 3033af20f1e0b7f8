#!/usr/bin/env bash
# Kills the daemon under load, 1,000 times by default, and checks after each that nothing was lost or done twice: raw,
# VDI and VDI diff, each through and past the page cache. About a second a kill.
# A failure leaves its images where the output says, and the whole output in the folder for cargo's results.
#   scripts/soak-kill.sh [KILLS]
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --bins --examples --locked
LOG=${CARGO_TARGET_DIR:-target}/soak-kill.log
VDBLK_KILLS=${1:-1000} cargo test --release --locked --test kill -- --nocapture --test-threads=1 2>&1 | tee "$LOG" ||
  { echo "soak-kill: FAILED, the whole output is in $LOG" >&2; exit 1; }

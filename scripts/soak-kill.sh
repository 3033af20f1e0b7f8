#!/usr/bin/env bash
# Kills the daemon under load, 1,000 times by default, and checks after each that nothing was lost or done twice: raw,
# VDI and VDI diff, each through and past the page cache. About a second a kill.
#   scripts/soak-kill.sh [KILLS]
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --bins --examples --locked
VDBLK_KILLS=${1:-1000} cargo test --release --locked --test kill -- --nocapture --test-threads=1

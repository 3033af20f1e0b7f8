#!/usr/bin/env bash
# Fuzzes one target, guided by coverage, and stops at the first finding. Needs a nightly toolchain and cargo-fuzz.
#   scripts/fuzz.sh chains|messages|vdi [SECONDS]      default: 900
set -euo pipefail
cd "$(dirname "$0")/.."
TARGET=${1:?which target: chains, messages or vdi}
LIMIT=${2:-900}
# what a target calls a case; longer ones it passes over
case $TARGET in
  vdi) MAX=65536 ;;
  *) MAX=1024 ;;
esac

# Without print_funcs=0 a symbolizer is started, and its pipes would be taken for descriptors that a case has left.
# What is found goes to fuzz/corpus; the seeds are only read.
mkdir -p "fuzz/corpus/$TARGET"
cargo +nightly fuzz run "$TARGET" "fuzz/corpus/$TARGET" "fuzz/seeds/$TARGET" "fuzz/regressions/$TARGET" -- \
  -max_total_time="$LIMIT" -max_len="$MAX" -timeout=40 -rss_limit_mb=2048 -print_final_stats=1 -print_funcs=0

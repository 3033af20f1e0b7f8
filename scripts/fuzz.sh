#!/usr/bin/env bash
# Fuzzes one target, guided by coverage, and stops at the first finding. Needs a nightly toolchain and cargo-fuzz.
#   scripts/fuzz.sh chains|messages|vdi|vmdk|qcow2|vhd|parallels|levels|dmg|cue|keystore [SECONDS]      default: 900
set -euo pipefail
cd "$(dirname "$0")/.."
TARGET=${1:?which target: chains, messages, cue, keystore, or a format}
LIMIT=${2:-900}
# bytes of a case: more only makes it slower
case $TARGET in
  chains | messages | cue | keystore) MAX=1024 ;;
  levels) MAX=98304 ;;
  *) MAX=32768 ;;
esac

# What is found goes to the first folder; the others are only read.
FOLDERS=("fuzz/corpus/$TARGET" "fuzz/seeds/$TARGET")
mkdir -p "${FOLDERS[0]}"
[ ! -d "fuzz/regressions/$TARGET" ] || FOLDERS+=("fuzz/regressions/$TARGET")
# Without print_funcs=0 a symbolizer is started, and its pipes would be taken for descriptors that a case has left.
cargo +nightly fuzz run "$TARGET" "${FOLDERS[@]}" -- \
  -max_total_time="$LIMIT" -max_len="$MAX" -timeout=40 -rss_limit_mb=2048 -print_final_stats=1 -print_funcs=0

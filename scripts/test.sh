#!/usr/bin/env bash
# All tests: formatting, lints, unit and integration tests, those with limits of time again in a release build, and a real
# guest on every kind of image.
#   scripts/test.sh [--no-guest]
set -euo pipefail
cd "$(dirname "$0")/.."
GUEST=1
[ "${1:-}" != --no-guest ] || GUEST=0

step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

# for the tests of guest memory in huge pages; only those that are used exist
HUGE=/proc/sys/vm/nr_overcommit_hugepages
FORMER=$(cat "$HUGE" 2>/dev/null || echo 8)
if [ "$FORMER" -lt 8 ] && echo 8 2>/dev/null >"$HUGE"; then
  trap 'echo "$FORMER" >"$HUGE"' EXIT
fi

step "packages"
scripts/guest/deps.sh valgrind strace
step "formatting"
cargo fmt --check
step "lints"
cargo clippy --all-targets --locked -- -D warnings
cargo clippy --bins --examples --features sim --locked -- -D warnings
step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet --locked
step "tests"
# kills are counted below, in the build that is used
VDBLK_KILLS=12 VDBLK_QUEUE_OPS=2000000 cargo test --locked
step "release build"
cargo build --release --bins --examples --locked
step "instructions"
scripts/instructions.sh
step "system calls"
scripts/syscalls.sh
step "tests with the bounds of a release build"
# Resumed within 1 s of the last I/O after each of 54 kills; 1 s and 256 MiB for an input of the fuzzers.
VDBLK_KILLS=54 cargo test --release --locked --test kill --test fuzz_smoke
if [ "$GUEST" = 1 ]; then
  step "guests"
  scripts/guest/mkguest.sh
  scripts/guest/test-images.sh
fi
step "all passed"

#!/usr/bin/env bash
# The table of docs/performance.md: vdblk against QEMU's storage daemon and the bare device, on the same files in alternating order.
#   scripts/bench.sh [--rounds 5] [--seconds 2] [--only ROW[,ROW…]] [--into FILE.json] [--list] [DIR]
# DIR is on the file system to be measured (not tmpfs; 12 GB free; default: a folder under /var/tmp). QEMU's daemon, qemu-img and vbox-img
# are taken from scripts/oracle/setup.sh's folder, else from the PATH; what is not there is left out, and the table says so.
# Writes target/bench/DATE.json (every run) and prints the table. Wants a quiet machine: runs with more than 5 % foreign CPU are
# thrown away and repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --bins --example vubench --example floor --locked
exec python3 scripts/bench/bench.py "$@"

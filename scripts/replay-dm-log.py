#!/usr/bin/env python3
"""Has the tool of dm-log-writes replay what the simulator records, and compares.

For each seed the simulator writes its log. replay-log puts it onto an empty file, up to some of the marks that tell length
and checksum of the simulated file, and up to the end; each time the file must be the simulated one, byte for byte, and if
it is a VDI, vdimg check may find nothing worse than leaks, as after a kill at that moment.

  cargo build --bins --features sim
  scripts/replay-dm-log.py --replay-log PATH [--seed 1] [--seeds 8] [--marks 20]

replay-log comes with xfstests (src/log-writes), or from github.com/josefbacik/log-writes by `make`.
"""
import argparse
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib

SECTOR, DISCARD, MARK = 512, 4, 8
TOLD = re.compile(r"(sync \d+|end): (\d+) bytes, crc32 ([0-9a-f]{8})")
CLEAN, LEAKS = 0, 3  # exit status of vdimg check


def run(*command, allowed=(0,)):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in allowed:
        sys.exit(f"{' '.join(command)}: status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def marks(path):
    """(text, length, checksum) of each mark that tells them."""
    found = []
    with open(path, "rb") as log:
        entries = struct.unpack_from("<QQQ", log.read(SECTOR))[2]
        for _ in range(entries):
            entry = log.read(SECTOR)
            _, sectors, flags, inline = struct.unpack_from("<QQQQ", entry)
            if not flags & DISCARD:
                log.seek(sectors * SECTOR, os.SEEK_CUR)
            told = TOLD.fullmatch(entry[32:32 + inline].decode()) if flags & MARK else None
            if told:
                found.append((told[0], int(told[2]), int(told[3], 16)))
    return found


def some(all_of_them, count):
    """At most so many, spread evenly, the last one included."""
    step = max(1, len(all_of_them) // count)
    return all_of_them[::-1][::step][::-1]


def replay(args, log, mark, folder):
    """True for a VDI that was checked."""
    text, length, checksum = mark
    image = folder + "/replayed.vdi"
    with open(image, "wb"):
        pass
    run(args.replay_log, "--log", log, "--replay", image, "--end-mark", text)
    os.truncate(image, length)
    with open(image, "rb") as f:
        data = f.read()
    if zlib.crc32(data) != checksum:
        sys.exit(f"{log}: replayed up to '{text}' it is another file")
    if data[0x40:0x44] != b"\x7f\x10\xda\xbe":
        return False
    run(args.bin + "/vdimg", "check", image, allowed=(CLEAN, LEAKS))
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replay-log", required=True, help="the tool")
    parser.add_argument("--bin", default=os.path.dirname(os.path.abspath(__file__)) + "/../target/debug")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--marks", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dmlog.") as folder:
        log = folder + "/log"
        for seed in range(args.seed, args.seed + args.seeds):
            run(args.bin + "/sim", str(seed), "--dm-log", log)
            entries = int(run(args.replay_log, "--log", log, "--num-entries"))
            chosen = some(marks(log), args.marks)
            if not chosen:
                sys.exit(f"seed {seed}: no marks in the log")
            checked = sum(replay(args, log, mark, folder) for mark in chosen)
            print(f"seed {seed}: {entries} entries, replayed up to {len(chosen)} marks, {checked} VDIs checked", flush=True)


if __name__ == "__main__":
    main()

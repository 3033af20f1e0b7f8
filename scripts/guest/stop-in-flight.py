#!/usr/bin/env python3
"""Stops a vhost-user server at a moment when requests are in flight, and leaves it stopped.

  stop-in-flight.py PID SECONDS

Status 0: it is stopped, and its record of what is in flight (vhost-user's inflight region, which it maps) has marks; how many
is printed. 1: no such moment came; it runs on.
"""
import os
import random
import signal
import struct
import sys
import time


def regions(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            if "/memfd:vdblk-inflight" in line:
                start, end = (int(x, 16) for x in line.split()[0].split("-"))
                memory.seek(start)
                yield memory.read(end - start)


def marks(region):
    """Of all queues: a header of 16 bytes, which says how many entries of 16 bytes follow, each with a mark in its first
    byte; the next queue's part begins at a multiple of 64."""
    at = found = 0
    while at + 16 <= len(region):
        (entries,) = struct.unpack_from("=H", region, at + 10)
        part = -(-(16 + 16 * entries) // 64) * 64
        if entries == 0 or at + part > len(region):
            break
        found += sum(region[at + 16 + 16 * i] != 0 for i in range(entries))
        at += part
    return found


def wait_until_stopped(pid):
    while True:
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().rsplit(") ", 1)[1][0] in "TZ":
                return


def main():
    pid, until = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
    while time.monotonic() < until:
        os.kill(pid, signal.SIGSTOP)
        wait_until_stopped(pid)
        found = sum(map(marks, regions(pid)))
        if found:
            print(found)
            return 0
        os.kill(pid, signal.SIGCONT)
        time.sleep(random.uniform(0.001, 0.01))
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as e:
        sys.exit(f"stop-in-flight: {e}")

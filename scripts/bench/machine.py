"""What a figure depends on besides the program."""
import os
import platform
import subprocess
import time

import peers


def busy():
    """CPUs in use over 0.3 s, by anybody."""
    def ticks():
        with open("/proc/stat", encoding="ascii") as f:
            v = [int(x) for x in f.readline().split()[1:]]
        return v[0] + v[1] + v[2] + v[5] + v[6] + v[7]

    before = ticks()
    time.sleep(0.3)
    return (ticks() - before) / 30


def wait_for_quiet(limit, patience=30):
    """Until less than `limit` CPUs are in use, or patience ends."""
    end = time.monotonic() + patience
    while busy() > limit and time.monotonic() < end:
        pass


def first_line(*command):
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
        return out.splitlines()[0] if out else ""
    except OSError:
        return ""


def about(folder):
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        model = next((l.split(":")[1].strip() for l in f if l.startswith("model name")), "?")
    qsd = peers.foreign("qemu-storage-daemon")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {model}",
        "file_system": first_line("stat", "-f", "-c", "%T", folder),
        "vdblk": first_line("git", "-C", peers.ROOT, "describe", "--always", "--dirty"),
        "qemu_storage_daemon": first_line(*qsd, "--version") if qsd else "not there",
        "fio": first_line("fio", "--version"),
    }

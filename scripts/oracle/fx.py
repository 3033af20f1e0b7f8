"""What the other scripts here share: where things are, and how to run a program of the chroot."""
import os
import subprocess
import sys

import gen

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.expanduser("~/.cache/vdblk-oracle")
CHROOT = os.environ.get("ORACLE_CHROOT", CACHE + "/sid")
WORK = os.environ.get("ORACLE_WORK", CACHE + "/work")  # seen inside the chroot under the same path
SCRATCH = WORK + "/scratch"
ENV = {
    "VBOX_USER_HOME": SCRATCH + "/vboxhome",
    "VBOX_IPC_SOCKETID": "vdblk-oracle",
    "HOME": "/root",
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}
# What VirtualBox says about its kernel module
NOISE = (
    "WARNING: The character device",
    "Please install the virtualbox-dkms",
    "headers, most likely",
    "You will not be able to start VMs",
)
MiB = 1 << 20

file_sha = gen.file_sha


def enter_oracle():
    """Runs this program again where the chroot sees the work folder."""
    if os.environ.get("VDBLK_ORACLE") != "1":
        os.environ["VDBLK_ORACLE"] = "1"
        runner = os.path.join(HERE, "in-oracle.sh")
        os.execv(runner, [runner, sys.executable] + sys.argv)


def run(command, timeout=300, binary=False):
    """(exit status, stdout, stderr); 124 for a timeout"""
    try:
        p = subprocess.run(command, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False)
    except subprocess.TimeoutExpired:
        return 124, b"" if binary else "", f"no end after {timeout} s"
    out = p.stdout if binary else p.stdout.decode("utf-8", "replace")
    return p.returncode, out, p.stderr.decode("utf-8", "replace")


def in_chroot(command, env=None):
    settings = [f"{k}={v}" for k, v in {**ENV, **(env or {})}.items()]
    return ["chroot", CHROOT, "env", "-i", *settings, *map(str, command)]


def clean(text):
    return "\n".join(line for line in text.splitlines() if line.strip() and not any(n in line for n in NOISE))


def last(text, n=200):
    """The end of what a program said, in one line."""
    return " | ".join(clean(text).splitlines())[-n:]

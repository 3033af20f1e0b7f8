"""Who is measured: how each server is started, and which programs of others there are."""
import json
import os
import shutil

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))
RELEASE = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release")
VDBLK = os.path.join(RELEASE, "vdblk")
VDIMG = os.path.join(RELEASE, "vdimg")
VUBENCH = os.path.join(RELEASE, "examples/vubench")
FLOOR = os.path.join(RELEASE, "examples/floor")
CHROOT = os.environ.get("ORACLE_CHROOT", os.path.expanduser("~/.cache/vdblk-oracle/sid"))


def foreign(name):
    """The command of a program of the oracle's chroot, with its own libraries, or of the PATH; None if there is neither."""
    program = os.path.join(CHROOT, "usr/bin", name)
    if os.path.exists(program):
        libraries = ":".join(os.path.join(CHROOT, d, "x86_64-linux-gnu") for d in ("usr/lib", "lib"))
        return [os.path.join(CHROOT, "lib64/ld-linux-x86-64.so.2"), "--library-path", libraries, program]
    found = shutil.which(name)
    return [found] if found else None


def vbox_img(folder):
    """The command of VirtualBox's image tool in the chroot, for files in `folder`; it needs root. None if it is not there."""
    if os.path.exists(CHROOT + "/usr/bin/vbox-img") and os.geteuid() == 0:
        return ["env", f"ORACLE_WORK={folder}", os.path.join(ROOT, "scripts/oracle/vbox.sh"), "vbox-img"]
    return None


def vbox_merge(folder, fmt, base, diff):
    """The command that merges `diff` into `base` with VirtualBox's library, or None."""
    if not vbox_img(folder):
        return None
    for name in ("vdtool.py", "gen.py"):
        shutil.copy(os.path.join(ROOT, "scripts/oracle", name), folder)
    steps = [["open", fmt.upper(), base, {}], ["open", fmt.upper(), diff, {}], ["merge", 1, 0], ["closeall"]]
    return [*vbox_img(folder)[:-1], "python3", os.path.join(folder, "vdtool.py"), json.dumps(steps)]


def vdblk(file, queues=1, cache="writeback", more=()):
    """vdblk as people run it: in flight kept, no log of dirty pages."""
    return " ".join(
        [VDBLK, "--socket-path @S --blk-file", file, f"--num-queues {queues} --cache {cache}", *more, "--log-level error"]
    )


def qsd(file, driver, cache="writeback"):
    """QEMU's storage daemon on the same file; None if it is not there."""
    command = foreign("qemu-storage-daemon")
    if not command:
        return None
    direct = ",cache.direct=on" if cache == "none" else ""
    return " ".join(
        command
        + [
            f"--blockdev driver=file,node-name=f,filename={file},aio=io_uring{direct}",
            f"--blockdev driver={driver},node-name=d,file=f",
            "--export type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=@S,writable=on,num-queues=1",
        ]
    )

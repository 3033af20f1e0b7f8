"""Runs vdimg, vdblk, vubench and the real tools on images, and looks into VDIs."""
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

import fx
import gen
from content import Content, Wrong

FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
READ_ONLY, DISCARD = 1, 128  # VirtualBox's open flags


@dataclass
class Table:
    """What the header of a VDI says, and its table."""

    header_size: int
    kind: int
    block_size: int
    count: int
    entries: tuple

    @classmethod
    def of_file(cls, path):
        with open(path, "rb") as f:
            header = f.read(512)
            header_size, kind = struct.unpack_from("<II", header, 0x48)
            table_at, _ = struct.unpack_from("<II", header, 0x154)
            block_size, _, blocks, count = struct.unpack_from("<IIII", header, 0x178)
            f.seek(table_at)
            return cls(header_size, kind, block_size, count, struct.unpack(f"<{blocks}I", f.read(4 * blocks)))

    def places(self):
        return [e for e in self.entries if e < ZERO]

    def overflows(self):
        """Somebody appended behind the last place that may exist; VirtualBox does not open that again."""
        return self.count > len(self.entries)

    def __str__(self):
        zero, free = self.entries.count(ZERO), self.entries.count(FREE)
        return f"{len(self.places())} blocks, {zero} zero, {free} free, count {self.count}"


def must(command, timeout=300, allowed=(0,)):
    """Runs a program; fails with what it said unless the status is allowed."""
    code, out, err = fx.run(list(map(str, command)), timeout)
    if code not in allowed:
        words = " ".join(map(str, command[:8]))
        raise Wrong(f"{words}… ended with status {code}: {fx.last(out + chr(10) + err, 500)}")
    return code, out, err


class Ours:
    """The project's binaries."""

    def __init__(self, folder, parents=()):
        """parents: base first, named wherever an image is opened; none: they are found."""
        self.parents = [word for p in parents for word in ("--parent", p)]
        self.vdblk, self.vdimg = folder + "/vdblk", folder + "/vdimg"
        self.vubench = folder + "/examples/vubench"
        for program in (self.vdblk, self.vdimg, self.vubench):
            if not os.access(program, os.X_OK):
                raise SystemExit(f"{program} is missing: cargo build --release --bins --example vubench")

    def create(self, path, *options, fmt="vdi"):
        must([self.vdimg, "create", "--format", fmt, *options, path])

    def write(self, path, commands):
        """vdimg io."""
        must([self.vdimg, "io", "--lock-wait", "20", *self.parents, path, *(w for c in commands for w in ("-c", c))])

    def content(self, path):
        """Everything the image and its parents show, by vdimg. The kernel may keep the lock of a killed process a
        moment longer than the process, until its ring is gone."""
        out = path + ".read.raw"
        before = fx.file_sha(path)
        must([self.vdimg, "convert", "--lock-wait", "20", *self.parents, "--output-format", "raw", path, out])
        if fx.file_sha(path) != before:
            raise Wrong(f"reading has changed {path}")
        content = Content.of_file(out)
        os.unlink(out)
        return content

    def compare(self, path, content):
        expected = path + ".expected.raw"
        content.save(expected)
        must([self.vdimg, "compare", *self.parents, "--format2", "raw", path, expected])
        os.unlink(expected)

    def check(self, path, allowed=(0,)):
        code, out, err = must([self.vdimg, "check", path], allowed=allowed)
        return "" if code == 0 else (out + err).splitlines()[-1]

    def repair(self, path):
        must([self.vdimg, "repair", path])

    def bench(self, path, *options, serve=(), socket=None, allowed=(0,)):
        """vubench on an image that it serves by vdblk itself, or on a socket; its figures."""
        command = [self.vubench]
        if socket is None:
            socket = os.path.dirname(path) + "/s"
            server = [self.vdblk, "--socket-path", "@S", "--log-level", "warn", "--lock-wait", "20"]
            server += [*self.parents, "--blk-file", path, *serve]
            command += ["--server-cmd", " ".join(server)]
        code, out, err = must([*command, "--socket", socket, "--verify", *options], allowed=allowed)
        if "panicked" in err:
            raise Wrong(f"panic: {fx.last(err, 500)}")
        figures = json.loads(out.splitlines()[-1])
        for name in ("mismatches", "errors", "unsupp", "bad_used_len", "duplicates"):
            if figures[name]:
                raise Wrong(f"vubench: {figures[name]} {name}: {fx.last(err, 500)}")
        return figures

    def served(self, path):
        """Everything vdblk shows when it serves the image read-only."""
        out = path + ".served.raw"
        self.bench(path, "--runtime", "0", "--dump-model", out, serve=["--read-only"])
        content = Content.of_file(out)
        os.unlink(out)
        return content

    def killed_under_load(self, path, shadow, after, *options):
        """kill -9 of vdblk in the middle of a verify run, some seconds after its first change of the image."""
        files = files_of(path)

        def last_change():
            return max(os.stat(f).st_mtime_ns for f in files)

        untouched = last_change()
        socket = os.path.dirname(path) + "/s"
        if os.path.exists(socket):
            os.unlink(socket)
        command = [self.vdblk, "--socket-path", socket, "--log-level", "warn", "--lock-wait", "20"]
        command += [*self.parents, "--blk-file", path]
        with subprocess.Popen(command) as server:
            try:
                wait_for(lambda: os.path.exists(socket) or server.poll() is not None)
                command = [self.vubench, "--socket", socket, "--verify", "--runtime", "60", "--shadow", shadow]
                command += options
                with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as load:
                    wait_for(lambda: last_change() != untouched or load.poll() is not None)
                    time.sleep(after)
                    server.kill()
                    out, err = load.communicate(timeout=120)
            finally:
                server.kill()
        if load.returncode != 3:
            raise Wrong(f"vubench ended with status {load.returncode}: {fx.last(out + chr(10) + err, 500)}")


def files_of(path):
    """The image, and the further files that it consists of: they begin with its name."""
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    return [path] + [f"{folder}/{n}" for n in os.listdir(folder) if n.startswith(stem + "-")]


def wait_for(condition):
    for _ in range(20000):
        if condition():
            return
        time.sleep(0.001)
    raise Wrong("vdblk does not come up, or changes nothing")


class VirtualBox:
    """VirtualBox's own library."""

    def __init__(self, fmt="VDI"):
        self.format = fmt

    def run(self, folder, ops):
        script = folder + "/ops.json"
        with open(script, "w", encoding="utf-8") as f:
            json.dump(ops, f)
        code, out, err = fx.run(fx.in_chroot(["python3", fx.HERE + "/vdtool.py", "@" + script]), 600)
        os.unlink(script)
        done = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
        failed = [f"{op} {name} {result or ''}" for op, status, name, result in done if status < 0]
        if code or failed:
            raise Wrong(f"VirtualBox: {'; '.join(failed)} status {code} {err[-300:]}")

    def change(self, chain, ops, flags=0):
        """Opens a chain, base first, the last one for writing, and carries out the operations."""
        opens = [["open", self.format, p, {"open": READ_ONLY}] for p in chain[:-1]]
        opens += [["open", self.format, chain[-1], {"open": flags}]]
        self.run(os.path.dirname(chain[-1]), opens + ops + [["flush"], ["close"]])

    def content(self, chain):
        """Everything the chain shows, opened read-only."""
        out = chain[-1] + ".vbox.raw"
        opens = [["open", self.format, p, {"open": READ_ONLY}] for p in chain]
        self.run(os.path.dirname(chain[-1]), opens + [["raw", out], ["closeall"]])
        return taken(out)

    def create(self, path, size):
        env = {"VBOX_USER_HOME": os.path.dirname(path) + "/home", "VBOX_IPC_SOCKETID": f"interop{os.getpid()}"}
        create = ["VBoxManage", "createmedium", "disk", "--filename", path, "--sizebyte", size, "--format", "VDI"]
        must(fx.in_chroot(create, env))

    def create_diff(self, chain, path):
        opens = [["open", "VDI", p, {"open": READ_ONLY}] for p in chain]
        self.run(os.path.dirname(path), opens + [["diff", "VDI", path, {}], ["closeall"]])


class Qemu:
    """The chroot's QEMU."""

    def __init__(self, fmt="vdi"):
        self.format = fmt

    def content(self, path, wrap=fx.in_chroot):
        """Everything it reads there; wrap=list: the host's QEMU."""
        out = path + ".qemu.raw"
        must(wrap(["qemu-img", "convert", "-f", self.format, "-O", "raw", path, out]))
        return taken(out)

    def check(self, path, wrap=fx.in_chroot, leaks=False):
        """qemu-img check finds nothing; 63: its driver has no check; 3: leaks, where there may be some."""
        must(wrap(["qemu-img", "check", "-f", self.format, path]), allowed=(0, 3, 63) if leaks else (0, 63))

    def create(self, path, size):
        must(fx.in_chroot(["qemu-img", "create", "-q", "-f", "vdi", path, size]))

    def write(self, path, spec):
        """Patterns by write, zeros by write -z, and discards, which QEMU's driver for VDI does not carry out."""
        pattern = path + ".pattern"
        for part in range(0, len(spec), 100):
            script = []
            for i, (offset, length, kind, seed) in enumerate(spec[part:part + 100]):
                if kind == "zero":
                    script += ["-c", f"write -z {offset} {length}"]
                    continue
                with open(f"{pattern}{i}", "wb") as f:
                    f.write(gen.pat(offset, length, kind, seed))
                script += ["-c", f"write -s {pattern}{i} {offset} {length}"]
            _, out, err = must(fx.in_chroot(["qemu-io", "-f", self.format, path, *script, "-c", "flush"]))
            if "fail" in out + err or "rror" in out + err:
                raise Wrong(f"qemu-io: {fx.last(out + err, 500)}")
        for i in range(100):
            if os.path.exists(f"{pattern}{i}"):
                os.unlink(f"{pattern}{i}")


def taken(path):
    """What a tool wrote to a file, which is gone then."""
    content = Content.of_file(path)
    os.unlink(path)
    return content


def real_tools(chain, content, strict=True):
    """check_with_real_tools.py on the last image of the chain; strict: qemu-img check has nothing to say."""
    result = chain[-1] + ".json"
    command = [sys.executable, fx.HERE + "/check_with_real_tools.py", chain[-1], "--format", "VDI", "--json", result,
               "--expect-sha", content.sha(), "--expect-size", str(len(content.data))] + ["--strict"] * strict
    for parent in chain[:-1]:
        command += ["--parent", parent]
    code, out, err = fx.run(command, 600)
    bad = []
    if os.path.exists(result):
        with open(result, encoding="utf-8") as f:
            found = json.load(f)["results"]
        os.unlink(result)
        good = ("CONTENT OK", "opens")
        bad = [f"{tool} {r['verdict']} {r['message']}" for tool, r in found.items() if r["verdict"] not in good]
    if code or bad:
        raise Wrong(f"real tools: {fx.last(chr(10).join(bad) + out + err, 700)}")


def copy_folder(source, target):
    """Copies images, and keeps their holes."""
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    for name in os.listdir(source):
        if os.path.isfile(source + "/" + name):
            must(["cp", "--sparse=always", source + "/" + name, target + "/" + name])

"""QEMU's block layer attaches to vdblk through libblkio; libblkio.sh runs this. For each kind of image vdblk serves it, and

  ops      qemu-io writes, reads back, writes zeroes (with and without unmap), discards and flushes at random, and does the
           same to a raw file, which is the model
  bench    qemu-img bench reads, writes, and writes with flushes, 64 requests deep, and writes the model as well
  compare  qemu-img compare reads all of the disk through vdblk and finds the model
  after    vdblk has ended by SIGTERM and complained of nothing: vdimg compare finds the model in the image, vdimg check is
           clean, and so is qemu-img check, which also compares, where QEMU knows the kind of image

A discard of part of a block that a diff does not hold may leave the parent's data; here it always follows a write.
"""
import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import fx
from content import Wrong
from fx import MiB
from images import must, wait_for

SIZE = 64 * MiB
BLOCK = MiB
BENCH_AT = 32 * MiB
BENCH_COUNT = 8192
BENCH_BYTES = 4096
PATTERN = 0x5A


@dataclass
class Kind:
    name: str
    format: str
    create: tuple = ()
    serve: tuple = ()
    parent: bool = False


KINDS = (
    Kind("raw", "raw"),
    Kind("raw-direct", "raw", serve=("--cache", "none")),
    Kind("dynamic", "vdi"),
    Kind("fixed", "vdi", create=("--variant", "fixed")),
    Kind("written-through", "vdi", serve=("--cache", "writethrough", "--io-engine", "threads")),
    Kind("diff", "vdi", parent=True),
)


class Image:
    """An image that is served, and a raw file that must come to hold the same."""

    def __init__(self, kind, folder, programs):
        self.kind, self.folder = kind, folder
        self.vdblk, self.vdimg = programs + "/vdblk", programs + "/vdimg"
        self.path, self.model = f"{folder}/disk.{kind.format}", folder + "/model.raw"
        self.socket = folder + "/s"
        create = [self.vdimg, "create", "--format"]
        must([*create, "raw", "--size", SIZE, self.model])
        if not kind.parent:
            must([*create, kind.format, *kind.create, "--size", SIZE, self.path])
            return
        base = folder + "/base.vdi"
        spread = [["-c", f"write -P {1 + at % 250} {at * 700000 // 512 * 512} 300032"] for at in range(90)]
        must(fx.in_chroot(["qemu-io", "-f", "raw", self.model, *sum(spread, [])]))
        must([self.vdimg, "convert", "--output-format", "vdi", self.model, base])
        must([*create, "vdi", "--parent", base, self.path])

    def start(self):
        command = [self.vdblk, "--socket-path", self.socket, "--blk-file", self.path, *self.kind.serve]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: os.path.exists(self.socket) or server.poll() is not None)
        return server

    def remote(self):
        return f"driver=virtio-blk-vhost-user,path={self.socket},cache.direct=on,discard=unmap"

    def local(self):
        return f"driver=raw,file.driver=file,discard=unmap,file.filename={self.model}"

    def qemu_io(self, target, commands):
        script = sum((["-c", c] for c in commands), [])
        _, out, err = must(fx.in_chroot(["qemu-io", "--image-opts", target, *script]))
        if any(bad in out + err for bad in ("fail", "rror", "nvalid")):
            raise Wrong(f"qemu-io: {fx.last(out + err, 500)}")

    def bench(self, target, *options):
        """Requests per second."""
        command = ["qemu-img", "bench", "--image-opts", "-t", "none", "-c", BENCH_COUNT, "-d", 64, "-s", BENCH_BYTES,
                   "-o", BENCH_AT, *options, target]
        _, out, err = must(fx.in_chroot(command))
        said = [line for line in out.splitlines() if line.startswith("Run completed in ")]
        if len(said) != 1 or "rror" in err:
            raise Wrong(f"qemu-img bench: {fx.last(out + err, 500)}")
        return round(BENCH_COUNT / max(float(said[0].split()[3]), 1e-3))

    def compare_with_qemu(self, target):
        must(fx.in_chroot(["qemu-img", "compare", "--image-opts", target, self.local()]))

    def after(self):
        must([self.vdimg, "compare", "--format2", "raw", self.path, self.model])
        must([self.vdimg, "check", self.path])
        if self.kind.format == "vdi" and not self.kind.parent:
            must(fx.in_chroot(["qemu-img", "check", "-q", "-f", "vdi", self.path]))
            self.compare_with_qemu(f"driver=vdi,file.driver=file,file.filename={self.path}")


def random_range(rng):
    """Within the disk, a few sectors or a few blocks, at the edges of blocks as often as not."""
    length = 512 * rng.choice((1, 7, 8, 64, 513, 2048, 3000))
    at = rng.randrange(SIZE // BLOCK) * BLOCK + 512 * rng.choice((0, 0, 0, 1, 8, 1999, 2047))
    return min(at, SIZE - length), length


def random_commands(rng, count):
    """Commands for qemu-io that have one outcome only."""
    commands = []
    while len(commands) < count:
        at, length = random_range(rng)
        pattern = rng.randrange(1, 256)
        what = rng.choice(("write", "write", "writev", "zero", "unmap", "discard", "block", "flush", "fua"))
        if what == "write":
            commands += [f"write -P {pattern} {at} {length}", f"read -P {pattern} {at} {length}"]
        elif what == "writev":
            parts = " ".join(["512"] * 3 + ["4096"] * 5)
            at = min(at, SIZE - 3 * 512 - 5 * 4096)
            commands += [f"writev -P {pattern} {at} {parts}", f"readv -P {pattern} {at} {parts}"]
        elif what == "fua":
            commands += [f"write -f -P {pattern} {at} {length}"]
        elif what in ("zero", "unmap"):
            commands += [f"write -z {'-u ' * (what == 'unmap')}{at} {length}", f"read -P 0 {at} {length}"]
        elif what == "discard":
            commands += [f"write -P {pattern} {at} {length}", f"discard {at} {length}", f"read -P 0 {at} {length}"]
        elif what == "block":
            at = at // BLOCK * BLOCK
            commands += [f"discard {at} {BLOCK}", f"read -P 0 {at} {BLOCK}"]
        else:
            commands += ["flush"]
    return commands


def play(image, rng, count):
    """Everything while vdblk serves; the figures of qemu-img bench."""
    commands = random_commands(rng, count) + ["flush"]
    image.qemu_io(image.remote(), commands)
    image.qemu_io(image.local(), commands)
    image.compare_with_qemu(image.remote())
    reads, writes = image.bench(image.remote()), ("-w", "--pattern", PATTERN)
    # the second time everything is there already
    figures = [reads, image.bench(image.remote(), *writes), image.bench(image.remote(), *writes, "--flush-interval", 64)]
    image.bench(image.local(), *writes)
    image.compare_with_qemu(image.remote())
    return figures


def run(kind, folder, args):
    image = Image(kind, folder, args.bin)
    server = image.start()
    try:
        figures = play(image, random.Random(f"{args.seed} {kind.name}"), args.ops)
        server.terminate()
        log = server.communicate(timeout=60)[1]
    finally:
        server.kill()
    if server.returncode or any(bad in log for bad in ("WARN", "ERROR", "panicked")):
        raise Wrong(f"vdblk ended with status {server.returncode}: {fx.last(log, 500)}")
    image.after()
    return figures


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.path.join(fx.HERE, "../../target/release")
    parser.add_argument("--bin", default=default, help="folder of vdblk and vdimg (target/release)")
    parser.add_argument("--kind", action="append", choices=[k.name for k in KINDS], help="only this one (repeatable)")
    parser.add_argument("--ops", type=int, default=300, help="commands for qemu-io (300)")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main():
    args = arguments()
    fx.enter_oracle()
    print(must(fx.in_chroot(["qemu-io", "--version"]))[1].splitlines()[0])
    failed = 0
    for kind in KINDS:
        if args.kind and kind.name not in args.kind:
            continue
        folder = tempfile.mkdtemp(prefix="libblkio.", dir=fx.WORK)
        try:
            reads, writes, flushed = run(kind, folder, args)
            print(f"{kind.name}: ok; per second: {reads} reads, {writes} writes, {flushed} writes with flushes", flush=True)
            shutil.rmtree(folder)
        except Wrong as e:
            failed += 1
            print(f"{kind.name}: FAILED, kept in {folder}: {e}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

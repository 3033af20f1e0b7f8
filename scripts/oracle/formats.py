"""Images of every format that vdblk writes, each with a history of its own, and every byte compared with a model;
interop.sh formats runs this. For each image vdblk (vdimg io, vdblk under vubench, vdblk killed under vubench), QEMU and
VirtualBox have it in turn, in an order that the seed says; each writes, and after each vdimg shows what the model has.
In the end vdimg check and qemu-img check are clean, and vdimg, both QEMUs and VirtualBox read the same bytes.

A line for each kind says how often each had a hand in it. Everything random follows from the number of the image, except
where a kill hits, and how far vubench gets. The images of a failure are kept, and its number and history are told:
--only NUMBER repeats it.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass

import fx
import gen
from content import Content, Shadow, Wrong, only_changed_by_vubench
from images import Ours, Qemu, Table, VirtualBox
from fx import MiB

KiB = 1 << 10
READS, WRITES = 1, 2


@dataclass(frozen=True)
class Format:
    """A format, and what others know of it: the name they have for it, or None."""

    name: str
    extension: str
    qemu: str
    vbox: str
    # What the others do with its diffs.
    qemu_diffs: int = 0
    vbox_diffs: int = 0


FORMATS = {
    f.name: f for f in (
        Format("vdi", "vdi", "vdi", "VDI", 0, WRITES),
        Format("vhd", "vhd", "vpc", "VHD", 0, WRITES),
        Format("vmdk", "vmdk", "vmdk", "VMDK", WRITES, WRITES),
        # VirtualBox counts no references and knows no clusters of zeros.
        Format("qcow2", "qcow2", "qcow2", None, WRITES, 0),
        Format("parallels", "hdd", "parallels", "Parallels", 0, 0),
        Format("vhdx", "vhdx", "vhdx", "VHDX", 0, 0),
        Format("qed", "qed", "qed", "QED", WRITES, 0),
        Format("qcow", "qcow", "qcow", "QCOW", WRITES, 0),
    )
}


@dataclass(frozen=True)
class Kind:
    """A format, how it is made, and what the others do with it."""

    name: str
    format: Format
    options: tuple = ()
    diff: bool = False
    qemu: int = WRITES
    vbox: int = WRITES
    sizes: tuple = (1 * MiB, 16 * MiB)

    def top(self):
        return "top." + self.format.extension


def variant(fmt, name, **k):
    return Kind(f"{fmt}-{name}", FORMATS[fmt], ("--variant", name), **k)


def option(fmt, name, *options, **k):
    words = tuple(word for o in options for word in ("--option", o))
    return Kind(f"{fmt}-{name}", FORMATS[fmt], words, **k)


def diff(fmt, *options, name="diff"):
    f = FORMATS[fmt]
    words = tuple(word for o in options for word in ("--option", o))
    return Kind(f"{fmt}-{name}", f, words, diff=True, qemu=f.qemu_diffs, vbox=f.vbox_diffs)


KINDS = (
    variant("vdi", "dynamic"), variant("vdi", "fixed"), variant("vdi", "zero-expand"), diff("vdi"),
    # QEMU knows blocks of 1 MiB only.
    option("vdi", "block-512k", "AllocationBlockSize=512K", qemu=0),
    variant("vhd", "dynamic"), variant("vhd", "fixed"), diff("vhd"),
    option("vhd", "block-512k", "block_size=512K"),
    variant("vmdk", "sparse"), variant("vmdk", "flat"), variant("vmdk", "split2g"), variant("vmdk", "split2g-flat"),
    variant("vmdk", "esx"), diff("vmdk"),
    # VirtualBox knows no version 2.
    option("vmdk", "zeroed-grain", "zeroed_grain=on", vbox=0),
    option("qcow2", "v3"), option("qcow2", "v2", "compat=0.10"), diff("qcow2"),
    option("qcow2", "extended-l2", "extended_l2=on"), diff("qcow2", "extended_l2=on", name="diff-extended-l2"),
    option("qcow2", "cluster-512", "cluster_size=512", sizes=(1 * MiB, 4 * MiB)),
    option("qcow2", "refcount-64", "refcount_bits=64", "cluster_size=4K"),
    variant("parallels", "dynamic"), diff("parallels"), option("parallels", "cluster-64k", "cluster_size=64K"),
    variant("vhdx", "dynamic", vbox=READS), variant("vhdx", "fixed", vbox=READS), diff("vhdx"),
    option("vhdx", "block-1m", "block_size=1M", vbox=READS),
    variant("qed", "dynamic"), diff("qed"),
    variant("qcow", "dynamic"), diff("qcow"),
)


class Image:
    """One image and its history."""

    def __init__(self, kind, number, args, folder):
        self.kind, self.number, self.folder = kind, number, folder
        self.random = gen.Random(number * 1000003 + sum(map(ord, kind.name)) * 7919)
        low, high = kind.sizes
        self.size = (low + self.random.below(high - low)) // 512 * 512
        self.chain = [f"{folder}/base.{kind.format.extension}"] * kind.diff + [f"{folder}/{kind.top()}"]
        self.ours = Ours(args.bin, self.chain[:-1])
        self.qemu, self.vbox = Qemu(kind.format.qemu), VirtualBox(kind.format.vbox)
        self.runtime = args.runtime
        self.model = Content(bytes(self.size))
        self.crashed, self.foreign = False, False
        self.unclosed = False  # the last of vdblk's sessions
        self.history = []

    @property
    def top(self):
        return self.chain[-1]

    def go(self):
        self.make()
        hands = [self.by_script, self.served, self.killed]
        hands += [self.by_qemu] * (self.kind.qemu == WRITES)
        hands += [self.by_virtualbox] * (self.kind.format.vbox is not None and self.kind.vbox == WRITES)
        # Each of them once in so many images, the others by chance.
        todo = [hands[self.number % len(hands)]] + [hands[self.random.below(len(hands))] for _ in range(3)]
        for hand in [self.by_script, *todo]:
            hand()
            self.rescue()
            self.model.same(self.ours.content(self.top), "vdimg convert")
        self.judge()

    def note(self, what):
        self.history.append(what)

    def spec(self, n, most=64 * KiB):
        return gen.rand_spec(self.random.next() % 1000003, 0, self.size, n, min(most, self.size))

    # ---- making

    def make(self):
        fmt = self.kind.format.name
        if self.kind.diff:
            self.ours.create(self.chain[0], "--size", str(self.size), fmt=fmt)
            base = Ours(os.path.dirname(self.ours.vdblk))
            commands, model = self.commands(12, discards=False)
            base.write(self.chain[0], commands)
            self.model = model
            self.ours.create(self.top, "--parent", self.chain[0], *self.kind.options, fmt=fmt)
        else:
            self.ours.create(self.top, "--size", str(self.size), *self.kind.options, fmt=fmt)
        self.base_sha = [fx.file_sha(p) for p in self.chain[:-1]]

    # ---- vdblk

    def commands(self, n, discards=True):
        """Commands of vdimg io, and the model after them. The model of a discard is that nothing has changed."""
        out, model = [], self.model.copy()
        for offset, length, kind, seed in self.spec(n):
            what = self.random.below(10)
            if kind == "zero":
                out.append(f"write -z {'-u ' if what < 5 else ''}{offset} {length}")
                model.data[offset:offset + length] = bytes(length)
            elif what == 0 and discards:
                out.append(f"discard {offset} {length}")
            else:
                out.append(f"write -P {seed & 0xff} {offset} {length}")
                model.data[offset:offset + length] = bytes([seed & 0xFF]) * length
        return out, model

    def by_script(self):
        """Writes, zeroes, discards: a discarded sector is as it was or zeros."""
        self.note("script")
        commands, after = self.commands(16)
        self.ours.write(self.top, commands)
        self.unclosed = False
        found = self.ours.content(self.top)
        if len(found.data) != self.size:
            raise Wrong(f"{len(found.data)} bytes instead of {self.size}")
        discarded = [tuple(map(int, c.split()[1:])) for c in commands if c.startswith("discard")]
        for offset, length in discarded:
            for at in range(offset, offset + length, 512):
                if not any(found.data[at:at + 512]):
                    after.data[at:at + 512] = bytes(512)
        self.model = after

    def load(self):
        length = min(self.size // 4096 * 4096, 4 * MiB)
        offset = self.random.below((self.size - length) // 4096 + 1) * 4096
        return offset, length, 1 + self.random.below(1 << 20)

    def options(self, offset, length, seed):
        return ("--offset", offset, "--size", length, "--seed", seed, "--mix", "45,15,15,20,5", "--max-units", "32",
                "--iodepth", "8", "--queues", "2")

    def served(self):
        """vdblk under vubench, ended in order."""
        self.note("served")
        offset, length, seed = self.load()
        dump = self.folder + "/dump.raw"
        self.ours.bench(self.top, *map(str, self.options(offset, length, seed)), "--runtime", str(self.runtime),
                        "--dump-model", dump)
        self.unclosed = False
        after = self.model.copy()
        after.take(Content.of_file(dump), offset, length)
        os.unlink(dump)
        only_changed_by_vubench(self.model, after, seed, offset, length)
        self.model = after

    def killed(self):
        """kill -9: what is there then is old or new."""
        offset, length, seed = self.load()
        shadow, delay = self.folder + "/shadow", 0.002 * 1.7 ** self.random.below(9)
        self.ours.killed_under_load(self.top, shadow, delay, *map(str, self.options(offset, length, seed)))
        found, shadow = self.ours.content(self.top), Shadow(shadow)
        self.note(f"killed after {shadow.generation}")
        shadow.judge(self.model, found)
        before = self.model.copy()
        before.take(found, offset, length)
        before.same(found, "outside of what was written")
        self.model, self.crashed, self.unclosed = found, True, True
        os.unlink(self.folder + "/shadow")

    # ---- the others

    def by_qemu(self):
        # QEMU 11.1.3 takes a Parallels image that was not closed for repaired and then gives its first clusters away a second
        # time, its own images' as well.
        if self.kind.format.name == "parallels":
            self.mend_unclosed()
        self.note("qemu")
        spec = self.spec(12)
        self.qemu.write(self.top, spec)
        self.model.write(spec)
        self.foreign = True

    def mend_unclosed(self):
        if self.unclosed:
            self.note("repaired")
            self.ours.repair(self.top)
            self.unclosed = False

    def by_virtualbox(self):
        # VirtualBox does not open a QED that is to be checked first.
        if self.kind.format.name == "qed":
            self.mend_unclosed()
        self.note("virtualbox")
        spec = self.spec(12)
        self.vbox.change(self.chain, [["wspec", spec]])
        self.model.write(spec)
        self.foreign = True

    def rescue(self):
        """VirtualBox and QEMU append to a crashed VDI past the number of its blocks, and VirtualBox does not open that
        again: a repair has to bring back every byte."""
        if self.kind.format.name == "vdi" and Table.of_file(self.top).overflows():
            self.note("rescued")
            self.ours.check(self.top, (2,))
            self.ours.repair(self.top)

    # ---- in the end

    def judge(self):
        """Leaks are what a killed process may leave, and others at any time."""
        said = self.ours.check(self.top, (0, 3) if self.crashed or self.foreign else (0,))
        if said:
            self.note("repaired")
            self.ours.repair(self.top)
            self.ours.check(self.top)
        self.ours.compare(self.top, self.model)
        if [fx.file_sha(p) for p in self.chain[:-1]] != self.base_sha:
            raise Wrong("the parent has changed")
        if self.kind.qemu:
            # Nobody can give back what a killed writer leaves in the midst of a QED; vdblk uses it again, QEMU does not.
            leaks = self.kind.format.name == "qed" and self.crashed
            for wrap, who in ((fx.in_chroot, "QEMU 11"), (list, "the host's QEMU")):
                self.qemu.check(self.top, wrap, leaks)
                self.model.same(self.qemu.content(self.top, wrap), who)
        if self.kind.vbox and self.kind.format.vbox:
            if self.kind.format.name == "qed":
                self.mend_unclosed()
            self.model.same(self.vbox.content(self.chain), "VirtualBox")


def can_be_made(args, kind):
    """The format can be created by now."""
    with tempfile.TemporaryDirectory(dir=fx.SCRATCH) as folder:
        path = f"{folder}/a.{kind.format.extension}"
        command = [args.bin + "/vdimg", "create", "--format", kind.format.name, "--size", "1M", path]
        return fx.run(command)[0] == 0


def run_kind(kind, args, folder):
    """So many images; true if all were right."""
    start, hands = time.monotonic(), Counter()
    numbers = args.only or range(args.seed, args.seed + args.images)
    for number in numbers:
        own = f"{folder}/{kind.name}-{number}"
        os.makedirs(own)
        image = Image(kind, number, args, own)
        try:
            image.go()
        except Wrong as e:
            print(f"{kind.name}: image {number} of {image.size} bytes, {', '.join(image.history)}: {e}")
            print(f"{'':16} it is kept in {own}", flush=True)
            return False
        hands.update(h.split()[0] for h in image.history)
        shutil.rmtree(own)
    told = ", ".join(f"{n} {hand}" for hand, n in sorted(hands.items()))
    print(f"{kind.name:22} {len(numbers)} images equal in {time.monotonic() - start:4.0f} s; {told}", flush=True)
    return True


def arguments():
    default = os.path.normpath(os.path.join(fx.HERE, "../../target/release"))
    p = argparse.ArgumentParser(
        prog="interop.sh formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=60, help="of each kind (60)")
    p.add_argument("--seed", type=int, default=1, help="number of the first image (1)")
    p.add_argument("--only", type=int, action="append", help="only this image; repeatable")
    p.add_argument("--kind", action="append", choices=[k.name for k in KINDS], help="only this kind; repeatable")
    p.add_argument("--runtime", type=float, default=0.1, help="seconds of a round of vubench (0.1)")
    p.add_argument("--bin", default=default, help="folder with vdblk, vdimg and examples/vubench")
    return p.parse_args()


def main():
    args = arguments()
    os.makedirs(fx.SCRATCH, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="formats-", dir=fx.SCRATCH)
    good = True
    for kind in (k for k in KINDS if not args.kind or k.name in args.kind):
        if not can_be_made(args, kind):
            print(f"{kind.name:22} not made: vdimg does not create the format")
            good = good and not args.kind
            continue
        good = run_kind(kind, args, folder) and good
    if not os.listdir(folder):
        os.rmdir(folder)
    print("all compared equal" if good else "FAILED", f"(seed {args.seed})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

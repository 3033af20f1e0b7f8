"""Images go round between vdblk, vdimg, VirtualBox and QEMU, and every byte is compared after each step; interop.sh
runs this. For each kind of image:

  make    make it; fill the parents, where it has any
  a       vdblk serves it to vubench: writes, zeroes, discards; ended by SIGTERM
  b-vbox  VirtualBox writes, discards and writes again; whole blocks, parts, across blocks
  b-qemu  QEMU writes patterns and zeroes (base images with blocks of 1 MiB, which is all it knows)
  c       vdblk shows all that, and takes another round of vubench
  d-vbox  vdblk is killed under load; VirtualBox appends blocks before vdblk sees the image again; check and repair
  d-qemu  the same crashed image, and QEMU

After each: vdimg check is clean, vdimg convert and compare agree with the model, parents are untouched, and
check_with_real_tools.py passes with the model's checksum, qemu-img check included. After a crash every completed write
must be there, and only requests in flight have a choice.

ok* in the table: the crashed image had no room behind its count, so the other program appended past the number of
blocks; VirtualBox does not open that again, and vdimg repair has to bring back every byte.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass

import fx
import gen
from content import Content, Shadow, Wrong, only_changed_by_vubench
from images import DISCARD, FREE, Ours, Qemu, Table, VirtualBox, copy_folder, real_tools
from fx import MiB

STEPS = ("make", "a", "b-vbox", "b-qemu", "c", "d-vbox", "d-qemu")
MIX = "40,20,12,20,8"
# All but the appended blocks goes into this part of the disk.
BUSY = 64 * MiB


@dataclass
class Kind:
    name: str
    options: tuple = ()  # of vdimg create
    maker: str = "vdimg"
    parents: int = 0
    fixed: bool = False
    block: int = MiB
    size: int = 64 * MiB

    def qemu_writes(self):
        return self.block == MiB and not self.parents


def block_size(text):
    return ("--option", f"AllocationBlockSize={text}")


KINDS = (
    Kind("dynamic"),
    Kind("fixed", ("--variant", "fixed"), fixed=True),
    Kind("zero-expand", ("--variant", "zero-expand")),
    Kind("block-512k", block_size("512K"), block=MiB // 2),
    Kind("block-4m", block_size("4M"), block=4 * MiB),
    Kind("block-8m", block_size("8M"), block=8 * MiB),
    Kind("qemu-made", maker="qemu"),
    Kind("virtualbox-made", maker="virtualbox"),
    Kind("diff", parents=1),
    Kind("chain-of-4", parents=3),
    # Only these have room behind the count when vdblk is killed: it makes up to 64 MiB of places ahead.
    Kind("dynamic-256m", size=256 * MiB),
    Kind("diff-256m", parents=1, size=256 * MiB),
)


class Case:
    """One image on its way through all steps."""

    def __init__(self, kind, args, folder):
        self.kind, self.size, self.seed = kind, kind.size, args.seed
        self.runtime, self.kills = args.runtime, args.kills
        self.ours, self.vbox, self.qemu = Ours(args.bin), VirtualBox(), Qemu()
        self.folder = f"{folder}/{kind.name}"
        os.makedirs(self.folder)
        self.model = Content(bytes(self.size))
        self.chain = [f"{self.folder}/{i}.vdi" for i in range(kind.parents + 1)]
        self.parents_sha = []
        self.rescued = False  # in this step

    @property
    def top(self):
        return self.chain[-1]

    def steps(self):
        yield "make", self.make
        yield "a", self.first_round
        yield "b-vbox", self.virtualbox_writes
        if self.kind.qemu_writes():
            yield "b-qemu", self.qemu_writes
        yield "c", self.second_round
        yield "d-vbox", self.crashed_then_virtualbox
        if self.kind.qemu_writes():
            yield "d-qemu", self.crashed_then_qemu

    def part(self, first, last):
        """A range of the busy part, in eighths: (offset, length)."""
        return BUSY * first // 8, BUSY * (last - first) // 8

    def tail(self):
        """Where blocks are appended after a crash: (offset, length)."""
        return BUSY * 6 // 8, self.size - BUSY * 6 // 8

    # ---- judging

    def judge(self, chain=None, model=None, allowed=(0,)):
        """All that must hold after a step; what vdimg check had to say."""
        chain, model = chain or self.chain, model or self.model
        said = self.ours.check(chain[-1], allowed)
        model.same(self.ours.content(chain[-1]), "vdimg convert")
        self.ours.compare(chain[-1], model)
        if [fx.file_sha(p) for p in chain[:-1]] != self.parents_sha:
            raise Wrong("a parent has changed")
        real_tools(chain, model)
        return said

    # ---- making

    def make(self):
        for layer, path in enumerate(self.chain):
            if layer:
                self.make_diff(layer, path)
            else:
                self.make_base(path)
            if path != self.top:
                self.fill_parent(layer, path)
        self.model.same(self.ours.content(self.top), "vdimg convert")
        self.parents_sha = [fx.file_sha(p) for p in self.chain[:-1]]
        return str(Table.of_file(self.top))

    def make_base(self, path):
        if self.kind.maker == "qemu":
            self.qemu.create(path, self.size)
            if Table.of_file(path).header_size != 384:
                raise Wrong("QEMU's header has not 384 bytes")
        elif self.kind.maker == "virtualbox":
            self.vbox.create(path, self.size)
        else:
            self.ours.create(path, "--size", str(self.size), *self.kind.options)

    def make_diff(self, layer, path):
        """Every other one by VirtualBox."""
        if layer % 2:
            self.ours.create(path, "--parent", self.chain[layer - 1])
        else:
            self.vbox.create_diff(self.chain[:layer], path)

    def fill_parent(self, layer, path):
        """vdblk and VirtualBox write to the layer while it is the last."""
        self.round(path, self.seed + 100 + layer, *self.part(layer, layer + 3))
        spec = gen.rand_spec(self.seed * 100 + layer, 0, BUSY, 20)
        spec += gen.rand_spec(self.seed * 200 + layer, 0, self.size, 10)
        self.vbox.change(self.chain[:layer + 1], [["wspec", spec]])
        self.model.write(spec)

    # ---- a and c: vdblk

    def round(self, path, seed, offset, length, *options):
        """A verify run on a part of the disk; the model follows."""
        dump = f"{self.folder}/dump.raw"
        figures = self.ours.bench(
            path, "--offset", str(offset), "--size", str(length), "--seed", str(seed), "--runtime", str(self.runtime),
            "--mix", MIX, "--max-units", "256", "--queues", "2", "--dump-model", dump, *options)
        after = self.model.copy()
        after.take(Content.of_file(dump), offset, length)
        os.unlink(dump)
        only_changed_by_vubench(self.model, after, seed, offset, length)
        self.model = after
        return figures

    def first_round(self):
        fresh = () if self.kind.parents else ("--assume-zero",)
        figures = self.round(self.top, self.seed, *self.part(0, 3), *fresh)
        self.judge()
        return load_told(figures, self.top)

    def second_round(self):
        self.model.same(self.ours.served(self.top), "vdblk")
        figures = self.round(self.top, self.seed + 1, *self.part(1, 4))
        self.judge()
        return load_told(figures, self.top)

    # ---- b: the others write

    def virtualbox_writes(self):
        lo, hi = 0, self.part(0, 6)[1]
        first = gen.rand_spec(self.seed * 10 + 1, lo, hi, 60) + gen.rand_spec(self.seed * 10 + 2, lo, hi, 6, 3 * MiB)
        self.vbox.change(self.chain, [["wspec", first]])
        self.model.write(first)
        self.model.same(self.ours.content(self.top), "vdimg convert after VirtualBox's writes")
        if not self.kind.fixed:
            self.virtualbox_trims(self.trim_ranges(lo, hi))
        second = gen.rand_spec(self.seed * 10 + 3, lo, hi, 20)
        self.vbox.change(self.chain, [["wspec", second]], 0 if self.kind.fixed else DISCARD)
        self.model.write(second)
        return check_told(self.judge(allowed=(0, 3)), self.top)

    def trim_ranges(self, lo, hi):
        """Some blocks, and some ranges that begin and end anywhere."""
        random, block = gen.Random(self.seed * 10 + 4), self.kind.block
        for _ in range(6):
            yield lo + random.below((hi - lo) // block) * block, block
        for offset, length, _, _ in gen.rand_spec(self.seed * 10 + 5, lo, hi, 6, 3 * block):
            yield offset, length

    def virtualbox_trims(self, ranges):
        """VirtualBox leaves blocks alone that the image does not have: a parent's data stay visible there."""
        block, entries, ranges = self.kind.block, Table.of_file(self.top).entries, list(ranges)
        self.vbox.change(self.chain, [["trim", *r] for r in ranges], DISCARD)
        for offset, length in ranges:
            at = offset
            while at < offset + length:
                end = min(offset + length, (at // block + 1) * block)
                if entries[at // block] != FREE:
                    self.model.data[at:end] = bytes(end - at)
                at = end

    def qemu_writes(self):
        lo, hi = 0, self.part(0, 6)[1]
        spec = gen.rand_spec(self.seed * 10 + 6, lo, hi, 80) + gen.rand_spec(self.seed * 10 + 7, lo, hi, 6, 3 * MiB)
        self.qemu.write(self.top, spec)
        self.model.write(spec)
        return check_told(self.judge(allowed=(0, 3)), self.top)

    # ---- d: killed

    def crashed_then_virtualbox(self):
        """Also makes the crashed images for the next step."""
        if not self.kind.fixed:
            self.virtualbox_trims([self.part(2, 6)])
            self.model.same(self.ours.content(self.top), "vdimg convert before the crash")
        said = []
        for n in range(self.kills):
            crashed = f"{self.folder}/crashed-{n}"
            copy_folder(self.folder, crashed)
            said.append(self.crash(crashed, n) + self.append(n, "vbox"))
        return "; ".join(said)

    def crashed_then_qemu(self):
        return "; ".join(self.append(n, "qemu") for n in range(self.kills))

    def load_options(self, n):
        offset, length = self.part(0, 6)
        return ("--offset", str(offset), "--size", str(length), "--seed", str(self.seed + 2 + n), "--mix", MIX,
                "--max-units", "64", "--iodepth", "8", "--queues", "2")

    def crash(self, folder, n):
        """Serves the images of the folder under load and kills vdblk; what is there then must be allowed."""
        path, shadow = f"{folder}/{os.path.basename(self.top)}", f"{folder}/shadow"
        random = gen.Random(self.seed * 100 + n + sum(map(ord, self.kind.name)) * 1000)
        delay = 0.005 * 1.5 ** random.below(13)  # up to 0.65 s
        self.ours.killed_under_load(path, shadow, delay, *self.load_options(n))
        found, shadow = self.ours.content(path), Shadow(shadow)
        shadow.judge(self.model, found)
        found.take(self.model, *self.tail())
        found.save(f"{folder}/model.raw")
        return f"after {shadow.generation} requests: {Table.of_file(path)}; "

    def append(self, n, who):
        """On a copy of the crashed image; nothing of vdblk may write to it before."""
        folder = f"{self.folder}/crashed-{n}-{who}"
        copy_folder(f"{self.folder}/crashed-{n}", folder)
        chain = [f"{folder}/{os.path.basename(p)}" for p in self.chain]
        model = Content.of_file(folder + "/model.raw")
        offset, length = self.tail()
        spec = gen.rand_spec(self.seed * 10 + 8 + n, offset, offset + length, 20)
        if who == "vbox":
            self.vbox.change(chain, [["wspec", spec]])
        else:
            self.qemu.write(chain[-1], spec)
        model.write(spec)
        if Table.of_file(chain[-1]).overflows():
            said, self.rescued = self.ours.check(chain[-1], (2,)), True
        else:
            said = self.ours.check(chain[-1], (0, 3))
            model.same(self.ours.content(chain[-1]), "vdimg convert after the append")
            real_tools(chain, model, strict=False)
        if said:
            self.ours.repair(chain[-1])
        self.judge(chain, model)
        model.same(self.ours.served(chain[-1]), "vdblk")
        shadow = ("--shadow", folder + "/shadow", "--check-only", "--crashed")
        self.ours.bench(chain[-1], *shadow, *self.load_options(n))
        shutil.rmtree(folder)
        return said and f"[check: {said}]"


def load_told(figures, path):
    ops = sum(figures[name] for name in ("reads", "writes", "write_zeroes", "discards", "flushes"))
    return f"{ops} requests; {Table.of_file(path)}"


def check_told(said, path):
    table = str(Table.of_file(path)) if path and os.path.exists(path) else ""
    return " ".join(filter(None, (table, f"[check: {said}]" if said else "")))


def run_case(case, results):
    for step, action in case.steps():
        start, case.rescued = time.monotonic(), False
        try:
            said = action()
            result = "ok*" if case.rescued else "ok"
        except Wrong as e:
            said, result = str(e), "FAIL"
        results[case.kind.name][step] = result
        seconds = time.monotonic() - start
        print(f"{case.kind.name:16} {step:7} {result:5} {seconds:5.1f} s  {said}", flush=True)
        if result == "FAIL":
            return False
    return True


def summary(results):
    print((f"\n{'':16} " + " ".join(f"{step:7}" for step in STEPS)).rstrip())
    for name, steps in results.items():
        print(f"{name:16} " + " ".join(f"{steps.get(step, '-'):7}" for step in STEPS).rstrip())


def arguments():
    default = os.path.normpath(os.path.join(fx.HERE, "../../target/release"))
    p = argparse.ArgumentParser(
        prog="interop.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=1, help="says everything that is random, times excepted (1)")
    p.add_argument("--kind", action="append", choices=[k.name for k in KINDS], help="only this; repeatable")
    p.add_argument("--runtime", type=float, default=1, help="seconds of a round of vubench (1)")
    p.add_argument("--kills", type=int, default=1, help="how often vdblk is killed (1)")
    p.add_argument("--bin", default=default, help="folder with vdblk, vdimg and examples/vubench")
    p.add_argument("--keep", action="store_true", help="keep the images; those of a failed case are always kept")
    return p.parse_args()


def main():
    args = arguments()
    os.makedirs(fx.SCRATCH, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="interop-", dir=fx.SCRATCH)
    kinds = [k for k in KINDS if not args.kind or k.name in args.kind]
    results = {k.name: {} for k in kinds}
    good = True
    for kind in kinds:
        case = Case(kind, args, folder)
        passed = run_case(case, results)
        good = good and passed
        if passed and not args.keep:
            shutil.rmtree(case.folder)
        elif not passed:
            print(f"{'':16} images are kept in {case.folder}")
    if not os.listdir(folder):
        os.rmdir(folder)
    summary(results)
    print("\nall compared equal" if good else "\nFAILED", f"(seed {args.seed})")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

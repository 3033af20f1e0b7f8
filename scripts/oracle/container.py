#!/usr/bin/env python3
"""Random sequences of operations, by VirtualBox's engine and by vdblk's container, step by step.

container.sh [--rounds N] [--seed S] [--steps K] [--keep]

Round n of seed S is the same everywhere: --seed S+n --rounds 1 repeats it. Of every step both sides have to say whether it was done, and what the
disk shows after it, which is compared with a model, too; in the end each opens, reads and merges the chain that the other has left. A round that fails keeps its folder and its lists of operations.

Left out, for VirtualBox does not do it, or not so that one could compare (docs/virtualbox.md):
  - resizing chains (a child longer than its parent cannot be read) and sparse VMDKs (its copies of tables go apart)
  - compacting VHDs that are diffs (it crashes), and formats that it does not compact
  - what a discarded range shows before it is written again: VirtualBox keeps parts of blocks as they were until all of a block is discarded,
    and of a block that a diff does not have the parent's bytes; here they are zeros. So a discard is followed by a write of its range.
  - zeros in QEDs: vdblk, like QEMU, writes the mark for a cluster of zeros, of which VirtualBox knows nothing: it shows the bytes
    from byte 1 of the file on instead
  - merging upwards into images without a UUID for their parent, and downwards beneath such: VirtualBox fails with VERR_NOT_SUPPORTED
  - HONOR_SAME over parents: of a block of which a part is written VirtualBox then loses what is beneath
  - diffs of formats that name parents by UUID over those that have none; VMDKs whose parent is merged into what lies beneath: VirtualBox
    leaves the old parent's UUID in them (and then fails to set their own: VERR_BUFFER_OVERFLOW); VHDs in the same place: it crashes
  - merging upwards into VHDs: VirtualBox then shows something else than before
  - comments of several lines: VirtualBox's VMDKs lose the ends of the lines
  - the size that VirtualBox shows after a resize: it is the old one until the image is opened again, so it is
  - UUIDs of images on which others stand: vdblk refuses to change them
  - merging the base upwards: VirtualBox 7.2.22 compares what it writes to the child with what shows through, which is the same, and so writes
    nothing; then it deletes the base (all its data is lost). A VHD that took in its base stays a diff besides, which it does not open any more
  - a diff over an image that was opened with HONOR_ZEROES or HONOR_SAME: VirtualBox fails with VERR_INVALID_PARAMETER, for it
    cannot make such an image read-only
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import uuid

import gen
from fx import HERE, SCRATCH, in_chroot, run

MIB = 1 << 20
EXTENSION = {"VDI": "vdi", "VMDK": "vmdk", "VHD": "vhd", "Parallels": "hdd", "QED": "qed", "QCOW": "qcow"}
FORMATS = ["VDI"] * 4 + ["VMDK"] * 3 + ["VHD"] * 3 + ["QED", "QCOW"]
FIXED, DIFF, SPLIT = 0x10000, 0x20000, 1
READ_ONLY, HONOR_ZEROES, HONOR_SAME, DISCARD = 1, 2, 4, 128
COMMENTED = ("VDI", "VMDK")
NAMING = ("VDI", "VMDK", "VHD")  # their parents by UUID
COPY_KINDS = [("VDI", 0), ("VDI", FIXED), ("VMDK", 0), ("VMDK", FIXED), ("VMDK", SPLIT), ("VHD", 0), ("VHD", FIXED)]


class Sequence:
    """A list of operations, and what the chain is like after them. @ stands for the folder of a side."""

    def __init__(self, seed, steps):
        self.rng = random.Random(seed)
        self.ops, self.chain, self.copies, self.files = [], [], [], 0
        # What each image of the chain shows with those beneath it, and the digests that every `sha` has to tell.
        self.models, self.expected = [], []
        self.size = self.rng.randrange(2, 13) * 2 * MIB
        self.flags = 0
        self.base()
        choices = [self.write] * 8 + [self.diff] * 3 + [self.merge] * 2 + [self.close] * 1 + [
            self.reopen, self.trim, self.compact, self.resize, self.copy, self.comment, self.set_uuid, self.flush]
        while len(self.ops) < steps * 2:
            self.rng.choice(choices)()
        self.add("closeall")

    def add(self, *op, look=True):
        self.ops.append(list(op))
        if look and op[0] != "closeall":
            self.ops.append(["sha"])
            self.expected.append(hashlib.sha256(self.models[-1]).hexdigest())

    def name(self, fmt):
        self.files += 1
        return f"@/{self.files}.{EXTENSION[fmt]}"

    def base(self):
        fmt = self.rng.choice(FORMATS)
        flags = 0
        if fmt in ("VDI", "VHD", "VMDK") and self.rng.random() < 0.2:
            flags = FIXED
        if fmt == "VMDK" and self.rng.random() < 0.2:
            flags |= SPLIT
        name = self.name(fmt)
        self.chain.append([fmt, name, flags])
        self.models.append(bytearray(self.size))
        self.add("create", fmt, name, self.size, {"flags": flags})

    def diff(self):
        if len(self.chain) >= 5 or self.flags & (HONOR_SAME | HONOR_ZEROES):
            return
        fmt = self.rng.choice(FORMATS)
        if self.chain[-1][0] not in NAMING and fmt in NAMING:
            return
        name = self.name(fmt)
        self.chain.append([fmt, name, DIFF])
        self.models.append(bytearray(self.models[-1]))
        self.flags = 0
        self.add("diff", fmt, name, {"flags": DIFF})

    def range(self, most=400 * 1024):
        sectors = self.rng.choice([1, 8, 127, 128, 300, 2048])
        length = min(self.rng.randrange(1, sectors + 1) * 512, most)
        offset = self.rng.randrange(0, (self.size - length) // 512 + 1) * 512
        if self.rng.random() < 0.4:
            offset = offset // 65536 * 65536
        return offset, length

    def put(self, offset, length, look=True):
        kind = self.rng.choice(["rnd", "rnd", "fill", "zero"])
        if kind == "zero" and self.chain[-1][0] == "QED":
            kind = "fill"
        entry = [offset, length, kind, self.rng.randrange(1, 5)]
        self.models[-1][offset:offset + length] = gen.pat(*entry)
        self.add("w", *entry, look=look)

    def write(self):
        for _ in range(self.rng.randrange(0, 4)):
            self.put(*self.range(), look=False)
        if self.rng.random() < 0.15:
            self.put(self.rng.randrange(0, self.size // MIB) * MIB, MIB, look=False)
        self.put(*self.range())

    def trim(self):
        if self.chain[-1][0] != "VDI" or not self.flags & DISCARD:
            return
        offset, length = self.range()
        if self.rng.random() < 0.5:
            offset, length = self.rng.randrange(0, self.size // MIB) * MIB, MIB
        self.add("trim", offset, length, look=False)
        self.put(offset, length)

    def flush(self):
        self.add("flush")

    def merge(self):
        if len(self.chain) < 2:
            return
        source, target = self.rng.sample(range(len(self.chain)), 2)
        if source == 0 or self.chain[target][0] == "QED":
            return
        child = self.chain[target] if target > source else self.chain[source + 1] if source + 1 < len(self.chain) else None
        if child and child[0] not in NAMING:
            return
        low, high = min(source, target), max(source, target)
        if low > 0 and child and self.chain[low - 1][0] not in NAMING and target > source:
            return
        if child and target < source and (self.chain[target][0] not in NAMING or child[0] != "VDI"):
            return
        if target > source and self.chain[target][0] == "VHD":
            return
        self.chain[low:high + 1] = [self.chain[target]]
        self.models[low:high + 1] = [self.models[high]]
        self.add("merge", source, target)

    def close(self):
        if len(self.chain) < 2:
            return
        self.chain.pop()
        self.models.pop()
        self.flags = 0
        self.add("close", {"delete": True})

    def reopen(self):
        self.add("closeall")
        for fmt, name, _ in self.chain[:-1]:
            self.add("open", fmt, name, {"open": READ_ONLY}, look=False)
        fmt, name, _ = self.chain[-1]
        self.flags = self.rng.choice([0, 0, HONOR_SAME, HONOR_ZEROES, HONOR_SAME | HONOR_ZEROES])
        if len(self.chain) > 1:
            self.flags &= ~HONOR_SAME
        if fmt == "VDI" and self.rng.random() < 0.5:
            self.flags |= DISCARD
        self.add("open", fmt, name, {"open": self.flags})

    def compact(self):
        n = self.rng.randrange(len(self.chain))
        fmt, _, flags = self.chain[n]
        if fmt == "VDI" or (fmt == "VHD" and flags == 0):
            if n == len(self.chain) - 1:
                self.add("compact", n)

    def resize(self):
        fmt, _, flags = self.chain[0]
        if len(self.chain) == 1 and flags == 0 and fmt in ("VDI", "VHD"):
            self.size += self.rng.randrange(1, 5) * 2 * MIB
            self.models[0].extend(bytes(self.size - len(self.models[0])))
            self.add("resize", self.size, look=False)
            self.reopen()

    def copy(self):
        fmt, flags = self.rng.choice(COPY_KINDS)
        name = self.name(fmt)
        n = self.rng.randrange(len(self.chain))
        self.copies.append([fmt, name, n == len(self.chain) - 1])
        self.add("copy", fmt, name, {"flags": flags, "n": n})

    def comment(self):
        if self.chain[-1][0] in COMMENTED:
            self.add("setcomment", -1, self.rng.choice(["", "a comment", "another", "ü" * 50]))

    def set_uuid(self):
        if self.chain[-1][0] in ("VDI", "VHD"):
            self.add("setuuid", -1, str(uuid.UUID(int=self.rng.getrandbits(128), version=4)))

    def opened(self, chain):
        """A list that opens and reads a chain, and every copy by itself."""
        ops = [["open", fmt, name, {"open": READ_ONLY}] for fmt, name, _ in chain]
        ops += [["info"], ["sha"], ["closeall"]]
        for fmt, name, _ in self.copies:
            ops += [["open", fmt, name, {"open": READ_ONLY}], ["sha"], ["closeall"]]
        return ops


def side(ops, folder):
    return json.loads(json.dumps(ops).replace('"@/', f'"{folder}/'))


def done_by(ours, ops, folder, log):
    """What a side says of each operation."""
    path = f"{log}.json"
    with open(path, "w", encoding="utf-8") as f:
        json.dump(side(ops, folder), f)
    command = [os.environ["VDTOOL"], "@" + path] if ours else in_chroot(["python3", HERE + "/vdtool.py", "@" + path])
    status, out, err = run(command)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    with open(f"{log}.told", "w", encoding="utf-8") as f:
        f.write(out + err)
    if len(lines) != len(ops):
        raise Different(f"{log}: ended with {status} after {len(lines)} of {len(ops)} operations: {err[-300:]}")
    return lines


class Different(Exception):
    pass


def same(ops, theirs, ours, what):
    for n, (op, t, o) in enumerate(zip(ops, theirs, ours)):
        if (t[1] < 0) != (o[1] < 0):
            raise Different(f"{what}: step {n} {op}: VirtualBox {t[2]}, vdblk {o[2]}")
        if op[0] == "sha" and t[3] != o[3]:
            raise Different(f"{what}: after step {n - 1} {ops[n - 1]}: VirtualBox {t[3]}, vdblk {o[3]}")
        if op[0] == "info":
            told = [[[i["size"], i["comment"] if i["comment"] and not str(i["comment"]).startswith("VERR") else ""]
                     for i in side[3]] for side in (t, o)]
            if told[0] != told[1]:
                raise Different(f"{what}: VirtualBox tells {told[0]}, vdblk {told[1]}")


def round_of(seed, steps, folder):
    sequence = Sequence(seed, steps)
    sides = {}
    for name, is_ours in (("virtualbox", False), ("vdblk", True)):
        os.makedirs(f"{folder}/{name}")
        sides[name] = done_by(is_ours, sequence.ops, f"{folder}/{name}", f"{folder}/{name}.ops")
    for name, told in sides.items():
        shown = [line[3] for op, line in zip(sequence.ops, told) if op[0] == "sha"]
        wrong = [n for n, (s, e) in enumerate(zip(shown, sequence.expected)) if s and s["sha256"] != e]
        if wrong:
            n = [n for n, op in enumerate(sequence.ops) if op[0] == "sha"][wrong[0]]
            raise Different(f"{name} shows something else than was written, from step {n - 1} on: {sequence.ops[n - 1]}")
    same(sequence.ops, sides["virtualbox"], sides["vdblk"], "the sequence")
    reads = sequence.opened(sequence.chain)
    # Each chain as both sides see it: what VirtualBox left, then what vdblk left.
    last = [line[3] for op, line in zip(sequence.ops, sides["vdblk"]) if op[0] == "sha"][-1]
    for left in ("virtualbox", "vdblk"):
        told = {s: done_by(s == "vdblk", reads, f"{folder}/{left}", f"{folder}/{left}.by-{s}") for s in sides}
        same(reads, told["virtualbox"], told["vdblk"], f"what {left} left")
        shown = next(line[3] for op, line in zip(reads, told["vdblk"]) if op[0] == "sha")
        if shown != last:
            raise Different(f"what {left} left shows {shown}, and its last step showed {last}")
    # And each goes on with the other's.
    base, last_opened = sequence.chain[0], sequence.chain[-1]
    go_on = [["open", f, n, {"open": READ_ONLY}] for f, n, _ in sequence.chain[:-1]]
    go_on += [["open", last_opened[0], last_opened[1], {}], ["w", 65536, 4096, "rnd", 77], ["w", 0, 512, "fill" if last_opened[0] == "QED" else "zero", 1]]
    if len(sequence.chain) > 1 and base[0] != "QED":
        go_on += [["merge", len(sequence.chain) - 1, 0]]
    go_on += [["sha"], ["closeall"], ["open", base[0], base[1], {"open": READ_ONLY}], ["sha"], ["closeall"]]
    theirs = done_by(False, go_on, f"{folder}/vdblk", f"{folder}/vdblk.on-virtualbox")
    ours = done_by(True, go_on, f"{folder}/virtualbox", f"{folder}/virtualbox.on-vdblk")
    same(go_on, theirs, ours, "going on with the other's")
    if any(line[1] < 0 for line in ours):
        raise Different(f"going on with the other's: {[line[:3] for line in ours if line[1] < 0]}")
    return sequence


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--keep", action="store_true", help="keep the images of rounds that are as they should be, too")
    args = parser.parse_args()
    failed, counts = 0, {}
    for seed in range(args.seed, args.seed + args.rounds):
        folder = f"{SCRATCH}/container-{os.getpid()}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        try:
            sequence = round_of(seed, args.steps, folder)
            for op in sequence.ops:
                counts[op[0]] = counts.get(op[0], 0) + 1
            if not args.keep:
                shutil.rmtree(folder)
        except Different as e:
            failed += 1
            print(f"seed {seed}: {e}\n  kept in {folder}", flush=True)
    told = ", ".join(f"{op} {n}" for op, n in sorted(counts.items()))
    print(f"container: {args.rounds - failed} of {args.rounds} sequences the same; of these: {told}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""model.py - what tests/pattern.sh does to a disk, and what the disk must contain afterwards.

    model.py plan  SEED SIZE          operations, one a line:  write|zero|discard|flush OFFSET LENGTH [FROM]
    model.py data  SEED               the content that writes take from, on standard output
    model.py image SEED SIZE OUT      the disk as a sparse raw file (discarded ranges: zeroes)
    model.py check SEED SIZE RAW      compares the first SIZE bytes of a raw image byte for byte; in a
                                      discarded range each sector must be zero or what was there before

SIZE is in bytes, a multiple of 1 MiB. Everything follows from SEED and SIZE.
"""
import random
import sys

PAGE, SECTOR, MIB = 4096, 512, 1 << 20
DATA = 2 * MIB
#: changes after the first that makes all of it zero
CHANGES = 150


def data(seed):
    return random.Random(f"data {seed}").randbytes(DATA)


def plan(seed, size):
    """(operation, offset, length, from) of each step; whole pages only."""
    dice = random.Random(f"plan {seed} {size}")
    pages = size // PAGE
    yield "zero", 0, size, 0
    for i in range(CHANGES):
        op = dice.choices(("write", "discard", "zero"), (60, 30, 10))[0]
        # mostly small, sometimes across several blocks of 1 MiB
        n = dice.randint(1, 16) if dice.random() < 0.7 else dice.randint(17, DATA // PAGE)
        n = min(n, pages)
        first = dice.randint(0, pages - n)
        source = dice.randint(0, DATA // PAGE - n)
        yield op, first * PAGE, n * PAGE, source * PAGE if op == "write" else 0
        if i % 20 == 19:
            yield "flush", 0, 0, 0


def model(seed, size):
    """The content, with zeroes where discarded; and per page what a discard may have left."""
    content, before, source = bytearray(size), {}, data(seed)
    for op, at, n, start in plan(seed, size):
        for page in range(at // PAGE, (at + n) // PAGE):
            o = page * PAGE
            if op == "discard":
                before.setdefault(page, bytes(content[o : o + PAGE]))
            else:
                before.pop(page, None)
            content[o : o + PAGE] = source[start + o - at :][:PAGE] if op == "write" else bytes(PAGE)
    return content, before


def write_image(seed, size, out):
    content, _ = model(seed, size)
    with open(out, "wb") as f:
        f.truncate(size)
        for o in range(0, size, PAGE):
            page = content[o : o + PAGE]
            if any(page):
                f.seek(o)
                f.write(page)


def check(seed, size, raw):
    content, before = model(seed, size)
    old = 0
    with open(raw, "rb") as f:
        for o in range(0, size, SECTOR):
            got, want = f.read(SECTOR), content[o : o + SECTOR]
            if got == want:
                continue
            left = before.get(o // PAGE)
            if left is not None and got == left[o % PAGE :][:SECTOR]:
                old += 1
                continue
            kind = "discarded" if left is not None else "known"
            sys.exit(f"model: offset {o} ({kind}): got {got[:16].hex()}…, expected {bytes(want[:16]).hex()}…")
    gone = len(before) * (PAGE // SECTOR)
    print(f"model: {size} bytes right; of {gone} discarded sectors {old} still have their old content")


def main():
    match sys.argv[1:]:
        case ["plan", seed, size]:
            for op, at, n, start in plan(seed, int(size)):
                print(op, at, n, start)
        case ["data", seed]:
            sys.stdout.buffer.write(data(seed))
        case ["image", seed, size, out]:
            write_image(seed, int(size), out)
        case ["check", seed, size, raw]:
            check(seed, int(size), raw)
        case _:
            sys.exit(__doc__)


main()

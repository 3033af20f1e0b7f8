#!/usr/bin/env python3
"""Content of a disk, derived from a short specification.

A specification is a list of [offset, length, kind, seed], in bytes; later entries overwrite earlier ones, and what
none of them names is zero. The bytes depend on the absolute 512-byte sector number of the disk ("lba"), so that a
block in the wrong place is always seen:

  rnd   64 little-endian words a sector: lba, seed, then splitmix64(seed * 0x9E3779B97F4A7C15 + lba * 64 + i)
  txt   "vdblk seed=%08x lba=%012x\\n" repeated and cut to 512 bytes (compressible)
  fill  every byte is seed & 0xff
  zero  zeros

gen.py sha SIZE SPEC.json           SHA-256 of the whole disk
gen.py raw SIZE SPEC.json OUT       as a sparse raw file
gen.py runs SIZE SPEC.json          the runs that are not zero: [[offset, length, sha256], …]
gen.py verify RAW SIZE SPEC.json    compares; exit status 1 if different
gen.py pat OFFSET LENGTH KIND SEED OUT
"""
import hashlib
import json
import struct
import sys

MASK = (1 << 64) - 1
GOLD = 0x9E3779B97F4A7C15
SECTOR = 512
CHUNK = 65536


def splitmix64(x):
    x = (x + GOLD) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def random_sector(lba, seed):
    base = seed * GOLD + lba * 64
    return struct.pack("<64Q", lba, seed & MASK, *(splitmix64((base + i) & MASK) for i in range(2, 64)))


def text_sector(lba, seed):
    line = b"vdblk seed=%08x lba=%012x\n" % (seed & 0xFFFFFFFF, lba)
    return (line * (SECTOR // len(line) + 1))[:SECTOR]


def pat(offset, length, kind, seed):
    """The bytes of one entry of a specification."""
    if kind == "zero":
        return bytes(length)
    if kind == "fill":
        return bytes([seed & 0xFF]) * length
    sector = {"rnd": random_sector, "txt": text_sector}[kind]
    first, last = offset // SECTOR, (offset + length + SECTOR - 1) // SECTOR
    data = b"".join(sector(lba, seed) for lba in range(first, last))
    skip = offset - first * SECTOR
    return data[skip:skip + length]


class Disk:
    """A sparse disk in memory."""

    def __init__(self, size, spec=()):
        self.size = size
        self.chunks = {}
        for entry in spec:
            self.write(*entry)

    def pieces(self, offset, length):
        """(chunk, where in it, how much, where in the range)"""
        at = offset
        while at < offset + length:
            inside = at % CHUNK
            n = min(CHUNK - inside, offset + length - at)
            yield at // CHUNK, inside, n, at - offset
            at += n

    def write(self, offset, length, kind, seed=0):
        assert 0 <= offset and offset + length <= self.size, (offset, length, self.size)
        data = None if kind == "zero" else pat(offset, length, kind, seed)
        for chunk, inside, n, at in self.pieces(offset, length):
            if data is not None:
                self.chunks.setdefault(chunk, bytearray(CHUNK))[inside:inside + n] = data[at:at + n]
            elif chunk in self.chunks:
                self.chunks[chunk][inside:inside + n] = bytes(n)

    def read(self, offset, length):
        out = bytearray(length)
        for chunk, inside, n, at in self.pieces(offset, length):
            if chunk in self.chunks:
                out[at:at + n] = self.chunks[chunk][inside:inside + n]
        return bytes(out)

    def sha(self):
        digest, at, zeros = hashlib.sha256(), 0, bytes(1 << 20)

        def skip_to(end):
            for start in range(at, end, len(zeros)):
                digest.update(zeros[:end - start])

        for chunk in sorted(self.chunks):
            skip_to(chunk * CHUNK)
            at = min((chunk + 1) * CHUNK, self.size)
            digest.update(self.chunks[chunk][:at - chunk * CHUNK])
        skip_to(self.size)
        return digest.hexdigest()

    def runs(self):
        """Runs of neighbouring chunks with something in them, cut to sectors at both ends."""
        spans = []
        for chunk in sorted(c for c in self.chunks if any(self.chunks[c])):
            if spans and spans[-1][1] == chunk:
                spans[-1][1] += 1
            else:
                spans.append([chunk, chunk + 1])
        return [self.trimmed(a * CHUNK, min(b * CHUNK, self.size)) for a, b in spans]

    def trimmed(self, start, end):
        data = self.read(start, end - start)
        head, tail = 0, len(data)
        while not any(data[head:head + SECTOR]):
            head += SECTOR
        while not any(data[tail - SECTOR:tail]):
            tail -= SECTOR
        return [start + head, tail - head, hashlib.sha256(data[head:tail]).hexdigest()]

    def to_raw(self, path):
        with open(path, "wb") as out:
            out.truncate(self.size)
            for chunk in sorted(self.chunks):
                out.seek(chunk * CHUNK)
                out.write(self.chunks[chunk][:self.size - chunk * CHUNK])


class Random:
    """A random number generator that is the same everywhere."""

    def __init__(self, seed):
        self.state = seed

    def next(self):
        self.state = (self.state + GOLD) & MASK
        return splitmix64(self.state)

    def below(self, n):
        return self.next() % n


def rand_spec(seed, lo, hi, n, maxlen=CHUNK, kinds=("rnd", "txt", "rnd", "zero"), align=SECTOR):
    """n random entries inside lo..hi"""
    random, out = Random(seed), []
    for i in range(n):
        length = (1 + random.below(min(maxlen, hi - lo) // align)) * align
        offset = lo + random.below((hi - lo - length) // align + 1) * align
        out.append([offset, length, kinds[random.below(len(kinds))], seed * 1000 + i])
    return out


def file_sha(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def main(command, *args):
    if command == "pat":
        offset, length, kind, seed, out = args
        with open(out, "wb") as f:
            f.write(pat(int(offset), int(length), kind, int(seed, 0)))
        return 0
    raw, args = (args[0], args[1:]) if command == "verify" else (None, args)
    with open(args[1], encoding="utf-8") as f:
        disk = Disk(int(args[0]), json.load(f))
    if command == "sha":
        print(disk.sha())
    elif command == "runs":
        print(json.dumps(disk.runs()))
    elif command == "raw":
        disk.to_raw(args[2])
    elif command == "verify":
        same = file_sha(raw) == disk.sha()
        print("OK" if same else "MISMATCH")
        return 0 if same else 1
    else:
        raise SystemExit(f"unknown command {command}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))

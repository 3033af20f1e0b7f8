"""What a disk must contain, and what vubench's shadow file allows."""
import hashlib
import struct

import gen

SECTOR = 512
VUBENCH_MAGIC = 0x314255424B4C4256  # first word of each sector that vubench writes
SHADOW_MAGIC = 0x32776F6461687376
# flags of a unit in the shadow file
ZERO_SINCE, DISCARDED, UNKNOWN = 2, 4, 8
# A request that was posted longer ago than this many others is not in flight any more.
LONG_AGO = 1000


class Wrong(Exception):
    """Something is not as it must be."""


class Content:
    """The whole disk, in memory."""

    def __init__(self, data):
        self.data = bytearray(data)

    @classmethod
    def of_file(cls, path):
        with open(path, "rb") as f:
            return cls(f.read())

    def copy(self):
        return Content(self.data)

    def sha(self):
        return hashlib.sha256(self.data).hexdigest()

    def write(self, spec):
        for offset, length, kind, seed in spec:
            self.data[offset:offset + length] = gen.pat(offset, length, kind, seed)

    def take(self, other, offset, length):
        """The other's bytes of a range."""
        self.data[offset:offset + length] = other.data[offset:offset + length]

    def save(self, path):
        with open(path, "wb") as out:
            out.truncate(len(self.data))
            for at in range(0, len(self.data), 65536):
                piece = self.data[at:at + 65536]
                if any(piece):
                    out.seek(at)
                    out.write(piece)

    def same(self, other, who):
        """Fails unless the other is equal."""
        if self.data == other.data:
            return
        if len(self.data) != len(other.data):
            raise Wrong(f"{who}: {len(other.data)} bytes instead of {len(self.data)}")
        bad = [at for at in range(0, len(self.data), SECTOR) if self.data[at:at + SECTOR] != other.data[at:at + SECTOR]]
        there, must = (bytes(c.data[bad[0]:bad[0] + 16]).hex() for c in (other, self))
        raise Wrong(f"{who}: {len(bad)} sectors differ, the first at {bad[0]}: {there} instead of {must}")


def generation(sector, seed, at):
    """The generation of vubench's write to this place; None if it is none of this seed's."""
    magic, offset, number, its_seed = struct.unpack_from("<4Q", sector)
    return number if (magic, offset, its_seed) == (VUBENCH_MAGIC, at, seed) else None


def only_changed_by_vubench(before, after, seed, offset, length):
    """In the range a sector is as before, zero, or written by the vubench of this seed; outside it is as before."""
    for at in range(0, len(before.data), SECTOR):
        now = after.data[at:at + SECTOR]
        if now == before.data[at:at + SECTOR]:
            continue
        if not offset <= at < offset + length:
            raise Wrong(f"sector at {at} has changed, which nobody wrote to")
        if any(now) and generation(now, seed, at) is None:
            raise Wrong(f"sector at {at} has foreign content: {bytes(now[:32]).hex()}")


class Shadow:
    """vubench's model of each unit, as it was when the server had gone."""

    def __init__(self, path):
        with open(path, "rb") as f:
            raw = f.read()
        magic, self.seed, self.offset, self.n, self.unit, self.generation = struct.unpack_from("<6Q", raw)
        if magic != SHADOW_MAGIC:
            raise Wrong(f"{path} is no shadow file")
        self.units = list(struct.iter_unpack("<4Q", raw[48:]))

    def tally(self):
        known = sum(1 for *_, flags in self.units if not flags & UNKNOWN)
        return f"{self.generation} requests, {known} of {self.n} units known"

    def judge(self, before, after):
        """After kill -9 of the server every completed write must be there: only requests in flight have a choice."""
        for i, unit in enumerate(self.units):
            start = self.offset + i * self.unit
            for at in range(start, start + self.unit, SECTOR):
                now = after.data[at:at + SECTOR]
                if not self.allows(unit, now, before.data[at:at + SECTOR], at):
                    raise Wrong(f"sector at {at}: {bytes(now[:32]).hex()}, vubench's model {unit}")

    def allows(self, unit, now, old, at):
        latest, _, posted, flags = unit
        if not any(now) and (latest == 0 and not flags & UNKNOWN or flags & (ZERO_SINCE | DISCARDED)):
            return True
        if flags & UNKNOWN and now == old:
            return True
        found = generation(now, self.seed, at)
        in_flight = posted > latest and posted > self.generation - LONG_AGO
        return found is not None and (found == latest or in_flight and found == posted)

#!/usr/bin/env python3
"""Drives VirtualBox's own image library (VBoxDDU.so, VBoxRT.so). Must run where VirtualBox is: in the chroot.

vdtool.py '[[OP, ARGUMENT…], …]' or vdtool.py @FILE; prints [op, status, its name, result] as JSON, a line per op.

  new
  create FORMAT FILE SIZE {flags, comment, uuid, pchs, lchs, open}
  diff FORMAT FILE {flags, comment, uuid, parent, open}     a child of the image opened last
  open FORMAT FILE {open}                                   base first
  w OFFSET LENGTH KIND SEED      wspec [[…], …]      (contents: gen.py)
  trim OFFSET LENGTH             flush               close {delete}       closeall
     (discards of parts of blocks are carried out by close of the last image, and forgotten by closeall)
  compact N                      resize SIZE         merge FROM TO
  copy FORMAT FILE {flags, uuid, size, n, open}
  setcomment N TEXT              setuuid N UUID      setparent N UUID
  info                           sha                 raw FILE             sharuns [[offset, length], …]
  cache FILE SIZE {uuid}         repair FORMAT FILE DRY_RUN               format FILE
  abort                          ends at once, as if killed

flags: 0x10000 fixed, 0x20000 diff, 0x100 zero-expand, 1 split in 2 GB, 4 stream-optimized, 8 ESX
open:  1 read-only, 2 honor zeroes, 4 honor same, 8 info, 16 async, 32 shareable, 64 sequential, 128 discard
"""
import ctypes
import hashlib
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import gen

LIBRARIES = "/usr/lib/virtualbox/"
DIFF = 0x20000
READ_SIZE = 1 << 20

u32, u64, size_t, ref = ctypes.c_uint, ctypes.c_uint64, ctypes.c_size_t, ctypes.byref
Uuid = ctypes.c_ubyte * 16


class Geometry(ctypes.Structure):
    _fields_ = [("cylinders", ctypes.c_uint32), ("heads", ctypes.c_uint32), ("sectors", ctypes.c_uint32)]


class Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("size", ctypes.c_size_t)]


def load():
    runtime = ctypes.CDLL(LIBRARIES + "VBoxRT.so", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(LIBRARIES + "VBoxDDU.so", mode=ctypes.RTLD_GLOBAL)
    argv = (ctypes.c_char_p * 2)(b"vdtool", None)
    runtime.RTR3InitExe(1, ref(ctypes.cast(argv, ctypes.c_void_p)), 0)
    for name in ("VDGetSize", "VDGetFileSize"):
        getattr(library, name).restype = u64
    library.VDGetCount.restype = u32
    library.VDInit()
    return runtime, library


rt, vd = load()


def name_of(status):
    if not status:
        return "VINF_SUCCESS"
    text = ctypes.create_string_buffer(256)
    rt.RTErrQueryDefine(ctypes.c_int(status), text, size_t(256), ctypes.c_bool(False))
    return text.value.decode()


def uuid_from(text):
    if not text:
        return None
    uuid = Uuid()
    if rt.RTUuidFromStr(ref(uuid), text.encode()) < 0:
        raise SystemExit(f"{text} is no UUID")
    return ref(uuid)


def uuid_text(uuid):
    text = ctypes.create_string_buffer(64)
    rt.RTUuidToStr(ref(uuid), text, 64)
    return text.value.decode()


def geometry_from(values):
    return ref(Geometry(*(values or (0, 0, 0))))


def geometry_values(g):
    return [g.cylinders, g.heads, g.sectors]


def encoded(text):
    return None if text is None else text.encode()


class Failed(Exception):
    """A call that did not succeed, with its status and what is to be told besides."""

    def __init__(self, status, result=None):
        super().__init__(status)
        self.status, self.result = status, result


def ok(status, result=None):
    if ctypes.c_int(status).value < 0:
        raise Failed(status, result)


class Engine:
    """One chain of images; every method is an operation and returns what it found, if anything."""

    def __init__(self):
        self.disk = None
        self.new()

    def new(self):
        self.disk = ctypes.c_void_p()
        ok(vd.VDCreate(None, 1, ref(self.disk)))

    def create(self, fmt, file, size, **k):
        ok(vd.VDCreateBase(
            self.disk, fmt.encode(), file.encode(), u64(size), u32(k.get("flags", 0)), encoded(k.get("comment")),
            geometry_from(k.get("pchs")), geometry_from(k.get("lchs")), uuid_from(k.get("uuid")),
            u32(k.get("open", 0)), None, None))

    def diff(self, fmt, file, **k):
        ok(vd.VDCreateDiff(
            self.disk, fmt.encode(), file.encode(), u32(k.get("flags", DIFF)), encoded(k.get("comment")),
            uuid_from(k.get("uuid")), uuid_from(k.get("parent")), u32(k.get("open", 0)), None, None))

    def open(self, fmt, file, **k):
        ok(vd.VDOpen(self.disk, fmt.encode(), file.encode(), u32(k.get("open", 0)), None))

    def w(self, *entry):
        self.wspec([entry])

    def wspec(self, spec):
        for entry in spec:
            data = gen.pat(*entry)
            ok(vd.VDWrite(self.disk, u64(entry[0]), data, size_t(len(data))), entry)

    def trim(self, offset, length):
        ok(vd.VDDiscardRanges(self.disk, ref(Range(offset, length)), 1))

    def flush(self):
        ok(vd.VDFlush(self.disk))

    def close(self, **k):
        ok(vd.VDClose(self.disk, ctypes.c_bool(bool(k.get("delete")))))

    def closeall(self):
        ok(vd.VDCloseAll(self.disk))

    def compact(self, n):
        ok(vd.VDCompact(self.disk, u32(n & 0xFFFFFFFF), None))

    def resize(self, size):
        ok(vd.VDResize(self.disk, u64(size), geometry_from(None), geometry_from(None), None))

    def merge(self, source, target):
        ok(vd.VDMerge(self.disk, u32(source), u32(target), None))

    def copy(self, fmt, file, **k):
        target = ctypes.c_void_p()
        ok(vd.VDCreate(None, 1, ref(target)))
        status = vd.VDCopy(
            self.disk, u32(k.get("n", 0xFFFFFFFF)), target, fmt.encode(), file.encode(), ctypes.c_bool(False),
            u64(k.get("size", 0)), u32(k.get("flags", 0)), uuid_from(k.get("uuid")), u32(k.get("open", 0)),
            None, None, None)
        vd.VDDestroy(target)
        ok(status)

    def setcomment(self, n, text):
        ok(vd.VDSetComment(self.disk, u32(n & 0xFFFFFFFF), text.encode()))

    def setuuid(self, n, text):
        ok(vd.VDSetUuid(self.disk, u32(n & 0xFFFFFFFF), uuid_from(text)))

    def setparent(self, n, text):
        ok(vd.VDSetParentUuid(self.disk, u32(n & 0xFFFFFFFF), uuid_from(text)))

    def info(self):
        return [self.info_of(n) for n in range(vd.VDGetCount(self.disk))]

    def info_of(self, n):
        told = {"size": vd.VDGetSize(self.disk, n), "filesize": vd.VDGetFileSize(self.disk, n)}
        getters = (
            ("uuid", vd.VDGetUuid, Uuid(), uuid_text),
            ("parent", vd.VDGetParentUuid, Uuid(), uuid_text),
            ("modification", vd.VDGetModificationUuid, Uuid(), uuid_text),
            ("pchs", vd.VDGetPCHSGeometry, Geometry(), geometry_values),
            ("lchs", vd.VDGetLCHSGeometry, Geometry(), geometry_values),
            ("imageflags", vd.VDGetImageFlags, u32(), lambda v: hex(v.value)),
            ("version", vd.VDGetVersion, u32(), lambda v: hex(v.value)),
            ("openflags", vd.VDGetOpenFlags, u32(), lambda v: v.value),
        )
        for key, getter, value, shown in getters:
            status = getter(self.disk, u32(n), ref(value))
            told[key] = shown(value) if status >= 0 else name_of(status)
        text = ctypes.create_string_buffer(4096)
        status = vd.VDGetComment(self.disk, u32(n), text, 4096)
        told["comment"] = text.value.decode("utf-8", "replace") if status >= 0 else name_of(status)
        return told

    def size(self):
        return vd.VDGetSize(self.disk, u32(vd.VDGetCount(self.disk) - 1))

    def read(self, offset, length):
        data = ctypes.create_string_buffer(length)
        ok(vd.VDRead(self.disk, u64(offset), data, size_t(length)), {"failed_at": offset})
        return data.raw

    def pieces(self):
        size = self.size()
        for offset in range(0, size, READ_SIZE):
            yield offset, self.read(offset, min(READ_SIZE, size - offset))

    def sha(self):
        digest = hashlib.sha256()
        for _, data in self.pieces():
            digest.update(data)
        return {"sha256": digest.hexdigest(), "size": self.size()}

    def raw(self, file):
        with open(file, "wb") as out:
            out.truncate(self.size())
            for offset, data in self.pieces():
                if any(data):
                    out.seek(offset)
                    out.write(data)
        return {"size": self.size()}

    def sharuns(self, runs):
        return [hashlib.sha256(self.read(offset, length)).hexdigest() for offset, length in runs]

    def cache(self, file, size, **k):
        ok(vd.VDCreateCache(self.disk, b"VCI", file.encode(), u64(size), u32(0x10000), None,
                            uuid_from(k.get("uuid")), u32(0), None, None))

    def repair(self, fmt, file, dry_run):
        ok(vd.VDRepair(None, None, file.encode(), fmt.encode(), u32(1 if dry_run else 0)))

    def format(self, file):
        found, kind = ctypes.c_char_p(), ctypes.c_int(0)
        ok(vd.VDGetFormat(None, None, file.encode(), 0, ref(found), ref(kind)))
        return {"format": found.value.decode() if found.value else None, "type": kind.value}

    def abort(self):
        sys.stdout.flush()
        os._exit(9)


OPS = (
    "new create diff open w wspec trim flush close closeall compact resize merge copy setcomment setuuid setparent "
    "info sha raw sharuns cache repair format abort"
).split()


def do(engine, op, *args):
    """Runs and tells one operation; its status."""
    if op not in OPS:
        raise SystemExit(f"unknown operation {op}")
    options = args[-1] if args and isinstance(args[-1], dict) else {}
    plain = args[:-1] if options or (args and args[-1] == {}) else args
    status, result = 0, None
    try:
        result = getattr(engine, op)(*plain, **options)
    except Failed as e:
        status, result = ctypes.c_int(e.status).value, e.result
    print(json.dumps([op, status, name_of(status), result]), flush=True)
    return status


def main(text):
    if text.startswith("@"):
        with open(text[1:], encoding="utf-8") as f:
            text = f.read()
    engine = Engine()
    statuses = [do(engine, *op) for op in json.loads(text)]
    vd.VDDestroy(engine.disk)
    return 1 if min(statuses, default=0) < 0 else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1]))

#!/usr/bin/env python3
"""extract-vmlinux.py VMLINUZ OUT - the ELF inside a bzImage, for loaders that want PVH."""
import lzma
import struct
import subprocess
import sys
import zlib


def lz4_legacy(data):
    """The frame format of the kernel's lz4: magic, then blocks of length and data."""
    import ctypes

    z = ctypes.CDLL("liblz4.so.1")
    room = 8 << 20
    buf = ctypes.create_string_buffer(room)
    out, at = b"", 4
    while at + 4 <= len(data):
        (n,) = struct.unpack_from("<I", data, at)
        at += 4
        if n == 0 or at + n > len(data):
            break
        got = z.LZ4_decompress_safe(data[at : at + n], buf, n, room)
        if got < 0:
            break
        out += buf.raw[:got]
        at += n
    return out


def decompress(data):
    if data[:6] == b"\xfd7zXZ\0":
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(data)
    if data[:2] == b"\x1f\x8b":
        return zlib.decompressobj(31).decompress(data)
    if data[:4] == b"\x28\xb5\x2f\xfd":
        return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE).stdout
    if data[:4] == b"\x02\x21\x4c\x18":
        return lz4_legacy(data)
    return data


def main():
    image = open(sys.argv[1], "rb").read()
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)  # payload_offset, payload_length
    elf = decompress(image[(setup_sectors + 1) * 512 + offset :][:length])
    if elf[:4] != b"\x7fELF":
        sys.exit(f"extract-vmlinux: no ELF in there, but {elf[:8]!r}")
    open(sys.argv[2], "wb").write(elf)


main()

#!/usr/bin/env python3
"""stub-libs.py PROGRAM DIR SONAME... - stand-ins for libraries that a program is linked to and
never calls here.

Debian's fio wants Ceph, Gluster, RDMA, PMEM and NBD libraries, some 75 MB. Libraries of the same
name, symbols and versions, whose functions only abort, serve as well.
"""
import os
import re
import subprocess
import sys
import tempfile

# Symbols without a version are told apart by their prefix.
PREFIX = {"librados.so.2": "rados_", "librbd.so.1": "rbd_"}


def run(*args):
    return subprocess.run(args, check=True, capture_output=True, text=True).stdout


def wanted(program, names):
    """{soname: {version: {(symbol, type)}}} of those names that the program needs."""
    dynamic = run("readelf", "-dW", program)
    need = re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic)
    owner, library = {}, None
    for line in run("readelf", "-VW", program).splitlines():
        if m := re.search(r"Version: \d+\s+File: (\S+)", line):
            library = m[1]
        if (m := re.search(r"Name: (\S+)\s+Flags", line)) and library:
            owner.setdefault(m[1], library)
    result = {n: {} for n in names if n in need}
    for line in run("readelf", "--dyn-syms", "-W", program).splitlines():
        f = line.split()
        if len(f) < 8 or f[6] != "UND":
            continue
        symbol, _, version = f[7].partition("@")
        version = version.lstrip("@")
        if version:
            library = owner.get(version)
        else:
            library = next((k for k, p in PREFIX.items() if symbol.startswith(p)), None)
        if library in result:
            result[library].setdefault(version, set()).add((symbol, f[3]))
    return result


def build(soname, versions, out):
    code, script = ["extern void abort(void);"], []
    for version, symbols in versions.items():
        for symbol, kind in sorted(symbols):
            thing = f"char {symbol}[64];" if kind == "OBJECT" else f"void {symbol}(void){{abort();}}"
            code.append(thing)
        if version:
            names = " ".join(s + ";" for s, _ in sorted(symbols))
            script.append(f"{version} {{ global: {names} }};")
    with tempfile.TemporaryDirectory() as d:
        c, m = os.path.join(d, "stub.c"), os.path.join(d, "stub.map")
        open(c, "w").write("\n".join(code) + "\n")
        open(m, "w").write("\n".join(script) + "\n")
        args = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{soname}", "-o", out, c]
        subprocess.run(args + ([f"-Wl,--version-script={m}"] if script else []), check=True)


def main():
    program, directory, *names = sys.argv[1:]
    for soname, versions in wanted(program, names).items():
        build(soname, versions, os.path.join(directory, soname))


main()

#!/usr/bin/env python3
"""Judges an image by the real tools, on a copy: the image itself is never opened for writing. Root.

  qemu-img info, convert, check    the chroot's and, where there is one, the host's
  VirtualBox's image library       opened read-only and opened for writing, and read
  vbox-img convert, 7-Zip          base images
  VBoxManage                       showmediuminfo, clonemedium; chains are attached to a machine that is thrown away

Exit status 0 if every tool that has to understand the image opens it and, where --expect-sha or --spec is given, reads
exactly that; see MUST. QEMU and 7-Zip know only VDIs with blocks of 1 MiB and no parent. What qemu-img check says is
told, and decides with --strict.
"""
import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile

import fx
import gen

# name: (QEMU's name, VirtualBox's, 7-Zip's)
NAMES = {
    "VDI": ("vdi", "VDI", "VDI"),
    "VMDK": ("vmdk", "VMDK", "VMDK"),
    "VHD": ("vpc", "VHD", "VHD"),
    "VHDX": ("vhdx", "VHDX", "VHDX"),
    "Parallels": ("parallels", "Parallels", None),
    "QED": ("qed", "QED", None),
    "QCOW": ("qcow", "QCOW", "QCOW"),
    "QCOW2": ("qcow2", "QCOW", "QCOW"),
    "RAW": ("raw", "RAW", None),
    "DMG": ("dmg", "DMG", "Dmg"),
}
ALL = ("qemu", "vd_ro", "vd_rw", "vbox-img")
MUST = {
    "VDI": ALL,
    "VMDK": ALL,
    "VHD": ALL,
    "VHDX": ("qemu", "vd_ro"),
    "Parallels": ("qemu", "vd_ro"),
    "QED": ("qemu", "vd_ro"),
    "QCOW": ("qemu", "vd_ro"),
    "QCOW2": ("qemu",),
    "RAW": ("qemu",),
    "DMG": ("qemu",),
}
SHOWN = ("UUID", "Parent UUID", "State", "Type", "Format variant", "Capacity", "Size on disk", "Access Error")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("image")
    p.add_argument("--format", required=True, help=", ".join(NAMES))
    p.add_argument("--expect-sha", help="SHA-256 of the disk's content")
    p.add_argument("--expect-size", type=int, help="size of the disk in bytes")
    p.add_argument("--spec", help="specification of the content (gen.py); needs --expect-size")
    p.add_argument("--parent", action="append", default=[], help="base first; repeat for each")
    p.add_argument("--extra-file", action="append", default=[], help="belongs to the image: extents, data file")
    p.add_argument("--strict", action="store_true", help="qemu-img check must find nothing")
    p.add_argument("--quick", action="store_true", help="only the tools that decide")
    p.add_argument("--json", help="write the results here")
    p.add_argument("--keep", action="store_true", help="keep the copy")
    a = p.parse_args()
    names = {k.lower(): k for k in NAMES}
    if a.format.lower() not in names:
        p.error(f"unknown format {a.format}")
    if a.spec and a.expect_size is None:
        p.error("--spec needs --expect-size")
    a.format = names[a.format.lower()]
    return a


def vdi_block_size(path):
    with open(path, "rb") as f:
        header = f.read(0x17C)
    return struct.unpack_from("<I", header, 0x178)[0] if len(header) == 0x17C else 0


class Check:
    def __init__(self, a):
        self.a = a
        self.qemu, self.vbox, self.seven = NAMES[a.format]
        os.makedirs(fx.SCRATCH, exist_ok=True)
        self.dir = tempfile.mkdtemp(prefix="chk-", dir=fx.SCRATCH)
        self.out = self.dir + "/out.raw"
        self.files = [self.copied(p) for p in a.parent + [a.image]]
        for extra in a.extra_file:
            self.copied(extra)
        self.image = self.files[-1]
        self.chain = len(self.files) > 1
        self.sha = a.expect_sha
        if a.spec and not self.sha:
            with open(a.spec, encoding="utf-8") as f:
                self.sha = gen.Disk(a.expect_size, json.load(f)).sha()
        self.results = {}
        self.required = self.who_must()

    def copied(self, path):
        target = os.path.join(self.dir, os.path.basename(path))
        code, _, err = fx.run(["cp", "--sparse=always", path, target])
        if code:
            raise SystemExit(f"cannot copy: {err.strip()}")
        return target

    def record(self, tool, opened, sha=None, size=None, message=""):
        if not opened:
            verdict = "REJECTED"
        elif sha is None:
            verdict = "opens"
        elif self.sha:
            verdict = "CONTENT OK" if sha == self.sha else "CONTENT DIFFERS"
        else:
            verdict = "read"
        if None not in (self.a.expect_size, size) and size != self.a.expect_size:
            verdict += f" / SIZE {size}"
        self.results[tool] = {"verdict": verdict, "sha256": sha, "size": size, "message": message[-600:]}
        self.tell(tool, verdict, message)

    def tell(self, tool, verdict, message=""):
        print(f"{tool:20} {verdict:16} {fx.last(message, 400)}".rstrip())

    def taken(self):
        """Checksum and size of what a tool wrote to self.out, which is gone then."""
        if not os.path.exists(self.out):
            return None, None
        found = fx.file_sha(self.out), os.path.getsize(self.out)
        os.unlink(self.out)
        return found

    def one_mib_blocks(self):
        return self.a.format != "VDI" or vdi_block_size(self.image) == fx.MiB

    def who_must(self):
        """The tools that have to understand this image."""
        leave_out = set()
        if self.chain:
            leave_out.add("vbox-img")
        if not self.qemu_reads():
            leave_out.add("qemu")
        return [tool for tool in MUST[self.a.format] if tool not in leave_out]

    def qemu_reads(self):
        return self.one_mib_blocks() and not (self.chain and self.a.format in ("VDI", "VHD"))

    def ask_qemu(self, tool, wrap):
        code, out, err = fx.run(wrap(["qemu-img", "info", "--output=json", "-f", self.qemu, self.image]))
        if code:
            self.record(tool, False, message=err)
            return
        size = json.loads(out)["virtual-size"]
        convert = ["qemu-img", "convert", "-f", self.qemu, "-O", "raw", self.image, self.out]
        code, _, err = fx.run(wrap(convert), 600)
        self.record(tool, code == 0, self.taken()[0], size, err)
        code, out, err = fx.run(wrap(["qemu-img", "check", "-f", self.qemu, self.image]))
        self.results[tool].update(check=code, check_says=fx.last(out + err))
        self.tell(tool + " check", f"status {code}", out + err)

    def ask_library(self, tool, flags):
        """VirtualBox's library; the parents are always opened read-only."""
        before = [fx.file_sha(f) for f in self.files]
        ops = [["open", self.vbox, f, {"open": flags if f == self.image else 1}] for f in self.files]
        ops += [["info"], ["raw", self.out], ["closeall"]]
        code, out, err = fx.run(fx.in_chroot(["python3", fx.HERE + "/vdtool.py", json.dumps(ops)]))
        done = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
        failed = "; ".join(f"{op} {name}" for op, status, name, _ in done if status < 0)
        if code not in (0, 1):
            failed += f" ended with status {code} {err[-200:]}"
        info = next((result for op, _, _, result in done if op == "info"), None)
        sha, _ = self.taken()
        self.record(tool, not failed, sha, info[-1]["size"] if info else None, failed)
        changed = [os.path.basename(f) for f, sha in zip(self.files, before) if fx.file_sha(f) != sha]
        self.results[tool].update(info=info, files_changed=changed)
        if changed:
            print("    rewritten by this:", ", ".join(changed))

    def ask_vbox_img(self):
        code, out, err = fx.run(fx.in_chroot([
            "vbox-img", "convert", "--srcfilename", self.image, "--dstfilename", self.out,
            "--srcformat", self.vbox, "--dstformat", "RAW"]), 600)
        sha, size = self.taken()
        self.record("vbox-img", code == 0, sha, size, "" if code == 0 else out + err)

    def ask_manager(self):
        """Once more with a new registry if it refuses: its server, which comes and goes with the commands, was seen to
        forget parents on a busy machine. What is wrong with an image is wrong twice."""
        for attempt in ("1", "2"):
            self.manage_in(attempt)
            if "REJECTED" not in self.results["VBoxManage"]["verdict"] + self.results["VBoxManage clone"]["verdict"]:
                return

    def manage_in(self, attempt):
        home = f"{self.dir}/home{attempt}"
        env = {"VBOX_USER_HOME": home, "VBOX_IPC_SOCKETID": f"chk{os.getpid()}-{attempt}"}

        def manage(*command):
            code, out, err = fx.run(fx.in_chroot(["VBoxManage", *command], env), 120)
            return code, fx.clean(out + err)

        if self.chain:  # a registry forgets parents that no machine uses
            manage("createvm", "--name", "chk", "--register", "--basefolder", home)
            manage("storagectl", "chk", "--name", "s", "--add", "sata", "--portcount", "30")
            for port, f in enumerate(self.files):
                manage("storageattach", "chk", "--storagectl", "s", "--port", str(port), "--type", "hdd", "--medium", f)
        code, text = manage("showmediuminfo", "disk", self.image)
        good = code == 0 and "State:          inaccessible" not in text
        lines = [line for line in text.splitlines() if line.split(":")[0] in SHOWN or "error" in line]
        self.record("VBoxManage", good, message="\n".join(" ".join(line.split()) for line in lines))
        clone = ("clonemedium", "disk", self.image, self.out, "--format", "RAW", "--variant", "Fixed")
        code, text = manage(*clone)
        sha, size = self.taken()
        self.record("VBoxManage clone", code == 0, sha, size, text if code else "")

    def ask_seven_zip(self):
        command = fx.in_chroot(["7z", "x", "-so", "-t" + self.seven, self.image])
        code, out, err = fx.run(command, binary=True)
        sha, size = (hashlib.sha256(out).hexdigest(), len(out)) if code == 0 else (None, None)
        self.record("7-Zip", code == 0, sha, size, err if code else "")

    def ask_all(self):
        if self.qemu_reads():
            self.ask_qemu("qemu", fx.in_chroot)
            if shutil.which("qemu-img") and not self.a.quick:
                self.ask_qemu("qemu of host", list)
        self.ask_library("vd_ro", 1)
        self.ask_library("vd_rw", 0)
        if not self.chain:
            self.ask_vbox_img()
        if self.a.quick:
            return
        self.ask_manager()
        if self.seven and not self.chain and self.one_mib_blocks():
            self.ask_seven_zip()

    def passed(self):
        good = ("CONTENT OK",) if self.sha else ("read", "CONTENT OK")
        read_well = all(self.results[tool]["verdict"] in good for tool in self.required)
        checked = all(r.get("check", 0) == 0 for r in self.results.values())
        return read_well and (checked or not self.a.strict)


def main():
    a = arguments()
    c = Check(a)
    try:
        c.ask_all()
        passed = c.passed()
    finally:
        if not a.keep:
            shutil.rmtree(c.dir, ignore_errors=True)
    print("VERDICT", "PASS" if passed else "FAIL", "by", ", ".join(c.required))
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f:
            found = {"image": a.image, "format": a.format, "pass": passed, "required": c.required, "results": c.results}
            json.dump(found, f, indent=1)
    return 0 if passed else 1


if __name__ == "__main__":
    fx.enter_oracle()
    sys.exit(main())

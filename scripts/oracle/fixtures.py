"""All images of the fixtures, by the real binaries; fixtures.sh runs this.

good    vdimg convert to raw, parents found and, for chains, named as well; SHA-256 as in the manifest, or the runs of
        data where the disk is too large for one. Images that vdblk does not read (REFUSED) are refused in one line.
crash   a writer was killed: opened read-only, after a repair where the format has one (clean then), and after vdblk has
        had it for writing, each sector is as before or after what was being written
broken  vdimg info, vdimg convert, vdblk on a copy: refused by status 1 and one line, or whatever else the manifest
        expects, soon, without a panic, and without a change to a file. For VDI tests/fixtures/broken.json is stricter.

info looks at the header only, and may succeed. Prints a line for each image; exit status 1 if anything is not as it
should be.
"""
import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import content
import fx

SOON = 5.0  # seconds; a refusal takes milliseconds, but machines may be busy
# Encrypted, or with their data in another file, and the words that say so
REFUSED = {
    "qcow2-luks": "encrypt",
    "qcow2-aes": "encrypt",
    "qcow2-datafile": "another file",
    "luks-raw": "",
}
LATER = {"vdi-encrypted-xts128"}  # needs a password on the command line
TABLES = os.path.normpath(os.path.join(fx.HERE, "../../tests/fixtures"))


def load(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def data_pieces(path):
    """(offset, length) of what is not hole, in pieces of a MiB at most."""
    with open(path, "rb") as f:
        at, end = 0, os.fstat(f.fileno()).st_size
        while at < end:
            try:
                start = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(f.fileno(), start, os.SEEK_HOLE)
            for piece in range(start, at, fx.MiB):
                yield piece, min(fx.MiB, at - piece)


def has_runs(path, runs):
    """The runs have their checksums, and everything else is zero."""
    with open(path, "rb") as f:
        for offset, length, sha in runs:
            f.seek(offset)
            if hashlib.sha256(f.read(length)).hexdigest() != sha:
                return False
        for offset, length in data_pieces(path):
            f.seek(offset)
            data = bytearray(f.read(length))
            for start, size, _ in runs:
                lo, hi = max(start, offset), min(start + size, offset + length)
                if lo < hi:
                    data[lo - offset:hi - offset] = bytes(hi - lo)
            if any(data):
                return False
    return True


class Fixtures:
    def __init__(self, args, work):
        self.dir, self.work = args.dir, work
        self.formats = {f.upper() for f in args.format}
        self.vdimg, self.vdblk = args.bin + "/vdimg", args.bin + "/vdblk"
        self.bad = 0

    def path(self, name):
        return os.path.join(self.dir, name)

    def say(self, good, *cells):
        self.bad += not good
        print(*cells, "" if good else "  <== WRONG", flush=True)

    # ---- good ones

    def images(self):
        for image in load(self.path("manifest.json"))["images"]:
            if image["id"] not in LATER and self.wanted(image):
                yield image

    def wanted(self, image):
        return not self.formats or image["format"].upper() in self.formats

    def all_good(self):
        images = [i for i in self.images() if i["class"] == "good"]
        good = [i for i in images if i["id"] not in REFUSED]
        right = sum(self.one_good(image) for image in good)
        print(f"{right} of {len(good)} images are byte for byte as in the manifest\n")
        for image in images:
            if image["id"] in REFUSED:
                self.one_refused(image)

    def one_refused(self, image):
        command = [self.vdimg, "convert", "--output-format", "raw", self.path(image["file"]), self.work + "/out.raw"]
        outcome = Outcome(*self.run(command))
        good = outcome.sane() and outcome.refused(REFUSED[image["id"]])
        self.say(good, f"{image['id']:24} refused: {outcome.text}")

    def one_good(self, image):
        chain = [self.path(f) for f in image.get("chain") or [image["file"]]]
        before = [fx.file_sha(f) for f in chain]
        ways = {"": (chain[-1], [])}
        if len(chain) > 1:  # the set's folder has several images with one UUID
            ways["found"] = self.alone(chain), []
            ways["named"] = chain[-1], [word for p in chain[:-1] for word in ("--parent", p)]
            del ways[""]
            if image["format"] == "Parallels":  # names no parent
                del ways["found"]
        good = True
        for way, (path, options) in ways.items():
            said = self.converted(image, path, options)
            good = good and said.startswith("equal")
            self.say(said.startswith("equal"), f"{image['id']:24} {way:8} {said}")
        if [fx.file_sha(f) for f in chain] != before:
            self.say(False, f"{image['id']:24} file changed")
        return good

    def alone(self, chain):
        """A copy of the chain in a folder of its own, with the parts its images may have; holes stay holes."""
        folder = tempfile.mkdtemp(dir=self.work)
        for f in chain:
            stem = os.path.basename(f).rsplit(".", 1)[0]
            for name in sorted(os.listdir(self.dir)):
                if name == os.path.basename(f) or name.startswith((stem + "-f", stem + "-s", stem + "-x")):
                    subprocess.run(["cp", "--sparse=always", self.path(name), folder], check=True)
        return os.path.join(folder, os.path.basename(chain[-1]))

    def converted(self, image, path, options):
        out = self.work + "/out.raw"
        raw = ["--format", "raw"] if image["format"] == "RAW" else []
        start = time.monotonic()
        code, _, err = fx.run([self.vdimg, "convert", *raw, *options, "--output-format", "raw", path, out])
        seconds = time.monotonic() - start
        if code:
            return f"status {code}: {fx.last(err)}"
        try:
            if os.path.getsize(out) != image["virtual_size"]:
                return f"{os.path.getsize(out)} bytes instead of {image['virtual_size']}"
            found = self.equal(image, out)
        finally:
            os.unlink(out)
        return f"{found}, {seconds:.1f} s"

    def equal(self, image, out):
        if image.get("sha256"):
            return "equal" if fx.file_sha(out) == image["sha256"] else "DIFFERENT"
        return "equal runs" if has_runs(out, image["data_runs"]) else "DIFFERENT"

    # ---- crashed ones

    def all_crashed(self):
        images = [i for i in self.images() if i["class"] == "crash"]
        right = sum(self.one_crashed(image) for image in images)
        print(f"{right} of {len(images)} images of killed writers have each sector old or new\n")

    def one_crashed(self, image):
        old = content.Content(bytes(image["virtual_size"]))
        old.write(image["base_spec"])
        new = old.copy()
        new.write(image["new_writes"])
        path = self.alone([self.path(image["file"])])
        said = [self.sectors(path, image, old, new)]
        if self.writable(image["format"]):
            code, _, err = fx.run([self.vdimg, "repair", path])
            check, _, _ = fx.run([self.vdimg, "check", path])
            clean = code == 0 and check == 0
            said.append("repaired" if clean else f"repair {code} {fx.last(err)} check {check} DIFFERENT")
            said.append(self.sectors(path, image, old, new))
            served = self.alone([self.path(image["file"])])
            outcome = Outcome(*self.serve(os.path.dirname(served), ["--blk-file", served]))
            ended = outcome.sane() and outcome.code == 0
            said.append("served" if ended else f"serve {outcome.code} {outcome.text} DIFFERENT")
            said.append(self.sectors(served, image, old, new))
        good = not any("DIFFERENT" in s for s in said)
        self.say(good, f"{image['id']:24} {'; '.join(said)}")
        return good

    @staticmethod
    def writable(name):
        return name.upper() not in ("DMG", "RAW")

    def sectors(self, path, image, old, new):
        out = self.work + "/out.raw"
        code, _, err = fx.run([self.vdimg, "convert", "--output-format", "raw", path, out])
        if code:
            return f"DIFFERENT: status {code}: {fx.last(err)}"
        data = content.Content.of_file(out).data
        os.unlink(out)
        if len(data) != image["virtual_size"]:
            return f"DIFFERENT: {len(data)} bytes"
        fresh = wrong = 0
        for at in range(0, len(data), content.SECTOR):
            a, b, c = (bytes(d[at:at + content.SECTOR]) for d in (old.data, new.data, data))
            fresh += a != b and c == b
            wrong += c not in (a, b)
        return f"DIFFERENT: {wrong} sectors" if wrong else f"{fresh} sectors new"

    # ---- broken ones

    def all_broken(self):
        cases = [c for c in load(TABLES + "/broken.json") if not self.formats or "VDI" in self.formats]
        cases += [self.case(i) for i in load(self.path("manifest-broken.json"))["images"]
                  if self.wanted(i) and i["format"] != "VDI"]
        self.shas = {i["id"]: i.get("sha256") for i in self.images()}
        print(f"{'':24} {'expected':8} {'info':5} {'convert':8} {'vdblk':6} file")
        right = sum(self.one_broken(case, self.shas.get(case.get("opens_as"))) for case in cases)
        print(f"{right} of {len(cases)} broken images are treated as they should be\n")

    def one_broken(self, case, sha):
        """Alone in a folder, so that parents cannot be found elsewhere."""
        folder = tempfile.mkdtemp(dir=self.work)
        files = [shutil.copy(self.path("broken/" + f), folder) for f in case["files"]]
        before = [fx.file_sha(f) for f in files]
        refuse = "refused_with" in case or case.get("chain") == "refuse"
        either = case.get("either")
        named = [word for p in files[:-1] for word in ("--parent", p)]
        info = Outcome(*self.run([self.vdimg, "info", files[-1]]))
        convert = [self.vdimg, "convert", *named, "--output-format", "raw", files[-1], folder + "/out"]
        convert = Outcome(*self.run(convert))
        serve = Outcome(*self.serve(folder, [*named, "--blk-file", files[-1]]))
        outcomes = (info, convert, serve)
        unchanged = [fx.file_sha(f) for f in files] == before
        good = unchanged and all(o.sane() for o in outcomes)
        if either:
            fails = case["either"] == "must fail"
            good = good and (convert.code == 1 or not fails)
            if convert.code == 0 and case.get("content"):
                good = good and fx.file_sha(folder + "/out") == self.shas[case["content"]]
        elif refuse:
            good = good and all(o.refused(case.get("refused_with", "")) for o in (convert, serve))
        else:
            good = good and convert.code == 0 and serve.code == 0
            good = good and sha in (None, fx.file_sha(folder + "/out") if convert.code == 0 else "")
        left = [f for f in os.listdir(folder) if refuse and f not in case["files"]]
        if left:
            good = False
        codes = f"{info.code:<5} {convert.code:<8} {serve.code:<6} {'same' if unchanged else 'CHANGED'}"
        said = serve.text or convert.text or info.text
        said = said.replace(folder + "/", "").replace("\n", " | ")
        self.say(good, f"{case['id']:24} {'either' if either else 'refuse' if refuse else 'open':8} {codes} {said} {' '.join(left)}")
        shutil.rmtree(folder)
        return good

    @staticmethod
    def case(image):
        """What the manifest expects, in the words of broken.json."""
        expected, case = image["expected"], {"id": image["id"]}
        case["files"] = [os.path.basename(f) for f in image["files"]]
        origin = (image.get("from") or "").rsplit(".", 1)[0]
        if expected.startswith("reject") and "-or-" not in expected:
            case["refused_with"] = ""
        elif expected == "recoverable":
            case["opens_as"] = origin
        elif expected in ("read-error", "reject-or-read-error"):
            case["either"] = "must fail"
        elif expected.startswith("open"):
            case.update(either="opens", content=origin)
        else:
            case["either"] = "sane"
        return case

    @staticmethod
    def run(command):
        start = time.monotonic()
        code, _, err = fx.run(command, 60)
        return code, err, time.monotonic() - start

    def serve(self, folder, options):
        """A server that comes up is ended by SIGTERM."""
        socket, start = folder + "/s", time.monotonic()
        command = [self.vdblk, "--socket-path", socket, "--log-level", "warn", *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as server:
            while server.poll() is None and not os.path.exists(socket) and time.monotonic() < start + 60:
                time.sleep(0.005)
            came_up = server.poll() is None
            if came_up:
                server.send_signal(signal.SIGTERM)
            _, err = server.communicate(timeout=60)
        return (server.returncode if came_up or server.returncode else -1), err, time.monotonic() - start


class Outcome:
    """What a program made of an image."""

    def __init__(self, code, err, seconds):
        self.code, self.text, self.seconds = code, err.strip(), seconds

    def sane(self):
        """No panic, no signal, and one line if it fails."""
        lines = len(self.text.splitlines())
        one_line = lines == 1 if self.code else lines <= 1
        return self.code in (0, 1) and "panicked" not in self.text and one_line and self.seconds < SOON

    def refused(self, words):
        return self.code == 1 and words in self.text


def main():
    default = os.path.normpath(os.path.join(fx.HERE, "../../target/release"))
    p = argparse.ArgumentParser(
        prog="fixtures.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dir", help="the unpacked set, with manifest.json and broken/")
    p.add_argument("--format", action="append", default=[], help="only this format; may be repeated")
    p.add_argument("--bin", default=default, help="folder with vdblk and vdimg")
    args = p.parse_args()
    work = tempfile.mkdtemp(prefix="vdfx.")
    try:
        fixtures = Fixtures(args, work)
        fixtures.all_good()
        fixtures.all_crashed()
        fixtures.all_broken()
    finally:
        shutil.rmtree(work)
    print("all right" if not fixtures.bad else f"{fixtures.bad} WRONG")
    return 1 if fixtures.bad else 0


if __name__ == "__main__":
    sys.exit(main())

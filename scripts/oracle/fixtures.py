"""All raw and VDI images of the fixtures, by the real binaries; fixtures.sh runs this.

good    vdimg convert to raw, parents found by UUID and, for chains, named as well; SHA-256 as in the manifest, or the
        runs of data where the disk is too large for one
broken  vdimg info, vdimg convert, vdblk on a copy: refused where tests/fixtures/broken.json says so, by status 1 and
        one line that has the expected words, soon, without a panic, and without a change to a file

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

import fx

SOON = 5.0  # seconds; a refusal takes milliseconds, but machines may be busy
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
            if image["format"] in ("VDI", "RAW") and "password" not in image:
                yield image

    def all_good(self):
        images = list(self.images())
        right = sum(self.one_good(image) for image in images)
        print(f"{right} of {len(images)} images are byte for byte as in the manifest\n")

    def one_good(self, image):
        chain = [self.path(f) for f in image.get("chain") or [image["file"]]]
        before = [fx.file_sha(f) for f in chain]
        ways = {"": (chain[-1], [])}
        if len(chain) > 1:  # the set's folder has several images with one UUID
            ways["by UUID"] = self.alone(chain), []
            ways["named"] = chain[-1], [word for p in chain[:-1] for word in ("--parent", p)]
            del ways[""]
        good = True
        for way, (path, options) in ways.items():
            said = self.converted(image, path, options)
            good = good and said.startswith("equal")
            self.say(said.startswith("equal"), f"{image['id']:24} {way:8} {said}")
        if [fx.file_sha(f) for f in chain] != before:
            self.say(False, f"{image['id']:24} file changed")
        return good

    def alone(self, chain):
        """A copy of the chain in a folder of its own."""
        folder = tempfile.mkdtemp(dir=self.work)
        return [shutil.copy(f, folder) for f in chain][-1]

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
        sha = image.get("sha256") or self.sha_of_crashed(image)
        if sha:
            return "equal" if fx.file_sha(out) == sha else "DIFFERENT"
        return "equal runs" if has_runs(out, image["data_runs"]) else "DIFFERENT"

    @staticmethod
    def sha_of_crashed(image):
        """A crashed image reads as QEMU reads it."""
        return image.get("tools", {}).get("qemu-sid", {}).get("convert_readonly", {}).get("sha256")

    # ---- broken ones

    def all_broken(self):
        cases = load(TABLES + "/broken.json")
        shas = {i["id"]: i.get("sha256") for i in self.images()}
        print(f"{'':24} {'expected':8} {'info':5} {'convert':8} {'vdblk':6} file")
        right = sum(self.one_broken(case, shas.get(case.get("opens_as"))) for case in cases)
        print(f"{right} of {len(cases)} broken images are treated as they should be\n")

    def one_broken(self, case, sha):
        """Alone in a folder, so that parents cannot be found elsewhere."""
        folder = tempfile.mkdtemp(dir=self.work)
        files = [shutil.copy(self.path("broken/" + f), folder) for f in case["files"]]
        before = [fx.file_sha(f) for f in files]
        refuse = "refused_with" in case or case.get("chain") == "refuse"
        named = [word for p in files[:-1] for word in ("--parent", p)]
        info = Outcome(*self.run([self.vdimg, "info", files[-1]]))
        convert = [self.vdimg, "convert", *named, "--output-format", "raw", files[-1], folder + "/out"]
        convert = Outcome(*self.run(convert))
        serve = Outcome(*self.serve(folder, [*named, "--blk-file", files[-1]]))
        outcomes = (info, convert, serve)
        unchanged = [fx.file_sha(f) for f in files] == before
        good = unchanged and all(o.sane() for o in outcomes)
        if refuse:
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
        self.say(good, f"{case['id']:24} {'refuse' if refuse else 'open':8} {codes} {said} {' '.join(left)}")
        shutil.rmtree(folder)
        return good

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
    p.add_argument("--bin", default=default, help="folder with vdblk and vdimg")
    args = p.parse_args()
    work = tempfile.mkdtemp(prefix="vdfx.")
    try:
        fixtures = Fixtures(args, work)
        fixtures.all_good()
        fixtures.all_broken()
    finally:
        shutil.rmtree(work)
    print("all right" if not fixtures.bad else f"{fixtures.bad} WRONG")
    return 1 if fixtures.bad else 0


if __name__ == "__main__":
    sys.exit(main())

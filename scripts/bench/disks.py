"""The files that are measured, made once per folder."""
import os
import subprocess

import peers

GIB = 1 << 30
LAYERS = 8


def run(*command, text=None):
    subprocess.run([str(c) for c in command], input=text, text=True, check=True, stdout=subprocess.DEVNULL)


class Disks:
    """Files of one folder. Each is made when it is first asked for."""

    def __init__(self, folder, size=GIB):
        self.folder, self.size = folder, size

    def path(self, name):
        return os.path.join(self.folder, name)

    def raw(self):
        """Random bytes: nothing compresses, nothing is a hole."""
        path = self.path("full.raw")
        if not os.path.exists(path):
            with open(path + ".part", "wb") as f:
                for _ in range(self.size >> 20):
                    f.write(os.urandom(1 << 20))
                os.fsync(f.fileno())
            os.rename(path + ".part", path)
        return path

    def full(self, fmt):
        """The same bytes in another format."""
        if fmt == "raw":
            return self.raw()
        path = self.path(f"full.{fmt}")
        if not os.path.exists(path):
            run(peers.VDIMG, "convert", "--output-format", fmt, self.raw(), path)
        return path

    def layers(self, fmt):
        """The files of the chain."""
        self.chain(fmt)
        return [self.path(f"chain{n}.{fmt}") for n in range(LAYERS)]

    def chain(self, fmt):
        """Eight layers; each has every eighth MiB, the base the first. Returns the leaf."""
        leaf = self.path(f"chain{LAYERS - 1}.{fmt}")
        if os.path.exists(leaf):
            return leaf
        below = []
        for layer in range(LAYERS):
            path = self.path(f"chain{layer}.{fmt}")
            parents = [a for p in below for a in ("--parent", p)]
            size = [] if below else ["--size", str(self.size)]
            run(peers.VDIMG, "create", "--format", fmt, *size, *parents, path)
            own = range(layer, self.size >> 20, LAYERS)
            writes = "".join(f"write -P {layer + 1} {mib << 20} 1M\n" for mib in own)
            run(peers.VDIMG, "io", path, text=writes)
            below.append(path)
        return leaf

    def empty(self, fmt, name, size=None):
        """A new image without an allocated block."""
        path = self.path(f"{name}.{fmt}")
        if os.path.exists(path):
            os.unlink(path)
        run(peers.VDIMG, "create", "--format", fmt, "--size", str(size or 4 * self.size), path)
        return path

    def half(self, fmt="raw"):
        """4 GiB, every second MiB full of random bytes, the rest a hole."""
        if fmt != "raw":
            path = self.path(f"half.{fmt}")
            if not os.path.exists(path):
                run(peers.VDIMG, "convert", "--output-format", fmt, self.half(), path)
            return path
        path = self.path("half.raw")
        if not os.path.exists(path):
            with open(path + ".part", "wb") as f:
                f.truncate(4 * GIB)
                for mib in range(0, 4096, 2):
                    f.seek(mib << 20)
                    f.write(os.urandom(1 << 20))
            os.rename(path + ".part", path)
        return path

    def pair(self, fmt):
        """A base of random bytes and a diff with the first half of them anew, to be copied before they are merged."""
        base, diff = self.path(f"pair-base.{fmt}"), self.path(f"pair-diff.{fmt}")
        if not os.path.exists(diff):
            run(peers.VDIMG, "convert", "--output-format", fmt, self.raw(), base)
            run(peers.VDIMG, "create", "--format", fmt, "--parent", base, diff)
            mibs = range(0, self.size >> 21, 16)
            run(peers.VDIMG, "io", diff, text="".join(f"write -P {mib // 16 % 255 + 1} {mib}M 16M\n" for mib in mibs))
        return base, diff

    def warm(self, *paths):
        """Everything in the page cache."""
        for path in paths:
            with open(path, "rb", buffering=0) as f:
                while f.read(1 << 22):
                    pass

    def warm_by_pages(self, path):
        """The same a page at a time, as a guest's own small requests leave it: what was read ahead lies in large folios, of which a small
        write touches all of the state."""
        with open(path, "rb", buffering=0) as f:
            os.sync()
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            while f.read(4096):
                pass

    def give_memory(self, bytes_to_come):
        """Writes a file that large and takes it away again: a virtual machine may get its memory from the host only at the first touch (and lose
        it when it has been free for seconds), and whoever fills the page cache next would pay for that."""
        path = self.path("touch")
        with open(path, "wb", buffering=0) as f:
            # pieces as large as those to come: the page cache takes a folio for each
            for _ in range(bytes_to_come * 9 // 8 >> 20):
                f.write(bytes(1 << 20))
        os.unlink(path)

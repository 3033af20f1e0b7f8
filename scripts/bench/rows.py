"""The rows of the table: what is run, what is compared, and what is aimed at."""
import dataclasses
import os
from typing import Callable, Optional

import peers
from disks import GIB, LAYERS


@dataclasses.dataclass
class Contender:
    """One side of a row. `run` gives a dict with the row's metrics, or None where it cannot take part."""

    name: str
    run: Callable[[], Optional[dict]]


@dataclasses.dataclass
class Goal:
    """`metric` of vdblk against that of `against`: a ratio that is to be at most, or at least, `bound`; an absolute one if `against` is None."""

    metric: str
    against: Optional[str]
    bound: float
    at_most: bool


@dataclasses.dataclass
class Row:
    key: str
    title: str
    # makes the files it needs, so it is called only when the row is run
    contenders: Callable[[], list]
    goals: list


class Load:
    """A load of vubench on servers."""

    def __init__(self, bench, **options):
        self.bench, self.options = bench, options

    def on(self, name, command, warm=(), before=None):
        """`command`: of the server; None: it is not there. `warm`: files to have in the page cache. `before` makes the file anew."""

        def run():
            if command is None:
                return None
            if before:
                before()
            if warm:
                self.bench.disks.warm(*warm)
            return self.bench.vubench(name, command, **self.options)

        return Contender(name, run)


def read_rows(bench):
    for fmt in ("raw", "vdi", "vmdk", "vhd", "qcow2"):

        def sides(fmt=fmt):
            file, driver = bench.disks.full(fmt), {"vhd": "vpc"}.get(fmt, fmt)
            load = Load(bench, rw="randread", bs="4k", iodepth=32)
            return [load.on("vdblk", peers.vdblk(file), [file]), load.on("qsd", peers.qsd(file, driver), [file])]

        goals = []
        if fmt in ("raw", "vdi"):
            goals = [Goal("srv_us_io", "qsd", 0.45, True), Goal("iops", "qsd", 1.9, False)]
        yield Row(f"read-{fmt}", f"cached 4 KiB reads, depth 32, {fmt}", sides, goals)


def write_rows(bench):
    for fmt in ("raw", "vdi"):

        def sides(fmt=fmt):
            file, load = bench.disks.full(fmt), Load(bench, rw="randwrite", bs="4k", iodepth=32)
            pages = lambda: bench.disks.warm_by_pages(file)
            ours = load.on("vdblk", peers.vdblk(file), before=pages)
            return [ours, load.on("qsd", peers.qsd(file, fmt), before=pages)]

        title = f"cached 4 KiB writes to allocated blocks, depth 32, {fmt}"
        yield Row(f"write-{fmt}", title, sides, [Goal("srv_us_io", "qsd", 0.5, True)])


def depth_1_rows(bench):
    for key, title, more, bound in (
        ("depth1-poll", "depth 1, polling, median latency", ["--poll-us 50"], 0.2),
        ("depth1", "depth 1, no polling, median latency", [], 0.7),
    ):

        def sides(more=more):
            file, load = bench.disks.full("raw"), Load(bench, rw="randread", bs="4k", iodepth=1)
            ours = load.on("vdblk", peers.vdblk(file, more=more), [file])
            return [ours, load.on("qsd", peers.qsd(file, "raw"), [file])]

        yield Row(key, title, sides, [Goal("p50", "qsd", bound, True)])


def direct_rows(bench):
    def both(**options):
        file, load = bench.disks.full("raw"), Load(bench, **options)
        ours = load.on("vdblk", peers.vdblk(file, cache="none"))
        return file, [ours, load.on("qsd", peers.qsd(file, "raw", cache="none"))]

    def small():
        file, sides = both(rw="randread", bs="4k", iodepth=32)
        return sides + [Contender("floor", lambda: bench.floor(file))]

    def large():
        file, sides = both(rw="read", bs="128k", iodepth=16)
        return sides + [Contender("fio", lambda: bench.fio(file, "read", "128k", 16))]

    goals = [Goal("iops", "floor", 0.95, False), Goal("srv_us_io", "qsd", 0.6, True)]
    yield Row("direct", "O_DIRECT 4 KiB reads, depth 32", small, goals)
    yield Row("direct-seq", "O_DIRECT 128 KiB sequential reads", large, [Goal("mb_s", "fio", 0.95, False)])


def chain_rows(bench):
    def sides():
        one, eight = bench.disks.full("vdi"), bench.disks.chain("vdi")
        load = Load(bench, rw="randread", bs="4k", iodepth=32)
        return [
            load.on("vdblk", peers.vdblk(eight), bench.disks.layers("vdi")),
            load.on("vdblk-1", peers.vdblk(one), [one]),
            load.on("qsd-qcow2", peers.qsd(bench.disks.chain("qcow2"), "qcow2"), bench.disks.layers("qcow2")),
        ]

    goals = [Goal("srv_us_io", "vdblk-1", 1.05, True), Goal("srv_us_io", "qsd-qcow2", 0.25, True)]
    yield Row("chain", f"chain of {LAYERS}, data in all layers, cached 4 KiB reads", sides, goals)


def first_write_rows(bench):
    for key, title, options, gib in (
        ("first-random", "first writes into an empty VDI, 4 KiB random", {"rw": "randwrite", "bs": "4k"}, 4),
        ("first-seq", "first writes into an empty VDI, 64 KiB sequential", {"rw": "write", "bs": "64k", "once": True}, 0.5),
    ):

        def sides(options=options, size=int(gib * GIB)):
            load, path = Load(bench, iodepth=32, **options), bench.disks.path("empty.vdi")

            def anew():
                bench.disks.empty("vdi", "empty", size)
                bench.disks.give_memory(GIB // 2)

            ours = load.on("vdblk", peers.vdblk(path), before=anew)
            return [ours, load.on("qsd", peers.qsd(path, "vdi"), before=anew)]

        yield Row(key, title, sides, [Goal("iops", "qsd", 1.5, False)])


def queue_rows(bench):
    def sides():
        file = bench.disks.full("raw")
        on = lambda n, name: Load(bench, rw="randread", bs="4k", iodepth=16, queues=n).on(
            name, peers.vdblk(file, queues=n), [file]
        )
        return [on(2, "vdblk"), on(1, "vdblk-1-queue")]

    yield Row("queues", "2 queues against 1", sides, [Goal("iops", "vdblk-1-queue", 1.0, False)])


def convert_rows(bench):
    for key, title, fmt, to, cache in (
        ("convert-vdi", "convert raw to VDI, not synced", "raw", "vdi", "unsafe"),
        ("convert-raw", "convert VDI to raw, not synced", "vdi", "raw", "unsafe"),
        ("convert-vdi-sync", "convert raw to VDI, durable", "raw", "vdi", "writeback"),
        ("convert-raw-sync", "convert VDI to raw, durable", "vdi", "raw", "writeback"),
    ):

        def sides(fmt=fmt, to=to, cache=cache):
            file, target = bench.disks.half(fmt), bench.disks.path(f"converted.{to}")
            commands = {
                "vdblk": [peers.VDIMG, "convert", "-t", cache, file, target],
            }
            if qemu_img := peers.foreign("qemu-img"):
                commands["qemu-img"] = qemu_img + ["convert", "-t", cache, "-f", fmt, "-O", to, file, target]
            if vbox_img := peers.vbox_img(bench.disks.folder):
                names = ["--srcfilename", file, "--dstfilename", target]
                formats = ["--srcformat", fmt.upper(), "--dstformat", to.upper()]
                commands["vbox-img"] = vbox_img + ["convert", *names, *formats]
            return [Contender(name, bench.timed(c, target, file)) for name, c in commands.items()]

        goals = [Goal("seconds", "qemu-img", 1 / 1.3, True), Goal("seconds", "vbox-img", 0.1, True)]
        yield Row(key, title + ", 4 GiB half empty, cached", sides, goals)


def merge_rows(bench):
    for fmt in ("vdi", "qcow2"):

        def sides(fmt=fmt):
            folder = bench.disks.path("merged")
            names = [os.path.join(folder, os.path.basename(name)) for name in bench.disks.pair(fmt)]
            commands = {"vdblk": [peers.VDIMG, "merge", names[1]]}
            if fmt == "qcow2" and (qemu_img := peers.foreign("qemu-img")):
                commands["qemu-img"] = qemu_img + ["commit", "-t", "writeback", names[1]]
            if fmt == "vdi" and (vbox := peers.vbox_merge(bench.disks.folder, fmt, *names)):
                commands["virtualbox"] = vbox
            return [Contender(name, bench.merged(c, fmt, names)) for name, c in commands.items()]

        peer, bound = ("qemu-img", 1 / 1.3) if fmt == "qcow2" else ("virtualbox", 0.1)
        title = f"merge a {fmt} diff of 512 MiB into its base of 1 GiB, durable, cached"
        yield Row(f"merge-{fmt}", title, sides, [Goal("seconds", peer, bound, True)])


def start_rows(bench):
    def sides():
        file = bench.disks.empty("vdi", "huge", 2 << 40)
        return [Contender("vdblk", lambda: bench.first_read(peers.vdblk(file)))]

    goals = [Goal("ms", None, 20, True), Goal("rss_mb", None, 40, True)]
    yield Row("start", "2 TiB VDI: start to the first read served, memory", sides, goals)


GROUPS = [
    read_rows, write_rows, depth_1_rows, direct_rows, chain_rows, first_write_rows, queue_rows, convert_rows, merge_rows,
    start_rows,
]

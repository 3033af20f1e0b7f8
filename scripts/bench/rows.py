"""The rows of the table: what is run, what is compared, and what is aimed at."""
import dataclasses
import os
import subprocess
import time
from typing import Callable, Optional

import peers
from disks import LAYERS


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
    contenders: list
    goals: list


class Load:
    """A load of vubench on servers."""

    def __init__(self, bench, **options):
        self.bench, self.options = bench, options

    def on(self, name, command, warm=None, before=None):
        """`command`: of the server; None: it is not there. `before` makes the file anew."""

        def run():
            if command is None:
                return None
            if before:
                before()
            if warm:
                self.bench.disks.warm(warm)
            return self.bench.vubench(name, command, **self.options)

        return Contender(name, run)


def cached_reads(bench):
    for fmt in ("raw", "vdi", "vmdk", "vhd", "qcow2"):
        file = bench.disks.full(fmt)
        driver = {"vhd": "vpc"}.get(fmt, fmt)
        load = Load(bench, rw="randread", bs="4k", iodepth=32)
        goals = []
        if fmt in ("raw", "vdi"):
            goals = [Goal("srv_us_io", "qsd", 0.45, True), Goal("iops", "qsd", 1.9, False)]
        yield Row(
            f"read-{fmt}",
            f"cached 4 KiB reads, depth 32, {fmt}",
            [load.on("vdblk", peers.vdblk(file), file), load.on("qsd", peers.qsd(file, driver), file)],
            goals,
        )


def cached_writes(bench):
    for fmt in ("raw", "vdi"):
        file = bench.disks.full(fmt)
        load = Load(bench, rw="randwrite", bs="4k", iodepth=32)
        yield Row(
            f"write-{fmt}",
            f"cached 4 KiB writes to allocated blocks, depth 32, {fmt}",
            [load.on("vdblk", peers.vdblk(file), file), load.on("qsd", peers.qsd(file, fmt), file)],
            [Goal("srv_us_io", "qsd", 0.5, True)],
        )


def one_at_a_time(bench):
    file = bench.disks.full("raw")
    load = Load(bench, rw="randread", bs="4k", iodepth=1)
    sides = [
        load.on("vdblk", peers.vdblk(file, more=["--poll-us 50"]), file),
        load.on("qsd", peers.qsd(file, "raw"), file),
    ]
    yield Row("depth1-poll", "depth 1, polling, median latency", sides, [Goal("p50", "qsd", 0.2, True)])
    sides = [load.on("vdblk", peers.vdblk(file), file), load.on("qsd", peers.qsd(file, "raw"), file)]
    yield Row("depth1", "depth 1, no polling, median latency", sides, [Goal("p50", "qsd", 0.7, True)])


def direct(bench):
    file = bench.disks.full("raw")
    load = Load(bench, rw="randread", bs="4k", iodepth=32)
    sides = [
        load.on("vdblk", peers.vdblk(file, cache="none")),
        load.on("qsd", peers.qsd(file, "raw", cache="none")),
        Contender("floor", lambda: bench.floor(file)),
    ]
    goals = [Goal("iops", "floor", 0.95, False), Goal("srv_us_io", "qsd", 0.6, True)]
    yield Row("direct", "O_DIRECT 4 KiB reads, depth 32", sides, goals)
    load = Load(bench, rw="read", bs="128k", iodepth=16)
    sides = [
        load.on("vdblk", peers.vdblk(file, cache="none")),
        load.on("qsd", peers.qsd(file, "raw", cache="none")),
        Contender("fio", lambda: bench.fio(file, "read", "128k", 16)),
    ]
    yield Row("direct-seq", "O_DIRECT 128 KiB sequential reads", sides, [Goal("mb_s", "fio", 0.95, False)])


def chains(bench):
    one, eight = bench.disks.full("vdi"), bench.disks.chain("vdi")
    load = Load(bench, rw="randread", bs="4k", iodepth=32)
    sides = [
        load.on("vdblk", peers.vdblk(eight), eight),
        load.on("vdblk-1", peers.vdblk(one), one),
        load.on("qsd-qcow2", peers.qsd(bench.disks.chain("qcow2"), "qcow2")),
    ]
    goals = [Goal("srv_us_io", "vdblk-1", 1.05, True), Goal("srv_us_io", "qsd-qcow2", 0.25, True)]
    yield Row("chain", f"chain of {LAYERS}, data in all layers, cached 4 KiB reads", sides, goals)


def first_writes(bench):
    for key, title, options in (
        ("first-random", "first writes into an empty VDI, 4 KiB random", {"rw": "randwrite", "bs": "4k"}),
        ("first-seq", "first writes into an empty VDI, 64 KiB sequential", {"rw": "write", "bs": "64k"}),
    ):
        load = Load(bench, iodepth=32, **options)
        path = bench.disks.path("empty.vdi")

        def anew():
            bench.disks.empty("vdi", "empty")

        sides = [
            load.on("vdblk", peers.vdblk(path), before=anew),
            load.on("qsd", peers.qsd(path, "vdi"), before=anew),
        ]
        yield Row(key, title, sides, [Goal("iops", "qsd", 1.5, False)])


def two_queues(bench):
    file = bench.disks.full("raw")
    sides = []
    for queues in (1, 2):
        load = Load(bench, rw="randread", bs="4k", iodepth=16, queues=queues)
        name = "vdblk" if queues == 2 else "vdblk-1-queue"
        sides.append(load.on(name, peers.vdblk(file, queues=queues), file))
    yield Row("queues", "2 queues against 1", sides, [Goal("iops", "vdblk-1-queue", 1.0, False)])


def convert(bench):
    source = bench.disks.half()
    as_vdi = bench.disks.path("half.vdi")
    if not os.path.exists(as_vdi):
        subprocess.run([peers.VDIMG, "convert", source, as_vdi], check=True, stdout=subprocess.DEVNULL)
    qemu_img, vbox_img = peers.foreign("qemu-img"), peers.vbox_img()
    for key, title, file, fmt, to in (
        ("convert-vdi", "convert raw to VDI", source, "raw", "vdi"),
        ("convert-raw", "convert VDI to raw", as_vdi, "vdi", "raw"),
    ):
        target = bench.disks.path(f"converted.{to}")
        sides = [Contender("vdblk", bench.timed([peers.VDIMG, "convert", file, target], target, file))]
        if qemu_img:
            command = qemu_img + ["convert", "-f", fmt, "-O", to, file, target]
            sides.append(Contender("qemu-img", bench.timed(command, target, file)))
        if vbox_img:
            command = vbox_img + ["convert", "--srcfilename", file, "--dstfilename", target]
            command += ["--srcformat", fmt.upper(), "--dstformat", to.upper()]
            sides.append(Contender("vbox-img", bench.timed(command, target, file)))
        goals = [Goal("seconds", "qemu-img", 1 / 1.3, True), Goal("seconds", "vbox-img", 0.1, True)]
        yield Row(key, title + ", 4 GiB half empty, cached", sides, goals)


def start(bench):
    file = bench.disks.empty("vdi", "huge", 2 << 40)

    def run():
        return bench.first_read(peers.vdblk(file))

    goals = [Goal("ms", None, 20, True), Goal("rss_mb", None, 40, True)]
    yield Row("start", "2 TiB VDI: start to the first read served, memory", [Contender("vdblk", run)], goals)


GROUPS = [
    cached_reads, cached_writes, one_at_a_time, direct, chains, first_writes, two_queues, convert, start,
]

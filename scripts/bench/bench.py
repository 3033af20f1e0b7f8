"""Runs the rows; bench.sh starts this."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from statistics import median

import disks
import machine
import peers
import report
import rows

FOREIGN = 0.05  # of one CPU: what others may use during a run
TRIES = 4


class Bench:
    """One measurement each, as a dict of figures."""

    def __init__(self, folder, seconds):
        self.disks, self.seconds = disks.Disks(folder), seconds
        self.socket = os.path.join(tempfile.mkdtemp(prefix="vub."), "s")

    def vubench(self, name, server, rw, bs, iodepth, queues=1, once=False):
        command = [peers.VUBENCH, "--socket", self.socket, "--server-cmd", server, "--inflight", "--rw", rw, "--bs", bs]
        command += ["--iodepth", str(iodepth), "--queues", str(queues), "--vring", "512", "--tag", name]
        command += ["--once", "--ramp", "0"] if once else ["--runtime", str(self.seconds)]
        command += ["--poll"] if iodepth == 1 else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        line = next((l for l in done.stdout.splitlines() if l.startswith("{")), None)
        if done.returncode or not line:
            raise RuntimeError(f"{name}: {done.stdout}{done.stderr}")
        d = json.loads(line)
        return {**d, "p50": d["lat_us"]["p50"], "foreign": d["other_cpu_s"] / max(d.get("secs", self.seconds), 0.1)}

    def floor(self, file):
        command = [peers.FLOOR, file, "--seconds", str(self.seconds), "--bs", "4096", "--direct", "--read-only"]
        command += ["--json", "--only", "io_uring qd32"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        d = json.loads(out)
        return {"iops": d["iops"], "srv_us_io": d["cpu_us"], "foreign": 0.0}

    def fio(self, file, rw, bs, depth):
        command = ["fio", "--name=b", f"--filename={file}", f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", "--direct=1"]
        command += ["--ioengine=io_uring", "--readonly", "--time_based", f"--runtime={self.seconds}", "--output-format=json"]
        try:
            out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        except OSError:
            return None
        job = json.loads(out[out.index("{"):])["jobs"][0]["read"]
        return {"iops": job["iops"], "mb_s": job["bw_bytes"] / 1e6, "foreign": 0.0}

    def timed(self, command, target, source):
        def run():
            if os.path.exists(target):
                os.unlink(target)
            self.disks.warm(source)
            self.disks.give_memory(2 * disks.GIB)
            begun = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.monotonic() - begun
            os.unlink(target)
            return {"seconds": seconds, "foreign": 0.0}

        return run

    def merged(self, command, fmt, names):
        """Copies of the pair called `names`, merged by `command`."""

        def run():
            pair = self.disks.pair(fmt)
            folder = os.path.dirname(names[0])
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder)
            # the names of the originals: a QCOW2 calls its parent by name
            for original, name in zip(pair, names):
                shutil.copy(original, name)
            os.sync()
            self.disks.warm(*names)
            self.disks.give_memory(disks.GIB // 2)
            begun = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.monotonic() - begun
            shutil.rmtree(folder)
            return {"seconds": seconds, "foreign": 0.0}

        return run

    def first_read(self, server):
        """From starting the server until one read has been answered, and the memory it then has."""
        command = [peers.VUBENCH, "--socket", self.socket, "--server-cmd", server, "--rw", "randread", "--bs", "4k"]
        command += ["--iodepth", "1", "--runtime", "0.05", "--ramp", "0"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        d = json.loads(next(l for l in out.splitlines() if l.startswith("{")))
        return {"ms": d["ready_ms"] + d["lat_us"]["max"] / 1000, "rss_mb": d["srv_rss_kb"] / 1000, "foreign": 0.0}


def quiet_run(contender):
    """One run that others have not disturbed, or the last try."""
    for _ in range(TRIES):
        machine.wait_for_quiet(2 * FOREIGN)
        got = contender.run()
        if got is None or got["foreign"] <= FOREIGN:
            break
        print(f"  {contender.name}: {got['foreign']:.2f} CPUs in use by others, again", file=sys.stderr)
    return got


def measure(row, rounds):
    """All runs of a row, in alternating order."""
    contenders = row.contenders()
    runs = {c.name: [] for c in contenders}
    for n in range(rounds):
        for c in contenders if n % 2 == 0 else contenders[::-1]:
            try:
                got = quiet_run(c)
            except (subprocess.SubprocessError, OSError, RuntimeError) as e:
                if c.name == "vdblk":
                    raise
                print(f"  {c.name} cannot take part: {e}", file=sys.stderr)
                got = None
            if got is not None:
                runs[c.name].append(got)
    return {name: r for name, r in runs.items() if r}


def judge(row, runs):
    """Each goal with what was measured."""
    out = []
    for g in row.goals:
        ours = [r[g.metric] for r in runs["vdblk"]]
        if g.against is None:
            value = median(ours)
        elif g.against in runs:
            value = median(ours) / median(r[g.metric] for r in runs[g.against])
        else:
            out.append({**vars(g), "value": None, "met": None})
            continue
        met = value <= g.bound if g.at_most else value >= g.bound
        out.append({**vars(g), "value": value, "met": met})
    return out


def main():
    p = argparse.ArgumentParser(description="The table of docs/performance.md; see bench.sh")
    p.add_argument("folder", nargs="?", default="/var/tmp/vdblk-bench")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=2)
    p.add_argument("--only", default="")
    p.add_argument("--into", help="a file of an earlier run, in which the rows are replaced or added")
    p.add_argument("--list", action="store_true")
    args = p.parse_args()
    os.makedirs(args.folder, exist_ok=True)
    bench = Bench(args.folder, args.seconds)
    wanted = set(filter(None, args.only.split(",")))
    folder = os.path.join(peers.ROOT, "target/bench")
    os.makedirs(folder, exist_ok=True)
    out = args.into or os.path.join(folder, time.strftime("%Y%m%d-%H%M%S") + ".json")
    about = machine.about(args.folder)
    result = {"machine": about, "rows": []}
    if args.into and os.path.exists(out):
        with open(out, encoding="utf-8") as f:
            result = json.load(f)
    for group in rows.GROUPS:
        for row in group(bench):
            if args.list:
                print(row.key, "-", row.title)
                continue
            if wanted and row.key not in wanted:
                continue
            print(f"{row.key} …", file=sys.stderr)
            runs = measure(row, args.rounds)
            measured = {"key": row.key, "title": row.title, "rounds": args.rounds, "seconds": args.seconds, "vdblk": about["vdblk"]}
            kept = [r for r in result["rows"] if r["key"] != row.key]
            result["rows"] = [*kept, {**measured, "runs": runs, "goals": judge(row, runs)}]
            with open(out, "w", encoding="utf-8") as f:
                json.dump(result, f, indent=1)
    if args.list:
        return
    print(report.table(result))
    print(f"\n{out}")


if __name__ == "__main__":
    main()

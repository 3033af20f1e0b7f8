#!/usr/bin/env python3
"""ab-table.py OUT NAME_A NAME_B - the table of ab-fio.sh from what its guest printed."""
import collections
import math
import statistics
import sys

MARGIN = 0.05


def main():
    path, name_a, name_b = sys.argv[1:4]
    rounds, jobs = collections.defaultdict(dict), []
    for line in open(path):
        f = line.split()
        if not line.startswith("D "):
            print(line.rstrip())
            continue
        if f[2] not in jobs:
            jobs.append(f[2])
        rounds[f[2], f[3]][int(f[1])] = [float(x) for x in f[4:8]]
    print(
        f'{"job":12} {name_a + " IOPS":>14} {name_b + " IOPS":>14} {"B/A":>6} {"min":>6} {"max":>6}'
        f' {"clat us A":>10} {"clat us B":>10} {"maxlat ms":>14}  verdict'
    )
    for job in jobs:
        row(job, rounds[job, "vda"], rounds[job, "vdb"])


def row(job, a, b):
    both = [r for r in sorted(set(a) & set(b)) if a[r][0]]
    if not both:
        return
    ratios = [b[r][0] / a[r][0] for r in both]
    mean = math.exp(statistics.mean(math.log(max(q, 1e-9)) for q in ratios))
    verdict = "no clear difference"
    if max(ratios) < 1 - MARGIN:
        verdict = "B slower"
    elif min(ratios) > 1 + MARGIN:
        verdict = "B faster"

    def median(side, i):
        return statistics.median(side[r][i] for r in both)

    def worst(side):
        return max(side[r][3] for r in both) / 1e3

    print(
        f"{job:12} {median(a, 0):14.0f} {median(b, 0):14.0f} {mean:6.2f} {min(ratios):6.2f} {max(ratios):6.2f}"
        f" {median(a, 2):10.0f} {median(b, 2):10.0f} {worst(a):7.0f}{worst(b):7.0f}  {verdict}"
    )


main()

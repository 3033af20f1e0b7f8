"""Tables and plots of what bench.py has measured.

  report.py FILE.json                 the table, as Markdown
  report.py FILE.json --svg OUT.svg   server CPU per request of each row, as bars
"""
import argparse
import json
from statistics import median

METRICS = {
    "srv_us_io": "µs CPU", "iops": "IOPS", "p50": "µs median", "mb_s": "MB/s", "seconds": "s", "ms": "ms", "rss_mb": "MB",
}


def figure(value):
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def spread(runs, metric):
    values = [r[metric] for r in runs]
    return f"{figure(median(values))} ({figure(min(values))}–{figure(max(values))})"


def table(result):
    m = result["machine"]
    lines = [
        f"{m['date']}, {m['cpu']}, Linux {m['kernel']}, {m['file_system']}; vdblk {m['vdblk']}; {m['qemu_storage_daemon']};"
        f" {m['fio']}; medians of {'–'.join(str(n) for n in sorted({r['rounds'] for r in result['rows']}))} (least–most)",
        "",
        "| work | measure | vdblk | against | ratio | aim | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for goal in row["goals"] or plain_goals(row):
            lines.append(line(row, goal))
    return "\n".join(lines)


def plain_goals(row):
    """A row without an aim is told all the same."""
    others = [n for n in row["runs"] if n != "vdblk"]
    return [{"metric": "srv_us_io", "against": o, "bound": None, "at_most": True, "value": None, "met": None} for o in others]


def line(row, g):
    ours = spread(row["runs"]["vdblk"], g["metric"])
    theirs = row["runs"].get(g["against"])
    against = f"{g['against']} {spread(theirs, g['metric'])}" if theirs else (g["against"] and f"{g['against']} not there" or "")
    value = g["value"]
    if value is None and theirs:
        value = median(r[g["metric"]] for r in row["runs"]["vdblk"]) / median(r[g["metric"]] for r in theirs)
    ratio = f"{value:.2f}" if value is not None else "–"
    aim = f"{'≤' if g['at_most'] else '≥'} {g['bound']:.2f}" if g["bound"] is not None else ""
    verdict = {True: "met", False: "**missed**", None: ""}[g["met"]]
    return f"| {row['title']} | {METRICS[g['metric']]} | {ours} | {against} | {ratio} | {aim} | {verdict} |"


BAR, GAP, LEFT, WIDE = 14, 10, 330, 420
COLOURS = ["#2b6cb0", "#a0aec0", "#cbd5e0", "#e2e8f0"]


def svg(result, metric="srv_us_io"):
    """Bars, a group for each row that has the metric, on a scale of its own: they reach from 2 to 2000."""
    rows = [r for r in result["rows"] if all(metric in x[0] for x in r["runs"].values()) and len(r["runs"]) > 1]
    out, y = [], 24
    for row in rows:
        most = max(median(x[metric] for x in runs) for runs in row["runs"].values())
        out.append(f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{row["title"]}</text>')
        for n, (name, runs) in enumerate(row["runs"].items()):
            value = median(x[metric] for x in runs)
            width = WIDE * value / most
            out.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[min(n, 3)]}"/>')
            out.append(f'<text x="{LEFT + width + 4:.1f}" y="{y + 11}">{name} {figure(value)}</text>')
            y += BAR + 2
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDE + 130}" height="{y}" font-family="sans-serif" font-size="11">'
    title = f'<text x="{LEFT}" y="14" font-weight="bold">{METRICS[metric]} per request, less is better; each group has its own scale</text>'
    return "\n".join([head, title, *out, "</svg>"]) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("--svg")
    args = p.parse_args()
    with open(args.file, encoding="utf-8") as f:
        result = json.load(f)
    if args.svg:
        with open(args.svg, "w", encoding="utf-8") as f:
            f.write(svg(result))
    else:
        print(table(result))


if __name__ == "__main__":
    main()

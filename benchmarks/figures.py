"""Writes the figures that README.md and docs/ quote from benchmarks/results, so that they cannot grow stale.

    python -m benchmarks.figures

A figure stands before its mark, and a table between two marks; readers see neither mark:

    1.43x<!--= speedup flux-dev-768-4-ranks-115mbit exact diffusers -->

    <!-- table speed -->
    <!-- end of table -->

A mark names a function of `FIGURES` or `TABLES` and its arguments. A run is named by its file without the date and the
suffix. tests/unit/test_figures.py compares what is quoted with what is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.kept import RESULTS, place, quality, ratio, run, runs, seconds, shape, unit
from cocodiff.planner import choose_degrees
from cocodiff.topology import Cluster, Level

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FIGURE = re.compile(r"(?P<text>\d[\d.]*(?:x| %)?)(?P<mark><!--= (?P<words>.*?) -->)")
TABLE = re.compile(
    r"(?P<head><!-- table (?P<words>[^>]*?) -->\n)(?P<text>(?:(?!<!--).)*)(?P<foot><!-- end of table -->)", re.S
)


def speedup(name: str, method: str, base: str) -> str:
    """How many times as fast as `base`, of medians."""
    methods, method = run(name)["methods"], method.replace("-", " ")
    if method not in methods or base not in methods:
        return "-"
    if "error" in methods[base]:
        return "does not run"
    return f"{ratio(name, method, base):.2f}x"


def speedup_least(name: str, method: str, base: str) -> str:
    """The same of the slowest timing and the fastest one of `base`: the lower end of the spread."""
    mine, theirs = (run(name)["methods"][one]["seconds_per_step"] for one in (method, base))
    return f"{theirs['min'] / mine['max']:.2f}x"


def communication(name: str) -> str:
    """The share of `ulysses`' time that its compute does not take."""
    return f"{run(name)['methods']['ulysses']['communication_share']:.0%}".replace("%", " %")


def over_limit(name: str, method: str = "exact") -> str:
    """The time of a method over the estimate of what compute and its bytes must take."""
    return f"{run(name)['methods'][method]['ratio_to_limit']:.2f}"


def extreme(which: str, least_share: str, most_share: str) -> str:
    """The least or most speed-up of `exact` over diffusers, of runs where `ulysses` communicates so much (percent)."""
    found = [
        ratio(name, "exact", "diffusers")
        for name, one in runs().items()
        if "error" not in one["methods"]["diffusers"]
        and float(least_share) <= 100 * one["methods"]["ulysses"]["communication_share"] <= float(most_share)
    ]
    return f"{min(found) if which == 'least' else max(found):.2f}x"


def link(which: str) -> str:
    """The least rate of a slowest link in all runs, in Mbit/s, or the most, in Gbit/s."""
    rates = [8e3 * min(one["cluster"]["goodput_gbs"].values()) for one in runs().values()]
    return f"{min(rates):.0f}" if which == "least" else f"{max(rates) / 1e3:.1f}"


def psnr(task: str, steps: str, hosts: str, method: str, budget: str, digits: str = "0", of: str = "median") -> str:
    """PSNR against the exact run in dB; `of` is "median", "p10", "mean" or "worst"."""
    found = unit(task, steps, hosts, method, budget)
    return "" if found is None else f"{found[of]:.{digits}f}"


def ring_gain(which: str) -> str:
    """The least or most dB by which K and V alone are better than Q, K, V and O for the same bytes and steps."""
    found = []
    for one in quality():
        if one["method"] == "predicted" and not one["hosts"]["ring"]:
            other = unit(one["task"], one["steps"], "ring", "predicted", str(one["budget"]))
            found += [] if other is None else [other["median"] - one["median"]]
    return f"{min(found) if which == 'least' else max(found):.0f}"


def right(task: str, steps: str, hosts: str, method: str, budget: str) -> str:
    """How many of 128 pictures are wholly as their caption says; of the exact run with method "exact"."""
    found = unit(task, steps, hosts, "rounding" if method == "exact" else method, budget)
    assert found is not None
    return str(found["exact_right" if method == "exact" else "right"])


def cell(file: str, row: str, column: str) -> str:
    """A cell of a Markdown table of the results, by its row's first cell and its column's place, from 0."""
    text = (RESULTS / f"{file}.md").read_text()
    rows = [[one.strip() for one in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (found,) = [one for one in rows if one[0].replace(" ", "-") == row]
    return found[int(column)]


def neighbours(column: str, start: str = "") -> str:
    """How many rows of neighbours.md begin so in the column of "diffusers" or "cocodiff"; without `start`, all."""
    text = (RESULTS / "neighbours.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \w+ \w+ \|", line)]
    index = {"diffusers": 4, "cocodiff": 5}[column]
    return str(sum(row[index].strip().startswith(start.replace("_", " ")) for row in rows))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def speed_table(*names: str) -> str:
    """`exact` against diffusers and `ulysses`: the named runs, or all of them, most communication first."""
    order = names or sorted(runs(), key=lambda name: -run(name)["methods"]["ulysses"]["communication_share"])
    head = ["shape", "ranks, link", "communication", "against diffusers", "against `ulysses`", "time over the limit"]
    return table(
        head,
        [
            [shape(name), place(name), communication(name), speedup(name, "exact", "diffusers"),
             speedup(name, "exact", "ulysses"), over_limit(name)]
            for name in order
        ],
    )  # fmt: skip


def short_speed_table(*names: str) -> str:
    """The same for the first page."""
    head = [
        "model shape",
        "ranks, emulated link",
        "time spent on communication without overlap",
        "cocodiff against diffusers",
    ]
    rows = [[shape(n), place(n), communication(n), f"**{speedup(n, 'exact', 'diffusers')}**"] for n in names]
    return table(head, rows)


def mesh_table() -> str:
    """`exact` on every ring degree against `ulysses`, and what the rule takes."""
    rows = []
    for name, one in runs("meshes").items():
        if one["branches"] > 1:
            continue
        by_ring: dict[int, float] = {}
        for method, row in one["methods"].items():
            if method.startswith("exact"):
                by_ring[int(row["mesh"].split()[4])] = row["seconds_per_step"]["median"]
        base = one["methods"].get("ulysses", {}).get("seconds_per_step", {}).get("median")
        best, cells = min(by_ring.values()), []
        for rings in ((1,), (2,), (3, 4)):
            found = next((by_ring[ring] for ring in rings if ring in by_ring), None)
            shown = "does not run" if found is None else f"{found:.2f} s" if base is None else f"{base / found:.2f}x"
            cells.append(f"**{shown}**" if found == best else shown)
        levels = tuple(Level(**level) for level in one["cluster"]["levels"])
        degrees = choose_degrees(Cluster("c", levels), one["shape"]["heads"], long=one["shape"]["family"] == "wan")
        slower = by_ring[degrees.ring] / best - 1
        taken = f"ring {degrees.ring}: " + ("best" if not slower else f"{slower:.0%} slower".replace("%", " %"))
        cells = ["does not run" if base is None else "1.00x", *cells, taken]
        rows.append([shape(name), place(name) + f", {one['shape']['heads']} heads", *cells])
    head = ["shape", "ranks, link", "`ulysses`", "`exact`, ring 1", "ring 2", "ring 3 or 4", "the rule takes"]
    return table(head, rows)


def selective_table() -> str:
    """Selective methods against `ulysses`, with the spread, and the ceiling of the same bytes."""
    rows = []
    order = sorted(runs("selective"), key=lambda n: (place(n)[:5], -run(n)["cluster"]["goodput_gbs"]["node"]))
    for name in order:
        cells = [place(name), communication(name), speedup(name, "exact", "ulysses")]
        for method in ("balanced", "fast"):
            row = run(name)["methods"].get(method)
            ceiling = "-" if row is None else f"{seconds(name, 'ulysses') / row['limit_seconds']:.2f}x"
            cells.append(f"{speedup(name, method, 'ulysses')} ({ceiling})".replace("- (-)", "-"))
        rows.append(cells)
    return table(["ranks, link", "`ulysses` communicates", "`exact`", "`balanced` (ceiling)", "`fast` (ceiling)"], rows)


BUDGETS = ("1", "1/2", "1/4", "1/8", "1/16", "1/32")
PRESET = {"1/4": " (`high`)", "1/8": " (`balanced`)", "1/16": " (`fast`, Q, K, V, O)", "1/32": " (`fast`, K and V)"}


def budget_table(task: str) -> str:
    """Median / 10th percentile by share of the bytes, of 28 and 50 steps, and captions wholly right."""
    rows = []
    for budget in BUDGETS:
        method = "rounding" if budget == "1" else "predicted"
        cells = [budget + (", rounded to bfloat16" if budget == "1" else PRESET.get(budget, ""))]
        for hosts in ("ulysses", "ring"):
            for steps in ("28", "50"):
                found = unit(task, steps, hosts, method, budget)
                cells.append("" if found is None else f"{found['median']:.1f} / {found['p10']:.1f}")
        both = [unit(task, "28", hosts, method, budget) for hosts in ("ulysses", "ring")]
        rows.append([*cells, ", ".join("-" if one is None else str(one["right"]) for one in both)])
    head = ["share of the bytes", "Q, K, V, O cross: 28 steps", "50 steps", "K and V: 28 steps", "50 steps"]
    return table([*head, "captions right, 28 steps: Q, K, V, O; K and V"], rows)


def method_table() -> str:
    """Median PSNR of every method that spends the same bytes, 28 steps."""
    cases = [("ulysses", one) for one in BUDGETS[1:]] + [("ring", "1/8"), ("ring", "1/16")]
    methods = ("predicted", "residual", "skip", "v_major", "changed_rows", "oldest_rows", "random_rows", "plain")
    rows = [
        [f"`{name}`", *(psnr("text2image", "28", *case[:1], name, case[1], "1") for case in cases)] for name in methods
    ]
    return table(["method", *(f"{'K, V' if way == 'ring' else 'Q, K, V, O'}: {share}" for way, share in cases)], rows)


def planned(part: str, what: str) -> str:
    """How well the planner's model predicts: "mean" or "most", of the runs of "calibration" or "test"."""
    table = (RESULTS / "planner" / "meshes.md").read_text()
    found = re.search(rf"^{part}: .* mean error (?P<mean>[\d.]+)%, most (?P<most>[\d.]+)%", table, re.M)
    assert found is not None, part
    return f"{float(found[what]):.0f} %"


FIGURES: Mapping[str, Callable[..., str]] = {
    "speedup": speedup, "speedup-least": speedup_least,
    "communication": communication, "over-limit": over_limit, "extreme": extreme, "link": link, "psnr": psnr,
    "ring-gain": ring_gain, "right": right, "cell": cell, "neighbours": neighbours,
    "planned": planned,
}  # fmt: skip
TABLES: Mapping[str, Callable[..., str]] = {
    "speed": speed_table, "short-speed": short_speed_table, "meshes": mesh_table, "selective": selective_table,
    "budgets": budget_table, "methods": method_table,
}  # fmt: skip


def renewed(text: str) -> str:
    """A page with all its figures and tables made anew from the results."""

    def figure(found: re.Match[str]) -> str:
        name, *words = found["words"].split()
        return FIGURES[name](*words) + found["mark"]

    def whole(found: re.Match[str]) -> str:
        name, *words = found["words"].split()
        return f"{found['head']}\n{TABLES[name](*words)}\n{found['foot']}"

    return TABLE.sub(whole, FIGURE.sub(figure, text))


def main(pages: Sequence[Path] = PAGES) -> None:
    for page in pages:
        before = page.read_text()
        after = renewed(before)
        if after != before:
            page.write_text(after)
            print(f"{page.name}: figures renewed")


if __name__ == "__main__":
    main()

"""One table of all results of `cocodiff bench --save benchmarks/results`, into benchmarks/results/README.md."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
HEAD = """# Results

Each row is one run of `cocodiff bench`, with its own JSON, Markdown and plot beside this file; `benchmarks/sweep`
makes them all. MEASURED on emulated links (`scripts/emulated_cluster`), several ranks to a core: ratios count, seconds
do not.
"Communication" is the share of `ulysses`' time that its compute alone does not take. Ratios are of medians; in brackets
the ratio of the worst of `exact` to the best of the other, and of the best to the worst.

| shape | ranks | link, measured | communication | exact against diffusers | against ulysses | exact to its limit |
|---|---|---|---|---|---|---|
"""


def ratio(row: dict, other: dict) -> str:
    """Times that `row` is faster than `other`."""
    if "error" in other:
        return "does not run"
    mine, theirs = row["seconds_per_step"], other["seconds_per_step"]
    return (
        f"{theirs['median'] / mine['median']:.2f}x "
        f"({theirs['min'] / mine['max']:.2f} to {theirs['max'] / mine['min']:.2f})"
    )


def main() -> None:
    rows = []
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        if result.get("schema") != "cocodiff-bench/1" or result["cluster"] is None:
            continue
        methods, shape, cluster = result["methods"], result["shape"], result["cluster"]
        if not {"exact", "ulysses", "diffusers"} <= methods.keys() or "error" in methods["exact"]:
            continue
        exact, link = methods["exact"], min(cluster["goodput_gbs"].values()) * 8e3
        sizes = " x ".join(str(level["size"]) for level in reversed(cluster["levels"]))
        name = (
            f"[{shape['name']}, {shape['double']} + {shape['single']} blocks, width {shape['width']}]({path.stem}.md)"
        )
        share = methods["ulysses"]["communication_share"]
        cells = [name, sizes, f"{link:.0f} Mbit/s", f"{share:.0%}", ratio(exact, methods["diffusers"])]
        cells += [ratio(exact, methods["ulysses"]), f"{exact['ratio_to_limit']:.2f}"]
        rows.append(((shape["name"], shape["width"], sizes, -link), "| " + " | ".join(cells) + " |"))
    (RESULTS / "README.md").write_text(HEAD + "\n".join(row for _, row in sorted(rows)) + "\n")
    print(f"{len(rows)} results in {RESULTS / 'README.md'}")


if __name__ == "__main__":
    main()

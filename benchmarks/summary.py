"""Writes the tables of benchmarks/results from the JSON files that `cocodiff bench --save` left there.

    python benchmarks/summary.py

README.md holds the runs of `exact`, meshes/README.md those of every mesh, selective/README.md those of selective
transmission. Figures are copied, never changed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cocodiff.parallel.layout import axis_sizes
from cocodiff.planner import choose_degrees, outward_bytes
from cocodiff.topology import Cluster, Level

RESULTS = Path(__file__).parent / "results"
Json = dict[str, Any]

HEAD = """# Results

Each row is one run of `cocodiff bench`, with its own JSON, Markdown and plot beside this file; `benchmarks/sweep`
makes them all. MEASURED on emulated links (`scripts/emulated_cluster`), several ranks to a core: ratios count, seconds
do not. Beside it: [meshes](meshes/README.md), [selective transmission, speed](selective/README.md) and
[quality](quality/quality.md).
"Communication" is the share of `ulysses`' time that its compute alone does not take. Ratios are of medians; in brackets
the ratio of the worst of `exact` to the best of the other, and of the best to the worst.

| shape | ranks | link, measured | communication | exact against diffusers | against ulysses | exact to its limit |
|---|---|---|---|---|---|---|
"""


MESHES = """# Meshes

Each row is one run of `cocodiff bench`, as in [the other results](../README.md): `exact` on every mesh, in turn with
`ulysses` (one exchange over all ranks, sequential) where the heads allow it. "To the best": seconds over those of the
best mesh in its table. Then MB a step through the busiest outermost link, counted (the gather at the end is in it) and
by theory for the layers alone: 4 (1 - 1/G) for ulysses over G nodes, 2 (G - 1) for a ring of G, times what a node holds
of a tensor. **Bold**: what the rule of docs/meshes.md takes. Where a ring of four at 10 Gbit/s sent more than theory
says, parts still went straight to everyone ([measured](../ring-ways.md)).

"""


def mesh_table(result: Json, stem: str) -> list[str]:
    """The lines of the table of one run of `exact` on several meshes."""
    shape = result["shape"]
    levels = [
        Level(one["name"], one["size"], one["bandwidth_gbs"], one["latency_us"], one["slow"])
        for one in result["cluster"]["levels"]
    ]
    cluster = Cluster("measured", tuple(levels))
    rule = str(choose_degrees(cluster, shape["heads"], long=shape["family"] == "wan"))
    rows = {name: row for name, row in result["methods"].items() if "error" not in row}
    best = min(row["seconds_per_step"]["median"] for row in rows.values() if row["mesh"])
    base = rows.get("ulysses", {}).get("seconds_per_step", {}).get("median")
    sizes = " x ".join(str(level.size) for level in reversed(levels))
    lines = [f"**[{sizes} ranks, {shape['heads']} heads, {result['branches']} branch(es)]({stem}.md)**", ""]
    lines += [
        "| method | mesh | seconds a step (least, most) | against ulysses | to the best | MB out: counted, theory |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        taken, mesh = row["seconds_per_step"], row["mesh"] or ""
        shown = f"**{mesh}**" if mesh == rule and name != "ulysses" else mesh
        cells = [name, shown, f"{taken['median']:.3f} ({taken['min']:.3f}, {taken['max']:.3f})"]
        cells += [
            "" if base is None else f"{base / taken['median']:.2f}x",
            f"{taken['median'] / best:.2f}" if mesh else "",
        ]
        outward = result["environment"]["hosts"] > 1 and mesh
        counted = (
            f"{row['bytes'][levels[-1].name] / 1e6:.2f}, {theory(result, cluster, mesh) / 1e6:.2f}" if outward else ""
        )
        lines.append("| " + " | ".join([*cells, counted]) + " |")
    return [*lines, ""]


def theory(result: Json, cluster: Cluster, mesh: str) -> float:
    """Bytes a step that the layers without the final gather send out of one node."""
    shape = result["shape"]
    cfg, ring, ulysses = (int(word) for word in mesh.split() if word.isdigit())
    half = Cluster("half", cluster.levels).with_sizes(axis_sizes(cluster.sizes, 1, ring * ulysses))
    level = len(cluster.levels) - 1
    shard = (shape["text"] + shape["image"]) * shape["width"] * 4 / (ring * ulysses)
    node = cluster.num_ranks // cluster.sizes[-1]
    branches = result["branches"] / cfg
    return outward_bytes(half, level, ring, ulysses) * shard * node * (shape["double"] + shape["single"]) * branches


SELECTIVE = """# Selective transmission, speed

Each row is a method of one run of `cocodiff bench`, as in [the other results](../README.md); a timing of a selective
method is a whole run of 20 steps. *Ceiling*: `ulysses` over what compute and the method's own bytes would take, wholly
overlapped (at each step the longer of the two) and one after the other. *Reached*: of the overlapped ceiling. *Coding*:
the seconds that the busiest rank's lanes encode and decode, beside compute, over those that the method saves against
`exact` (`ulysses` where `exact` was not run). Shares are of float32, which these models are in: 1/16 of the bytes is
two bits an element. Where exchanges hide under the compute, selective methods are exact and code nothing.

"""


def percent(share: float | None) -> str:
    """A share of communication; the bench leaves out one that is within the noise."""
    return "in the noise" if share is None else f"{share:.0%}"


def selective_table(result: Json, stem: str) -> list[str]:
    """The lines of the table of one run with selective methods."""
    shape, base = result["shape"], result["methods"]["ulysses"]
    exact = next((row for name, row in result["methods"].items() if name.split()[0] == "exact"), base)
    levels, compute = result["cluster"]["levels"], result["compute_seconds"]
    sizes = " x ".join(str(level["size"]) for level in reversed(levels))
    outer = levels[-1]["name"]
    rate = result["cluster"]["goodput_gbs"][outer] * 1e9
    lines = [
        f"**[{sizes} ranks, {shape['name']}, {shape['double']} + {shape['single']} blocks, width {shape['width']}, "
        f"{rate * 8e-6:.3g} Mbit/s, communication {percent(base['communication_share'])}]({stem}.md)**",
        "",
        "| method | mesh | against ulysses | ceiling, overlapped | one after the other | reached | MB a step, counted "
        "(interface) | coding |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | | |")
            continue
        taken, links, crossed = row["seconds_per_step"]["median"], row["bytes"], row["interface_bytes"] / 1e6
        cells = [name, row["mesh"] or "", ratio(row, base)]
        if links is None:
            cells += [""] * 3 + [f"({crossed:.2f})", ""]
        else:
            series = compute + links[outer] / rate
            whole = base["seconds_per_step"]["median"]
            cells += [f"{whole / row['limit_seconds']:.2f}x", f"{whole / series:.2f}x"]
            cells += [f"{row['limit_seconds'] / taken:.0%}", f"{row['counted_bytes'] / 1e6:.2f} ({crossed:.2f})"]
            saved = exact["seconds_per_step"]["median"] - taken
            coding = row["coding_seconds"]
            cells.append("" if coding is None else f"{coding / saved:.1%}" if saved > 0 else "nothing saved")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def ratio(row: Json, other: Json) -> str:
    """How many times `row` is faster than `other`, of medians, and in brackets the least and the most."""
    if "error" in other:
        return "does not run"
    mine, theirs = row["seconds_per_step"], other["seconds_per_step"]
    return (
        f"{theirs['median'] / mine['median']:.2f}x "
        f"({theirs['min'] / mine['max']:.2f} to {theirs['max'] / mine['min']:.2f})"
    )


def exact_row(result: Json, stem: str) -> tuple[tuple[str, int, str, float], str] | None:
    """A key to sort by and the row of one run; None where the run has no `exact` beside the other two methods."""
    if result.get("schema") != "cocodiff-bench/1" or result["cluster"] is None:
        return None
    methods, shape, cluster = result["methods"], result["shape"], result["cluster"]
    if not {"exact", "ulysses", "diffusers"} <= methods.keys() or "error" in methods["exact"]:
        return None
    exact, link = methods["exact"], min(cluster["goodput_gbs"].values()) * 8e3
    sizes = " x ".join(str(level["size"]) for level in reversed(cluster["levels"]))
    name = f"[{shape['name']}, {shape['double']} + {shape['single']} blocks, width {shape['width']}]({stem}.md)"
    share = methods["ulysses"]["communication_share"]
    cells = [name, sizes, f"{link:.0f} Mbit/s", percent(share), ratio(exact, methods["diffusers"])]
    cells += [ratio(exact, methods["ulysses"]), f"{exact['ratio_to_limit']:.2f}"]
    return (shape["name"], shape["width"], sizes, -link), "| " + " | ".join(cells) + " |"


def main(folder: Path = RESULTS) -> None:
    """Write the README.md of the folder and those of its subfolders meshes and selective."""
    found = [exact_row(json.loads(path.read_text()), path.stem) for path in folder.glob("*.json")]
    rows = sorted(row for row in found if row is not None)
    (folder / "README.md").write_text(HEAD + "\n".join(row for _, row in rows) + "\n")
    for name, head, table in (("meshes", MESHES, mesh_table), ("selective", SELECTIVE, selective_table)):
        lines = []
        for path in sorted((folder / name).glob("*.json")):
            lines += table(json.loads(path.read_text()), path.stem)
        (folder / name / "README.md").write_text(head + "\n".join(lines))
    print(f"{len(rows)} results in {folder / 'README.md'}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()

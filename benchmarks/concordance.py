"""All cases of `benchmarks.placed` together: order, error, and what the model's choice costs; a table and a plot.

    python -m benchmarks.concordance --plot docs/images/planner.png

It reads benchmarks/results/planner/cases/*.json, each written by one run of `benchmarks.placed --played N --out FILE`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from types import MappingProxyType

from benchmarks.modelled import spearman
from benchmarks.planned import Row, concordance, seconds_of
from cocodiff.models.shapes import Shape
from cocodiff.planner.measured import measurements_of_json
from cocodiff.planner.plan_file import plan_of_json
from cocodiff.planner.rates import Rates
from cocodiff.planner.wanted import Wanted, task
from cocodiff.topology import Cluster

CASES = Path(__file__).parent / "results" / "planner" / "cases"


def read_cases(folder: Path = CASES) -> dict[str, tuple[str, list[Row]]]:
    """The command and the rows of each case, by the name of its file."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        case = json.loads(path.read_text())
        found[path.stem] = case["command"], [Row(**row | {"run": path.stem}) for row in case["rows"]]
    return found


def regret(rows: list[Row]) -> float:
    """By how much the plan that the model takes is slower than the best that was measured."""
    return min(rows, key=lambda row: row.predicted).measured / min(row.measured for row in rows) - 1


def placement_effect(rows: list[Row]) -> float:
    """The worst over the best placement of one mesh, of the mesh where that is most."""
    by_mesh: dict[str, list[float]] = {}
    for row in rows:
        by_mesh.setdefault(row.method.split(",")[0], []).append(row.measured)
    return max(max(some) / min(some) for some in by_mesh.values())


def in_means(rows: list[Row]) -> tuple[list[float], list[float]]:
    """Predicted and measured seconds, each in units of its case's mean: cases are as different as models are."""
    by_run = {row.run: [other for other in rows if other.run == row.run] for row in rows}
    predicted = [row.predicted / mean(other.predicted for other in by_run[row.run]) for row in rows]
    measured = [row.measured / mean(other.measured for other in by_run[row.run]) for row in rows]
    return predicted, measured


ABLATIONS: Mapping[str, Callable[[Cluster, Rates], tuple[Cluster, Rates]]] = MappingProxyType(
    {
        "as it is": lambda links, rates: (links, rates),
        "all ranks in step": lambda links, rates: (links, replace(rates, messages=False)),
        "no measured latencies": lambda links, rates: (_at_once(links), rates),
        "no cost of the host": lambda links, rates: (links, replace(rates, operator_us=0.0)),
        "no single operators": lambda links, rates: (links, replace(rates, measured={})),
    }
)


def _at_once(links: Cluster) -> Cluster:
    return replace(links, levels=tuple(replace(level, latency_us=1e-3) for level in links.levels))


def predicted_again(path: Path, change: Callable[[Cluster, Rates], tuple[Cluster, Rates]]) -> list[Row]:
    """The rows of a case as the model has them with other figures; none where the case kept no figures."""
    case = json.loads(path.read_text())
    if "measured" not in case:
        return []
    figures = measurements_of_json(case["measured"])
    links, rates = change(figures.cluster, figures.rates)
    shape = Shape(**{key: value for key, value in case["shape"].items() if key != "width"})
    of = task(Wanted(shape, 0, 0, None, case["branches"]), links, rates, None)
    plans = [plan_of_json(plan) for plan in case["plans"]]
    return [
        replace(Row(**row), run=path.stem, predicted=seconds_of(of, plan))
        for row, plan in zip(case["rows"], plans, strict=True)
    ]


def ablations(folder: Path = CASES) -> Iterator[str]:
    """Lines of a table: what the model loses without each of its parts, in the cases that kept their figures."""
    yield "| model | pairs in order | Spearman | mean error | regret: mean, most |\n|---|---|---|---|---|"
    for name, change in ABLATIONS.items():
        cases = [rows for path in sorted(folder.glob("*.json")) if (rows := predicted_again(path, change))]
        everything = [row for rows in cases for row in rows]
        right, total = concordance(everything)
        errors, regrets = (
            [abs(row.predicted / row.measured - 1) for row in everything],
            [regret(rows) for rows in cases],
        )
        yield (
            f"| {name} | {right} of {total} | {spearman(*in_means(everything)):.3f} | {mean(errors):.1%} | "
            f"{mean(regrets):.1%}, {max(regrets):.1%} |"
        )


def draw(cases: dict[str, tuple[str, list[Row]]], path: Path) -> None:
    """Predicted against measured, a colour for each case, and the line where both are equal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    for index, (name, (_, rows)) in enumerate(cases.items()):
        measured = [row.measured for row in rows]
        spread = [[row.measured - row.least for row in rows], [row.most - row.measured for row in rows]]
        colour = pyplot.get_cmap("tab20")(index % 20)
        axes.errorbar([row.predicted for row in rows], measured, yerr=spread, fmt="o", ms=4, color=colour, label=name)
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    low = min(row.least for _, rows in cases.values() for row in rows) * 0.8
    axes.plot([low, ends[1]], [low, ends[1]], color="0.6", lw=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="predicted seconds a step", ylabel="measured seconds a step")
    axes.set(xlim=(low, ends[1]), ylim=(low, ends[1]), aspect="equal")
    axes.legend(fontsize=7, loc="lower right", title="case", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw into this PNG file")
    parser.add_argument("--ablations", action="store_true", help="the model without each of its parts")
    args = parser.parse_args()
    cases = read_cases()
    print("| case | plans | pairs in order | mean error | most | regret | placement | command |")
    print("|---|---|---|---|---|---|---|---|")
    everything: list[Row] = []
    for name, (command, rows) in cases.items():
        everything += rows
        errors = [abs(row.predicted / row.measured - 1) for row in rows]
        right, total = concordance(rows)
        shown = command.split(" --out")[0].replace("scripts/emulated_cluster ", "").replace("python -m ", "")
        print(
            f"| {name} | {len(rows)} | {right} of {total} | {sum(errors) / len(errors):.1%} | {max(errors):.1%} | "
            f"{regret(rows):.1%} | {placement_effect(rows):.2f} | `{shown}` |"
        )
    right, total = concordance(everything)
    errors = [abs(row.predicted / row.measured - 1) for row in everything]
    regrets = [regret(rows) for _, rows in cases.values()]
    pooled = spearman([row.predicted for row in everything], [row.measured for row in everything])
    print(
        f"\n{len(cases)} cases, {len(everything)} plans: {right} of {total} pairs ({right / total:.1%}) whose spreads "
        f"do not meet are in the right order; Spearman of all seconds {pooled:.3f}, in units of each case's "
        f"mean {spearman(*in_means(everything)):.3f}; "
        f"mean error {sum(errors) / len(errors):.1%}, most {max(errors):.1%}; regret {sum(regrets) / len(regrets):.1%} "
        f"in the mean, {max(regrets):.1%} at most."
    )
    if args.ablations:
        print("", *ablations(), sep="\n")
    if args.plot is not None:
        draw(cases, args.plot)


if __name__ == "__main__":
    main()

"""What a long-lived program leaves behind: calls, pipelines that are dropped without unwrap, calls that fail.

    torchrun --nproc-per-node 2 -m benchmarks.soak 200 60 20 benchmarks/results/soak

The arguments are how many of each, and where the figures (JSON, PNG) of rank 0 go. After each round threads, file
descriptors, process groups and resident memory are counted.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

import cocodiff

CALLS = (
    dict(num_inference_steps=2),
    dict(num_inference_steps=1, num_images_per_prompt=2),
    dict(num_inference_steps=2, height=80, width=64),
    dict(num_inference_steps=20, transmission="balanced"),
    dict(num_inference_steps=2, ring_degree=2),
)


def counted(round_name: str) -> dict[str, Any]:
    """What this process holds now."""
    gc.collect()
    process = psutil.Process()
    return {
        "after": round_name,
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
        "groups": len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0,
        "memory_mb": process.memory_info().rss / 1e6,
    }


def _wrapped(**settings: Any) -> Any:
    pipe = cocodiff.tiny_pipeline("flux")
    pipe.set_progress_bar_config(disable=True)
    return cocodiff.wrap(pipe, **settings)


def _full(*_: Any) -> dict[str, Any]:
    raise OSError("disk full")


def run(calls: int, drops: int, failures: int) -> list[dict[str, Any]]:
    """All rounds. Collective. Every tenth call of the mixed ones has its figures, every drop and failure its own."""
    cluster = cocodiff.Cluster("soak", (cocodiff.Level("node", dist_size(), 1e-4, 1e-6, slow=True),))
    kinds = dict.fromkeys(  # in one order on all ranks
        tuple((name, value) for name, value in one.items() if name in ("transmission", "ring_degree")) for one in CALLS
    )
    keep = {settings: _wrapped(cluster=cluster, **dict(settings)) for settings in kinds}
    seen = []
    for index in range(calls):
        call = dict(CALLS[index % len(CALLS)])
        settings = tuple((name, call.pop(name)) for name in list(call) if name in ("transmission", "ring_degree"))
        keep[settings]("a red circle", output_type="latent", **call)
        if index % 10 == 9:
            seen.append(counted("calls"))
    for _ in range(failures):
        for pipe in keep.values():
            try:
                pipe("a red circle", num_inference_steps=2, output_type="latent", callback_on_step_end=_full)
            except OSError:
                pass
        seen.append(counted("failed calls"))
    for _ in range(drops):
        _wrapped()("a red circle", num_inference_steps=1, output_type="latent")
        seen.append(counted("drops"))
    return seen


def dist_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def plot(seen: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = ("threads", "descriptors", "groups", "memory_mb")
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, names, strict=True):
        for kind in dict.fromkeys(one["after"] for one in seen):
            at = [index for index, one in enumerate(seen) if one["after"] == kind]
            axis.plot(at, [seen[index][name] for index in at], ".-", label=kind)
        axis.set_ylim(0, 1.1 * max(one[name] for one in seen))
        axis.set_title("resident memory, MB" if name == "memory_mb" else name)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def main(calls: int, drops: int, failures: int, folder: Path | None = None) -> None:
    seen = run(calls, drops, failures)
    if dist.get_rank():
        return
    print("| after | threads | descriptors | groups | resident MB |\n|---|---|---|---|---|")
    for one in (seen[0], seen[len(seen) // 2], seen[-1]):
        print(
            f"| {one['after']} | {one['threads']} | {one['descriptors']} | {one['groups']} | {one['memory_mb']:.0f} |"
        )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "soak.json").write_text(json.dumps(seen, indent=1) + "\n")
        plot(seen, folder / "soak.png")


if __name__ == "__main__":
    counts = [int(one) for one in sys.argv[1:4]] or [200, 60, 20]
    main(counts[0], counts[1], counts[2], Path(sys.argv[4]) if sys.argv[4:] else None)

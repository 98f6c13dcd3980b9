"""What several test modules do with a pipeline. The places that depend on how rows are cut are all in this file."""

from __future__ import annotations

from typing import Any

from cocodiff import Cluster, Level


def degrees(mesh: tuple[int, int, int] | None) -> dict[str, int]:
    """The options of `cocodiff.wrap` for a mesh; none for None."""
    return {} if mesh is None else dict(zip(("cfg_degree", "ring_degree", "ulysses_degree"), mesh, strict=True))


def wrapped(
    pipe: Any, *, mesh: tuple[int, int, int] | None, sizes: tuple[int, ...], pieces: bool, **options: Any
) -> tuple[Any, list[int]]:
    """The pipeline on a cluster of levels of so many ranks, its rows cut or not; and a list of how they were cut.

    The list grows with every layer: into how many pieces its rows were cut.
    """
    import cocodiff
    from cocodiff import plan

    plan.ROWS_PER_PIECE = 2  # up to four pieces also of small pictures
    latency_us = 1e-6 if pieces else 1e9
    cluster = Cluster("test", tuple(Level(f"level {i}", size, 1e-6, latency_us) for i, size in enumerate(sizes)))
    cocodiff.wrap(pipe, cluster=cluster, **degrees(mesh), **options)
    return pipe, recorded_pieces(pipe.cocodiff.engine)


def recorded_pieces(engine: Any) -> list[int]:
    """Into how many pieces each layer will have been cut."""
    counts, plan = [], engine.plan

    def recording(*size: Any) -> Any:
        planned = plan(*size)
        counts.append(planned[1])
        return planned

    engine.plan = recording
    return counts

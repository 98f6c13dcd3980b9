"""`cocodiff generate`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cocodiff.cli.drawing import Drawing
from cocodiff.cli.request import Request
from cocodiff.cli.start import CLUSTER_HELP, DEVICE_HELP, MOST_RANKS, RANKS_HELP, start_ranks
from cocodiff.cli.together import quiet_others, this_rank

MOST_PIXELS = 65_535  # of a side: the most that JPEG can hold, and more than any model can draw


def generate(
    prompt: Annotated[str, typer.Option(help="Text that says what to draw.")],
    model: Annotated[
        str,
        typer.Option(
            help="Pipeline to use: tiny, a tiny one of another family such as tiny:sd3, the folder of a diffusers "
            "pipeline, or a hub id."
        ),
    ] = "tiny",
    negative_prompt: Annotated[
        str | None, typer.Option(help="Text that says what not to draw, for pipelines that take one.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=1, max=MOST_PIXELS, help="Height in pixels. If left out, the model's own.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, max=MOST_PIXELS, help="Width in pixels. If left out, the model's own.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Number of frames of a clip. If left out, the model's own.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Number of denoising steps.")] = 28,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the initial noise.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="The guidance_scale of the pipeline's call. If left out, the pipeline's own.")
    ] = None,
    true_cfg: Annotated[
        float | None,
        typer.Option(
            help="The true_cfg_scale of FLUX.1 and Qwen-Image, whose guidance by a negative prompt is this one."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this picture, for image to image and for inpainting.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Picture that is white where inpainting shall paint.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How far to leave the picture given: above 0, which keeps it, and at most 1, which draws anew. If "
            "left out, 1 with --mask, else the pipeline's own."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="File into which rank 0 saves the result: .png and the like, .mp4 or .gif for a clip. A clip with "
            "another name becomes a folder of frames."
        ),
    ] = Path("out.png"),
    ranks: Annotated[int | None, typer.Option(min=1, max=MOST_RANKS, help=RANKS_HELP)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights: float32, bfloat16 (bf16) or float16 (fp16). If left out, bfloat16. Tiny "
            "pipelines always run in float32."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    exchange: Annotated[
        str, typer.Option(help="How a tensor crosses the ranks: flat, staged, or auto for the faster of the two.")
    ] = "auto",
    schedule: Annotated[
        str,
        typer.Option(help="When exchanges start: v_first as early as they can, sequential in the textbook's order."),
    ] = "v_first",
    cluster: Annotated[str, typer.Option(envvar="EMULATED_CLUSTER", show_envvar=False, help=CLUSTER_HELP)] = "auto",
    transmission: Annotated[
        str, typer.Option(help="What crosses slow links: exact, or with fewer bytes high, balanced or fast.")
    ] = "exact",
    cfg_degree: Annotated[
        int | None, typer.Option(min=1, help="With 2, each half of the ranks computes one branch of guidance.")
    ] = None,
    ring_degree: Annotated[
        int | None, typer.Option(min=1, help="Number of parts of the sequence whose keys and values travel.")
    ] = None,
    ulysses_degree: Annotated[
        int | None, typer.Option(min=1, help="Number of ranks that share the heads of a part.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Record when compute and lanes were at work, one file a rank in this folder.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the call report into this JSON file: bytes sent, errors, memory held.")
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Draw the picture on one rank as well and say how the two differ.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show cocodiff's log on rank 0, and where in the code an error arose.")
    ] = False,
) -> None:
    """Draw one picture or clip on all ranks."""
    request = Request(**locals())
    quiet_others(verbose)
    if ranks is not None or this_rank()[1] == 1:
        request.check()  # before anything is loaded or started
    if ranks is not None:
        raise SystemExit(start_ranks(ranks))
    Drawing(request).run()

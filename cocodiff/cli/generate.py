"""`cocodiff generate` draws one picture or clip on all ranks."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cocodiff.cli.start import CLUSTER_HELP, DEVICE_HELP, RANKS_HELP, start_ranks
from cocodiff.errors import ConfigError


def generate(
    prompt: Annotated[str, typer.Option(help="Text that says what to draw.")],
    model: Annotated[
        str,
        typer.Option(
            help="Pipeline to use: tiny, a tiny one of another family such as tiny:sd3, the folder of a diffusers "
            "pipeline, or a hub id."
        ),
    ] = "tiny",
    height: Annotated[int | None, typer.Option(help="Height in pixels. If left out, the model's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels. If left out, the model's own.")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Number of frames of a clip. If left out, the model's own.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of denoising steps.")] = 28,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    guidance: Annotated[
        float | None, typer.Option(help="The guidance_scale of the pipeline's call. If left out, the pipeline's own.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this picture, for image to image and for inpainting.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Picture that is white where inpainting shall paint.")] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="File into which rank 0 saves the result: .png and the like, .mp4 or .gif for a clip. A clip with "
            "another name becomes a folder of frames."
        ),
    ] = Path("out.png"),
    ranks: Annotated[int | None, typer.Option(min=1, help=RANKS_HELP)] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: float32, bfloat16 or float16. Tiny pipelines run in float32.")
    ] = "bfloat16",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    exchange: Annotated[
        str, typer.Option(help="How a tensor crosses the ranks: flat, staged, or auto for the faster of the two.")
    ] = "auto",
    schedule: Annotated[
        str,
        typer.Option(help="When exchanges start: v_first as early as they can, sequential in the textbook's order."),
    ] = "v_first",
    cluster: Annotated[str, typer.Option(envvar="EMULATED_CLUSTER", help=CLUSTER_HELP)] = "auto",
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
) -> None:
    """Draw one picture or clip on all ranks."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # on every rank it warns of parts that are not used here
    from cocodiff.bench.results import as_json, check_folder, write
    from cocodiff.cli import files
    from cocodiff.config import Config
    from cocodiff.launch.job import start_job
    from cocodiff.observe.trace import write_trace
    from cocodiff.wrap import wrap_instance

    config = Config(  # before local ranks start, so that a mistake is reported once
        exchange=exchange,
        schedule=schedule,
        cluster=cluster,
        cfg_degree=cfg_degree,
        ring_degree=ring_degree,
        ulysses_degree=ulysses_degree,
        transmission=transmission,
    )
    files.check(out)
    check_folder(report and report.parent)
    if ranks is not None:
        raise SystemExit(start_ranks(ranks))
    call: dict[str, Any] = dict(prompt=prompt, height=height, width=width, num_inference_steps=steps, output_type="np")
    if guidance is not None:
        call["guidance_scale"] = guidance
    if frames is not None:
        call["num_frames"] = frames
    for name, path in (("image", image), ("mask_image", mask)):
        if path is not None:
            call[name] = files.open_image(path)
    job = start_job(device)  # before loading: a rank that cannot load is then noticed by the others
    with job.watched("loading"):
        pipe = _load(model, dtype, "inpaint" if mask else "img2img" if image else "text2image")
        if frames is not None and "num_frames" not in inspect.signature(pipe.__call__).parameters:
            raise ConfigError(f"--frames: {type(pipe).__name__} draws pictures, no clips.")
        expected = _draw(pipe.to(job.device), call, seed) if compare and job.is_main else None
    wrap_instance(pipe, config, job)
    session = pipe.cocodiff.session
    if trace is None:
        picture = _draw(pipe, call, seed)
    elif session is None:
        raise ConfigError("--trace: on one rank there are no lanes to record.")
    else:
        with session.recording() as timeline:
            picture = _draw(pipe, call, seed)
        write_trace(timeline, trace, job.rank)
    if not pipe.cocodiff.is_main:
        return
    saved = files.save(picture[0], out)
    print(f"{saved}: {prompt!r} drawn by {pipe.cocodiff.world_size} rank(s) on {pipe.cocodiff.device.type}")
    call_report = pipe.cocodiff.report()
    if report is not None:
        write(report, as_json(call_report))
    if call_report["transmission"] is not None:
        sent = ", ".join(f"{share:.1%} over {level}" for level, share in call_report["share"].items())
        errors = call_report["residual_error"]["steps"]
        print(f"of an exact run's bytes {sent}; residual error of a step at most {max(errors, default=0.0):.1e}")
    if expected is not None:
        largest = float(abs(picture - expected).max())
        relative = float(((picture - expected) ** 2).sum() ** 0.5 / (expected**2).sum() ** 0.5)
        print(f"against one rank: largest difference of a pixel {largest:.1e} (of 1.0), relative error {relative:.1e}")


def _load(model: str, dtype: str, task: str) -> Any:
    """Return the pipeline that `model` names. ConfigError if there is none.

    Args:
        task: "text2image", "img2img" or "inpaint"; it selects the pipeline's class.
    """
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype} is not one of float32, bfloat16, float16.")
    if model.split(":")[0] == "tiny":
        from cocodiff.models.small import tiny_pipeline

        family = model.removeprefix("tiny").removeprefix(":") or "flux"
        if family == "wan":
            task = {"text2image": "text2video", "img2img": "image2video"}.get(task, task)
        try:
            return tiny_pipeline(family, task)
        except ValueError as error:
            raise ConfigError(f"--model {model}: {error}") from None
    if not Path(model).exists() and (model.count("/") != 1 or model[0] in "./~"):
        raise ConfigError(f"--model {model}: there is no such folder, and it is not a hub id (owner/name) either.")
    import diffusers

    if task == "text2image":
        return diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
    auto = diffusers.AutoPipelineForInpainting if task == "inpaint" else diffusers.AutoPipelineForImage2Image
    return auto.from_pretrained(model, torch_dtype=getattr(torch, dtype))


def _draw(pipe: Any, call: dict[str, Any], seed: int) -> Any:
    """Draw from noise that depends only on the seed. Return pixels in [0, 1], (1, H, W, 3) or (1, frames, H, W, 3)."""
    import torch

    result = pipe(**call, generator=torch.Generator().manual_seed(seed))
    return result.frames if hasattr(result, "frames") else result.images

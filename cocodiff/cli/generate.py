"""`cocodiff generate`: one picture or clip on all ranks."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cocodiff.cli.start import start_ranks
from cocodiff.errors import ConfigError


def generate(
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    model: Annotated[
        str, typer.Option(help="'tiny', 'tiny:sd3' (or another family), a folder of a diffusers pipeline, or a hub id.")
    ] = "tiny",
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own size if left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own size if left out.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a clip; the model's own number if left out.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 28,
    seed: int = 0,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale of the pipeline's call.")] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this picture (image to image, inpainting).")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where to paint (inpainting).")] = None,
    out: Annotated[
        Path, typer.Option(help="Where rank 0 saves it: .png and the like; .mp4 or .gif for a clip, or a folder.")
    ] = Path("out.png"),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Start so many local ranks; else join the launcher's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; tiny runs in float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, xpu; the local accelerator if left out.")] = None,
    exchange: str = "auto",
    schedule: str = "v_first",
    cluster: Annotated[
        str, typer.Option(envvar="EMULATED_CLUSTER", help="auto, a preset's name or a JSON file.")
    ] = "auto",
    transmission: Annotated[str, typer.Option(help="Over slow links: exact, high, balanced or fast.")] = "exact",
    cfg_degree: Annotated[int | None, typer.Option(min=1, help="2: a half of the ranks for each branch.")] = None,
    ring_degree: Annotated[int | None, typer.Option(min=1, help="Parts whose keys and values travel.")] = None,
    ulysses_degree: Annotated[int | None, typer.Option(min=1, help="Ranks that share a part by heads.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Record all lanes into this folder, a file a rank.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write there, as JSON, what was sent, missed and held.")] = None,
    compare: Annotated[bool, typer.Option(help="Draw on one rank, too, and say how the pictures differ.")] = False,
) -> None:
    """Draw one picture or clip on all ranks."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of parts that are not used here, per rank
    from cocodiff.bench.results import as_json, check_folder, write
    from cocodiff.cli import files
    from cocodiff.config import Config
    from cocodiff.launch.job import start_job
    from cocodiff.observe.trace import write_trace
    from cocodiff.wrap import wrap_instance

    config = Config(  # what is wrong with it is said once, by one process
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
        alone = _draw(pipe.to(job.device), call, seed) if compare and job.is_main else None
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
    account = pipe.cocodiff.report()
    if report is not None:
        write(report, as_json(account))
    if account["transmission"] is not None:
        sent = ", ".join(f"{share:.1%} over {level}" for level, share in account["share"].items())
        errors = account["residual_error"]["steps"]
        print(f"of an exact run's bytes {sent}; residual error of a step at most {max(errors, default=0.0):.1e}")
    if alone is not None:
        worst = float(abs(picture - alone).max())
        relative = float(((picture - alone) ** 2).sum() ** 0.5 / (alone**2).sum() ** 0.5)
        print(f"against one rank: largest difference of a pixel {worst:.1e} (of 1.0), relative error {relative:.1e}")


def _load(model: str, dtype: str, task: str) -> Any:
    """The tiny pipeline, or whatever diffusers pipeline `model` names."""
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
    """Pixels (1, H, W, 3) in [0, 1], or (1, frames, H, W, 3), from noise that depends on the seed alone."""
    import torch

    result = pipe(**call, generator=torch.Generator().manual_seed(seed))
    return result.frames if hasattr(result, "frames") else result.images

"""One run of `cocodiff generate` on this rank: join, check, load, draw, save, and say how long it took."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

from cocodiff.cli import files
from cocodiff.cli.figures import RUN, STEP, describe, figures
from cocodiff.cli.loading import TINY_CLIP, check_class, check_sizes, load, pipeline_class
from cocodiff.cli.request import Request
from cocodiff.cli.start import counted, dtype_named, first_line, say
from cocodiff.cli.together import on_all_ranks, this_rank
from cocodiff.errors import CocodiffError, ConfigError


class Drawing:
    """Draws what was asked for on all ranks. Every rank makes one and calls `run`, which is collective."""

    def __init__(self, request: Request) -> None:
        self.request, self.call = request, request.call | {"output_type": "np"}

    def run(self) -> None:
        """Draw, save and report. What cannot work is refused on all ranks alike, before anything is loaded.

        Raises:
            ConfigError: see `Request.check` and `cocodiff.cli.loading`; or the picture was saved elsewhere.
        """
        from cocodiff.launch.job import start_job
        from cocodiff.wrap import wrap_instance

        request, began = self.request, time.monotonic()
        if this_rank()[0] == 0:
            say("importing torch and diffusers ...")
        self.job = start_job(request.device)  # first of all, so that nobody waits for a rank that cannot go on
        with on_all_ranks(self.job, "checking the options"):
            if self.job.is_main and self.job.world_size > 1:
                request.check()
            request.check_ranks(self.job.world_size)
            if request.trace is not None:
                files.check_folder(request.trace, "--trace")
            found = pipeline_class(request)
            clip = check_class(request, found)
            if self.job.is_main:
                files.check_out(request.out, clip)
                self._say_what_comes(found, clip)
        with on_all_ranks(self.job, "loading"):
            self._quiet_bars()
            pipe = load(request, found)
            if clip and request.is_tiny:
                self.call = TINY_CLIP | self.call
            check_sizes(request, pipe, self.call)
        for name, path in (("image", request.image), ("mask_image", request.mask)):
            if path is not None:
                self.call[name] = shared_image(path, self.job)
        expected, loaded = None, time.monotonic()
        with on_all_ranks(self.job, "drawing on one rank"):
            if request.compare and self.job.is_main:
                say("drawing the reference on one rank first, for --compare ...")
                expected = self._draw(pipe.to(self.job.device))
        began += time.monotonic() - loaded  # the reference is no part of loading
        wrap_instance(pipe, request.config, self.job)
        loading = time.monotonic() - began
        if self.job.is_main:
            say(f"loaded in {loading:.1f} s{', without the reference' if request.compare else ''}")
        self._draw_and_report(pipe, expected, loading)

    def _draw_and_report(self, pipe: Any, expected: Any, loading: float) -> None:
        from cocodiff.bench.results import as_json, write
        from cocodiff.observe.timeline import Timeline
        from cocodiff.observe.trace import write_trace

        request, session = self.request, pipe.cocodiff.session
        # On an accelerator every span is an event more: only where the trace was asked for.
        recorded = session is not None and (request.trace is not None or self.job.device.type == "cpu")
        own = Timeline(self.job.device)
        with session.recording() if recorded else nullcontext() as timeline:
            with own.span(RUN, RUN):
                picture = self._draw(pipe, own)
        found = figures(own.spans(), None if timeline is None else timeline.spans())
        saved = files.save(picture[0], request.out) if self.job.is_main else None
        if request.trace is not None and timeline is not None:
            write_trace(timeline, request.trace, self.job.rank)
        if saved is None:
            return
        ranks, device = pipe.cocodiff.world_size, pipe.cocodiff.device.type
        print(f"{saved}: {request.prompt!r} drawn by {counted(ranks)} on {device}")
        print(describe(found, loading))
        report = pipe.cocodiff.report()
        if request.report is not None:
            write(request.report, as_json(report))
        if report["transmission"] is not None:
            sent = ", ".join(f"{share:.1%} over {level}" for level, share in report["share"].items())
            errors = report["residual_error"]["steps"]
            print(f"of an exact run's bytes {sent}; residual error of a step at most {max(errors, default=0.0):.1e}")
        if expected is not None:
            print(_difference(picture, expected))

    def _draw(self, pipe: Any, timeline: Any = None) -> Any:
        """Draw from noise that depends only on the seed.

        Returns:
            Pixels in [0, 1], `(1, H, W, 3)` or `(1, frames, H, W, 3)`.

        Raises:
            ConfigError: diffusers refused the call, or the memory does not suffice.
        """
        import inspect

        import torch

        call = dict(self.call)

        def step_ended(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            with timeline.span(STEP, STEP):
                return kept

        if timeline is not None and "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
            call["callback_on_step_end"] = step_ended
        try:
            result = pipe(**call, generator=torch.Generator().manual_seed(self.request.seed))
        except CocodiffError:
            raise
        except ValueError as error:
            raise ConfigError(f"{type(pipe).__name__}: {first_line(error)} --verbose says where.") from error
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            text = "the memory of a rank does not suffice: draw a smaller picture, or on more ranks"
            raise ConfigError(f"{text} ({first_line(error)})") from error
        return result.frames if hasattr(result, "frames") else result.images

    def _say_what_comes(self, found: type, clip: bool) -> None:
        request, job = self.request, self.job
        if request.is_tiny and request.dtype is not None and dtype_named(request.dtype) != request.dtype_name:
            say(f"--dtype {request.dtype} is not used: tiny pipelines run in {request.dtype_name}.")
        where = f"{counted(job.world_size)} on {job.device.type}" + (f", {job.backend}" if job.world_size > 1 else "")
        say(f"loading {request.model} ({found.__name__}) in {request.dtype_name} for {where} ...")
        if not request.is_tiny:
            return
        if request.model not in ("tiny", "tiny:flux"):
            say(f"{request.model} has random weights: expect coloured noise. Only `--model tiny` was trained.")
            return
        from cocodiff.tiny.pictures import all_scenes

        known = sorted({word for scene in all_scenes() for word in scene.caption.split()})
        strange = [word for word in dict.fromkeys(request.prompt.lower().split()) if word not in known]
        say(f"tiny knows these words: {', '.join(known)}" + (f"; not {', '.join(strange)}" if strange else ""))

    def _quiet_bars(self) -> None:
        if not self.job.is_main:
            from diffusers.utils import logging

            logging.disable_progress_bar()


def shared_image(path: Any, job: Any) -> Any:
    """Return rank 0's picture on all ranks; only its host needs the file. Collective."""
    import torch
    import torch.distributed as dist
    from PIL import Image

    from cocodiff.launch.agree import gather_json

    with on_all_ranks(job, "reading a picture"):
        picture = files.open_image(path, "the picture") if job.is_main else None
    if job.host_group is None:
        return picture
    with job.watched("sharing a picture"):
        width, height = gather_json(None if picture is None else picture.size, job.host_group)[0]
        pixels = torch.empty(height, width, 3, dtype=torch.uint8)
        if picture is not None:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)
        dist.broadcast(pixels, group=job.host_group, group_src=0)
    return Image.fromarray(pixels.numpy())


def _difference(picture: Any, expected: Any) -> str:
    largest = float(abs(picture - expected).max())
    relative = float(((picture - expected) ** 2).sum() ** 0.5 / max((expected**2).sum() ** 0.5, 1e-30))
    return f"against one rank: largest difference of a pixel {largest:.1e} (of 1.0), relative error {relative:.1e}"

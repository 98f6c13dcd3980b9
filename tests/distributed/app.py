"""A user's script, as the launcher tests start it: `python app.py MODE FOLDER`."""

import sys
import time
from pathlib import Path

import torch

from tests.pipelines import flux_call, flux_pipeline, relative_error


def main(mode: str, folder: Path) -> None:
    import cocodiff

    torch.set_num_threads(1)
    if mode == "existing":
        torch.distributed.init_process_group("gloo")
    pipe = flux_pipeline()
    call = flux_call("text2image")
    alone = pipe(**call).images
    pipe = cocodiff.wrap(pipe)
    job = pipe.cocodiff.job
    if mode == "fail":

        def fail(pipe, step, timestep, kwargs):
            if step == 1 and job.rank == 1:
                raise OSError("the disk of one rank is full")
            return kwargs

        call["callback_on_step_end"] = fail
    if mode == "differ":
        call["guidance_scale"] = 1.0 + job.rank
    if mode == "interrupt":

        def stop(pipe, step, timestep, kwargs):
            pipe._interrupt = job.rank == 0
            return kwargs

        call["callback_on_step_end"] = stop
    latents = pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images
    if mode == "interrupt" and job.rank == 0:
        time.sleep(25)  # rank 0 goes on with something else, and rank 1 waits for it in the transformer
    error = relative_error(latents, alone)
    (folder / f"{job.rank}").write_text(f"{job.world_size} {job.launcher} {error}")
    if mode == "existing":
        assert torch.distributed.is_initialized()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

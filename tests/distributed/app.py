"""A user's script, as the launcher tests start it: `python app.py MODE FOLDER`."""

import sys
import time
from pathlib import Path

import torch

from tests.pipelines import flux_call, flux_pipeline, relative_error


def main(mode: str, folder: Path) -> None:
    """Draw with and without cocodiff and write how the pictures differ. One rank fails where the mode says "fail"."""
    import cocodiff

    torch.set_num_threads(1)
    pipe = flux_pipeline()
    call = flux_call("text2image")
    expected = pipe(**call).images
    pipe = cocodiff.wrap(pipe)
    job = pipe.cocodiff.job
    job.guard._grace_seconds = 1.0
    if mode == "fail":

        def fail(pipe, step, timestep, kwargs):
            if step == 1 and job.rank == 1:
                raise OSError("the disk of one rank is full")
            return kwargs

        call["callback_on_step_end"] = fail
    latents = pipe(**{**call, "generator": torch.Generator().manual_seed(1)}).images
    error = relative_error(latents, expected)
    (folder / f"{job.rank}").write_text(f"{job.world_size} {job.launcher} {error}")
    with job.watched("the rest of the script"):  # rank 0, whose store others use, ends first: that ends nobody
        time.sleep(3.5 * job.rank)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""A user's script, as the launcher tests start it: `python app.py MODE FOLDER`."""

import sys
import time
from pathlib import Path

import torch


def fail():
    raise OSError("the disk of one rank is full")


def picture(folder: Path) -> None:
    """Draw with and without cocodiff and write how the pictures differ. Then one rank fails in another call."""
    import cocodiff
    from tests.pipelines import flux_call, flux_pipeline, relative_error

    torch.set_num_threads(1)
    pipe = flux_pipeline()
    expected = pipe(**flux_call("text2image")).images
    pipe = cocodiff.wrap(pipe)
    job = pipe.cocodiff.job
    job.guard._grace_seconds = 1.0
    error = relative_error(pipe(**flux_call("text2image")).images, expected)
    (folder / f"{job.rank}").write_text(f"{job.world_size} {job.launcher} {error}")
    pipe(
        **flux_call("text2image"),
        callback_on_step_end=lambda pipe, step, *_: {} if step < 1 or job.rank == 0 else fail(),
    )


def plain(folder: Path, fails: bool) -> None:
    """Ranks without a pipeline, which start sooner. Rank 0, whose store others use, ends first: that ends nobody."""
    from cocodiff.launch.job import start_job

    job = start_job("cpu")
    job.guard._grace_seconds = 1.0
    with job.watched("the script"):
        total = torch.ones(1)
        torch.distributed.all_reduce(total, group=job.host_group)
        (folder / f"{job.rank}").write_text(f"{job.world_size} {job.launcher} {int(total)}")
        if fails and job.rank == 1:
            fail()
        if fails:
            torch.distributed.barrier(group=job.host_group)
        time.sleep(3.5 * job.rank)


if __name__ == "__main__":
    mode, folder = sys.argv[1], Path(sys.argv[2])
    picture(folder) if mode == "picture" else plain(folder, fails=mode == "fail")

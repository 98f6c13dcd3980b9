"""The simulation of selective runs in one process, with which their quality is measured, draws what real ranks draw."""

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_selective import _cluster, budget, shared
from tests.pipelines import relative_error

CAPTION, SIDE = "a red circle above a blue square on a white background", 32
STEPS = 8


def _simulated():
    """The pictures after each step: of an exact run, and of simulated ones by `ring` with their shares."""
    from benchmarks.quality.simulate import Hosts, Simulation
    from cocodiff.config import Selective
    from cocodiff.models.small import tiny_pipeline

    found = {}
    for ring in (False, True):
        pipe = tiny_pipeline()
        selective = Selective(budget=budget(1 / 16, STEPS))
        simulation = Simulation(selective, Hosts(ring=ring), {"text": 16, "image": SIDE * SIDE // 16}, STEPS)
        with simulation.around(pipe.transformer):
            found[ring] = _drawn(pipe), simulation.sent / simulation.exact
    return _drawn(tiny_pipeline()), found


def _drawn(pipe):
    import torch

    pipe.set_progress_bar_config(disable=True)
    steps, generator = [], torch.Generator().manual_seed(0)

    def keep(pipe, step, time, tensors):
        steps.append(tensors["latents"].clone())
        return {}

    pipe(
        CAPTION, height=SIDE, width=SIDE, num_inference_steps=STEPS, generator=generator, output_type="latent",
        callback_on_step_end=keep,
    )  # fmt: skip
    return steps


def _real():
    """The same by `ring` on real ranks."""
    import cocodiff
    from cocodiff import Selective
    from cocodiff.models.small import tiny_pipeline

    found = {}
    for ring in (False, True):
        pipe = cocodiff.wrap(
            tiny_pipeline(),
            cluster=_cluster(2, 2, 10.0),
            transmission=Selective(budget=budget(1 / 32, STEPS)),
            ring_degree=2 if ring else 1,
        )
        found[ring] = _drawn(pipe), shared(pipe.cocodiff.report())
    return found


def test_real_ranks_draw_what_the_simulation_draws():
    """The simulation counts against two bytes an element; the ranks send four: the same bits are half the share."""
    exact, simulations = run_ranks(1, _simulated)[0]

    def differences(drawn, other):
        return [relative_error(*pair) for pair in zip(drawn, other, strict=True)]

    for found in run_ranks(4, _real):
        for ring, (drawn, share) in found.items():
            played, played_share = simulations[ring]
            assert share / played_share == pytest.approx(0.5, rel=1e-3)
            difference, real, simulated = (
                differences(drawn, played),
                differences(drawn, exact),
                differences(played, exact),
            )
            # Sums are rounded in another order, and that decides a code here and there: MEASURED in the simulation
            # alone, a change of 1e-6 of the noise grows to most of what is missed in 24 steps. So the first steps must
            # agree ...
            assert difference[0] < simulated[0] / 10 and difference[2] < simulated[2] / 4, (ring, difference, simulated)
            assert 0.7 < real[-1] / simulated[-1] < 1.4, (ring, real, simulated)  # ... and what is missed in the end

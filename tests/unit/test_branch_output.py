"""The output of a first branch: views may be taken, and are filled; whoever reads it before that gets an error."""

import contextlib

import pytest
import torch

from cocodiff.errors import PatchError
from cocodiff.pipeline.branch_output import BranchOutput

READING = {
    "plus": lambda x: x + 1,
    "cat": lambda x: torch.cat([x, x]),
    "stack in a tuple": lambda x: torch.stack((torch.zeros(2, 6), x)),
    "clone": lambda x: x.clone(),
    "cast": lambda x: x.double(),
    "in place": lambda x: x.mul_(2),
    "written to": lambda x: x.__setitem__(0, 1.0),
    "by another": lambda x: torch.zeros(2, 6).add_(x),
    "out": lambda x: torch.add(torch.zeros(2, 6), 1, out=x),
    "item": lambda x: x[0, 0].item(),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "max": lambda x: x.max(dim=0),
    "where": lambda x: torch.where(x > 0, 1, 0),
    "a view": lambda x: x[:, 2:] * 2,
}


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize("name", READING)
def test_reading_is_refused_until_it_is_filled(name, mode):
    with mode(), torch.no_grad():
        memory = torch.full((2, 6), float("nan"))
        x = BranchOutput.of(memory)
        with pytest.raises(PatchError, match="expected two calls"):
            READING[name](x)
        x.settle()
        READING[name](memory)  # a plain tensor does all of it


def test_views_are_filled_and_become_plain():
    memory = torch.full((2, 6), float("nan"))
    x = BranchOutput.of(memory)
    views = [x[:, :3], *x.chunk(2), x.unsqueeze(0)[0], x.to(torch.float32), x.view(12), x.transpose(0, 1)]
    assert x.shape == (2, 6) and x.dtype == torch.float32 and x.device.type == "cpu" and len(x) == 2
    memory.copy_(torch.arange(12.0).view(2, 6))
    assert type(x.settle()) is torch.Tensor and all(type(view) is torch.Tensor for view in views)
    assert torch.equal(x, memory) and torch.equal(views[0], memory[:, :3]) and (x + 1).sum() == 78

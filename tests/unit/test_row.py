"""What was handed on to the next block is used for just the tensors that it was made of."""

import torch

from cocodiff.blocks import RowForward, _versions


class _Flight:
    def __init__(self):
        self.dropped = False

    def drop(self):
        self.dropped = True


def _taken(change):
    x, y = torch.ones(2), torch.ones(3)
    row, flight = RowForward([], {}, None), _Flight()
    row._handed = 1, [x, y, None], _versions([x, y, None]), flight
    return row._take(1, change(x, y)), flight


def test_the_same_tensors_are_taken():
    taken, flight = _taken(lambda x, y: [x, y, None])
    assert taken is flight and not flight.dropped


def test_others_and_those_that_were_written_to_are_not():
    for change in (
        lambda x, y: [x.clone(), y, None],
        lambda x, y: [x, y.add_(1), None],
        lambda x, y: [x, y, 1],
        lambda x, y: [x, y],
    ):
        taken, flight = _taken(change)
        assert taken is None and flight.dropped

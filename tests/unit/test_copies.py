"""What both ends hold when a scheduler goes back in time between two exchanges."""

import torch

from cocodiff.selective.copies import Held

ALL = slice(None)


def test_the_speed_keeps_its_sign_when_time_goes_back():
    held = Held.nothing(2, 4, 0.0, ((2, (0, 1)),), torch.zeros(1))
    for time, value in ((0.0, 1.0), (1.0, 3.0), (0.5, 2.0)):
        held.update(ALL, torch.full((2, 4), value), held.predict(ALL, time, 1.0)[0], time)
        held.time = time
    assert (held.velocity == 2.0).all(), "one less, half a step earlier"
    assert (held.predict(ALL, 1.0, 1.0)[1] == 3.0).all()

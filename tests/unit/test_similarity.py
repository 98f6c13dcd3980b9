"""What is held, and what is predicted from it, in the scheduler's time."""

import torch

from cocodiff.selective.copies import Copies, CopyKey, Held

ALL = slice(None)


def _held_after(*values_at):
    """Held rows after whole exchanges of (time, value)."""
    held = Held.nothing(2, 4, values_at[0][0], ((2, (0, 1)),), torch.zeros(1))
    for time, value in values_at:
        before, _ = held.predict(ALL, time, 1.0)
        held.update(ALL, torch.full((2, 4), value), before, time)
        held.time = time
    return held


def test_rows_are_predicted_to_go_on_as_fast_as_they_went():
    held = _held_after((0.0, 1.0), (1.0, 3.0))
    assert (held.predict(ALL, 2.0, 1.0)[1] == 5.0).all() and (held.predict(ALL, 1.5, 1.0)[1] == 4.0).all()
    assert (held.predict(ALL, 2.0, 0.5)[1] == 4.0).all() and (held.predict(ALL, 2.0, 0.0)[1] == 3.0).all()


def test_what_was_skipped_ages_and_its_speed_is_by_step():
    held = _held_after((0.0, 1.0), (4.0, 3.0))  # three steps without an exchange
    assert (held.velocity == 0.5).all() and (held.predict(ALL, 6.0, 1.0)[1] == 4.0).all()


def test_a_scheduler_that_stands_still_or_goes_back():
    held = _held_after((0.0, 1.0), (1.0, 3.0), (1.0, 3.5))
    assert (held.velocity == 2.0).all(), "no time has passed: the speed is that from before"
    assert (held.predict(ALL, 1.0, 1.0)[1] == 3.5).all() and (held.predict(ALL, 0.5, 1.0)[1] == 2.5).all()


def test_what_changed_in_a_moment_says_little_of_a_step():
    held = _held_after((0.0, 1.0), (1.0, 3.0), (1.0 + 2**-20, 3.5))
    assert (held.velocity == 4.0).all(), "not a million times the change"


def test_rows_that_were_not_sent_stay():
    held, one = _held_after((0.0, 1.0), (1.0, 3.0)), torch.tensor([1])
    held.update(one, torch.full((1, 4), 9.0), held.predict(one, 2.0, 1.0)[0], 2.0)
    assert (held.value[0] == 3.0).all() and (held.velocity[0] == 2.0).all()
    assert (held.value[1] == 9.0).all() and (held.velocity[1] == 6.0).all()


def test_copies_of_a_branch_are_forgotten_and_hashes_tell_bits_apart():
    copies, other = Copies(), Copies()
    for one, end, value in ((copies, "send", 3.0), (other, "receive", 3.0)):
        one.put(CopyKey(0, 0, "v", end, "0"), _held_after((0.0, 1.0), (1.0, value)))
    assert copies.digests("send") == other.digests("receive") and not copies.digests("receive")
    other.get(CopyKey(0, 0, "v", "receive", "0")).velocity[0, 0] += 1
    assert copies.digests("send") != other.digests("receive")
    assert copies.held_bytes == 2 * 4 * 2 * 2 and copies.get(CopyKey(0, 0, "v", "receive", "0")) is None
    copies.forget(1)
    assert copies.held_bytes
    copies.forget(0)
    assert copies.held_bytes == 0

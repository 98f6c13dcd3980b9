"""Turns a started process into a rank of a run: discovery, device, backend, joining, agreeing, and ending together."""

from cocodiff.launch.backend import choose_backend, local_device
from cocodiff.launch.guard import Guard
from cocodiff.launch.join import check_backend, join
from cocodiff.launch.ranks import Ranks, discover

__all__ = ["Guard", "Ranks", "check_backend", "choose_backend", "discover", "join", "local_device"]

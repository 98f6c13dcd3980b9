"""Which device and which backend a rank gets, and errors that name their cure."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from cocodiff.errors import LaunchError
from cocodiff.launch import Ranks, backend, choose_backend, local_device
from cocodiff.launch.backend import serves

ONE = Ranks(0, 0, 1, 1, "none")
TWO = Ranks(1, 1, 2, 2, "pmi")


def test_local_device_on_the_cpu():
    assert local_device("cpu", TWO) == torch.device("cpu")
    assert local_device(torch.device("cpu", 0), ONE) == torch.device("cpu")


def test_local_device_takes_what_torch_finds(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert local_device(None, TWO) == torch.device("cpu")
    chosen = fake_devices(monkeypatch, 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    assert local_device(None, TWO) == torch.device("xpu", 1)
    assert chosen == [1]


def fake_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    chosen: list[int] = []
    api = SimpleNamespace(set_device=chosen.append)
    monkeypatch.setattr(backend, "_visible_devices", lambda device_type: (api, count))
    return chosen


@pytest.mark.parametrize(
    ("requested", "local_rank", "count", "index"),
    [("cuda", 5, 8, 5), ("cuda", 5, 4, 1), ("cuda:0", 3, 4, 3), ("cuda", 5, 1, 0), ("xpu:7", 2, 1, 0)],
)
def test_local_device_follows_the_local_rank(requested, local_rank, count, index, monkeypatch):
    chosen = fake_devices(monkeypatch, count)
    device = local_device(requested, Ranks(3 + local_rank, local_rank, 16, 8, "pmi"))
    assert device == torch.device(requested.split(":")[0], index)
    assert chosen == [index]


def test_a_group_that_no_launcher_described_gives_each_rank_a_device(monkeypatch):
    chosen = fake_devices(monkeypatch, 4)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    assert local_device("cuda", ONE).index == 1 and chosen == [1]


def test_the_devices_that_a_script_chose_are_kept_where_it_chose_on_every_rank_of_a_host(monkeypatch):
    hosts = ["a", "a", "b", "b", "c", "c", "d"]
    current = [1, 0, 0, 0, None, 1, 2]
    assert backend.chosen_indices(hosts, current) == [1, 0, None, None, None, None, 2]
    chosen = fake_devices(monkeypatch, 4)
    assert local_device("cuda", Ranks(0, 0, 2, 2, "none"), chosen=3).index == 3 and chosen == [3]


def test_ranks_that_would_share_a_device_are_named(monkeypatch):
    four = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(backend, "_visible_devices", lambda device_type: (four, 4))
    names = [backend.device_name(torch.device("cuda", rank % 4), {}) for rank in range(5)]
    assert "ranks 0, 4 (GPU-0)" in backend.shared_devices([("host", name) for name in names])
    assert backend.shared_devices([(f"host {rank // 4}", name) for rank, name in enumerate(names)]) == ""
    assert backend.device_name(torch.device("cuda", 0), {"COCODIFF_SHARE_DEVICES": "1"}) is None
    assert backend.device_name(torch.device("cpu"), {}) is None
    assert backend.device_name(torch.device("xpu", 1), {}) == "xpu:1 of 4"
    monkeypatch.setattr(backend, "_visible_devices", lambda device_type: (SimpleNamespace(), 1))
    assert backend.device_name(torch.device("xpu", 0), {}) is None  # each rank is shown one: perhaps its own


def test_a_single_rank_keeps_the_index_it_asked_for(monkeypatch):
    chosen = fake_devices(monkeypatch, 4)
    assert local_device("cuda:2", ONE).index == 2
    assert local_device("cuda", ONE).index == 0
    assert chosen == [2, 0]
    with pytest.raises(LaunchError, match="'cuda:4' was requested, but 4 are visible: 0 to 3"):
        local_device("cuda:4", ONE)


def test_local_device_errors(monkeypatch):
    with pytest.raises(LaunchError, match="'gpu' is no torch device"):
        local_device("gpu", ONE)
    fake_devices(monkeypatch, 0)
    with pytest.raises(LaunchError, match="'cuda' was requested, but torch .* sees none"):
        local_device("cuda", ONE)


def available(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in ("gloo", "nccl", "xccl", "mpi"):
        monkeypatch.setattr(dist, f"is_{name}_available", lambda found=name in names: found)


@pytest.mark.parametrize(
    ("device_type", "names", "chosen"),
    [
        ("cpu", ["gloo", "mpi"], "gloo"),
        ("cpu", ["mpi"], "mpi"),
        ("cuda", ["gloo", "nccl"], "nccl"),
        ("xpu", ["gloo", "xccl"], "xccl"),
    ],
)
def test_choose_backend(device_type, names, chosen, monkeypatch):
    available(monkeypatch, *names)
    name, why = choose_backend(device_type)
    assert name == chosen and why
    assert serves(name, device_type)


@pytest.mark.parametrize(
    ("device_type", "names", "words"),
    [
        ("cpu", [], "neither"),
        ("cuda", ["gloo"], "no nccl"),
        ("xpu", ["gloo"], "no xccl"),
        ("mps", ["gloo"], "'mps'"),
    ],
)
def test_choose_backend_never_falls_back_silently(device_type, names, words, monkeypatch):
    available(monkeypatch, *names)
    with pytest.raises(LaunchError, match=words):
        choose_backend(device_type)

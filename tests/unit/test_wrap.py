"""What wrap says on one rank, and of what it cannot take."""

from __future__ import annotations

import pytest
import torch

import cocodiff
from cocodiff.errors import ConfigError
from cocodiff.launch.job import Job
from cocodiff.wrap import _say_one_rank
from tests.pipelines import flux_pipeline
from tests.unit.test_launch_devices import fake_devices


def test_one_rank_among_several_devices_says_that_the_launcher_was_forgotten(monkeypatch, caplog):
    def said(launcher: str, device: str, count: int) -> tuple[str, str]:
        fake_devices(monkeypatch, count)
        caplog.clear()
        with caplog.at_level("INFO", "cocodiff"):
            _say_one_rank(Job(0, 1, torch.device(device), launcher, ("host",)))
        [record] = caplog.records
        return record.levelname, record.getMessage()

    level, words = said("none", "cuda:0", 8)
    assert level == "WARNING" and "8 cuda devices are visible" in words and "torchrun --nproc-per-node 8" in words
    for launcher, device, count in (("none", "cuda:0", 1), ("torchrun", "cuda:0", 8), ("none", "cpu", 1)):
        level, words = said(launcher, device, count)
        said_by = launcher.replace("none", "no launcher")
        assert level == "INFO" and f"one rank on {device}, started by {said_by}" in words


def test_wrap_on_one_rank_says_so_once(caplog):
    with caplog.at_level("INFO", "cocodiff"):
        cocodiff.unwrap(cocodiff.wrap(flux_pipeline(), device="cpu"))
    words = [record.getMessage() for record in caplog.records if record.name == "cocodiff.wrap"]
    assert len(words) == 1 and "one rank on cpu" in words[0]


def test_a_part_of_a_pipeline_is_refused_by_its_type():
    with pytest.raises(ConfigError, match="not an object of type Linear: load it first.*give the whole pipeline"):
        cocodiff.wrap(torch.nn.Linear(2, 2))


def test_a_setting_of_another_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"exchnage \(did you mean exchange\?\), zzz. There are exchange, .*device"):
        cocodiff.wrap(None, exchnage="flat", zzz=1)
    with pytest.raises(ConfigError, match=r"devise \(did you mean device\?\)"):
        cocodiff.wrap(None, devise="cpu")

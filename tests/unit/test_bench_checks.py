"""What a bench looks at before and after it runs: memory, doubtful timings, nothing that ran."""

from types import SimpleNamespace
from typing import Any

import pytest

from cocodiff.bench import memory, results
from cocodiff.bench.models import build_transformer
from cocodiff.bench.run import _beyond, run_bench
from cocodiff.bench.shapes import SHAPES
from cocodiff.cli.asked import Asked
from cocodiff.errors import ConfigError
from cocodiff.launch.job import start_job
from cocodiff.models import FAMILIES
from cocodiff.models.shapes import Shape


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_weights_are_counted_without_memory_for_them(family):
    shape = Shape("small", family, 2, 1 if family.startswith("flux") else 0, 2, 16, 3, 6)
    assert memory.weight_count(shape) == sum(p.numel() for p in build_transformer(shape).parameters())


def test_a_whole_flux_is_refused_where_it_does_not_fit(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 24000000 kB\n")
    assert memory.free_bytes() == 24_000_000 * 1024
    (tmp_path / "memory.max").write_text("9000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert memory.free_bytes() == 8_000_000_000
    (tmp_path / "memory.max").write_text("max\n")
    job: Any = SimpleNamespace(hosts=("a", "a", "b"), rank=0, device=SimpleNamespace(type="cpu"))
    with pytest.raises(ConfigError, match=r"2 rank.* need about 9\d.* GB .* 24.6 GB are free: .* --scale"):
        memory.check_memory(SHAPES["flux-dev"], job, 4)
    memory.check_memory(SHAPES["flux-dev"].scaled(1 / 64), job, 4)


def test_many_tokens_need_memory_too():
    shape = Asked("flux-dev", tokens=2**24).model()
    assert memory.needed_bytes(0, shape, 2) > 2**24 * shape.width * 4


@pytest.mark.parametrize("name, torch_name", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_types_have_the_names_that_people_use(name, torch_name):
    assert Asked("flux-dev", dtype=name).model().dtype == torch_name


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_heads_that_no_model_has_are_one_line():
    with pytest.raises(ConfigError, match="cannot be made with 24 heads x 0"):
        memory.weight_count(Shape("odd", "flux", 1, 1, 24, 0, 32, 32))


def _row(low, median, high, share=None):
    seconds = {"min": low, "median": median, "max": high}
    return {"seconds_per_step": seconds, "communication_share": share}


def test_timings_that_noise_decides_are_said():
    quiet = {"compute_seconds": 0.9, "methods": {"ulysses": _row(1.0, 1.1, 1.2), "exact": {"error": "x"}}}
    assert results.doubts(quiet) == []
    wide, slow = results.doubts(
        {"compute_seconds": 2.0, "methods": {"ulysses": _row(1.0, 1.5, 1.7), "single": _row(1.0, 1.0, 1.0)}}
    )
    assert "ulysses took 1.000 to 1.700 s" in wide and "differ by more than 50%" in wide
    assert "compute alone took 2.000 s, longer than ulysses" in slow and "single" not in slow


def test_no_share_is_negative():
    assert _beyond(1.21, 1.0) is None and _beyond(None, 1.0) is None and _beyond(0.5, 1.0) == 0.5


def test_where_no_method_runs_the_rows_say_why(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    shape = Shape("small", "flux", 1, 1, 2, 8, 4, 8)
    result = run_bench(shape, ("exact",), start_job("cpu"), "auto", 1, 2, lambda text: None)
    assert "one rank has nothing to exchange" in result["methods"]["exact"]["error"]
    assert "does not run" in results.table(result) and results.doubts(result) == []

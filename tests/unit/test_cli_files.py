"""What was drawn is saved: by its suffix, or elsewhere where that is impossible."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocodiff.cli import files
from cocodiff.errors import CocodiffError, ConfigError

PIXELS = np.linspace(0, 1, 16 * 16 * 3).reshape(16, 16, 3)


@pytest.mark.parametrize("clip", [False, True])
def test_what_was_drawn_is_not_lost_to_a_bad_path(monkeypatch, tmp_path, clip):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pixels = np.stack([PIXELS] * 2) if clip else PIXELS
    with pytest.raises(ConfigError, match="could not be written .*; what was drawn is in ") as caught:
        files.save(pixels, tmp_path / "gone" / ("x.gif" if clip else "x.png"))
    where = Path(str(caught.value).split("what was drawn is in ")[1].removesuffix("."))
    frame = where / "0001.png" if clip else where
    assert np.abs(np.asarray(Image.open(frame)) / 255 - PIXELS).max() < 1 / 255


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_was_drawn_is_not_lost_to_a_full_disk(monkeypatch, tmp_path):
    (tmp_path / "full.png").symlink_to("/dev/full")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))  # full, too: the home comes next
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=f"No space left on device.*{tmp_path}"):
        files.save(PIXELS, tmp_path / "full.png")
    assert len(list(tmp_path.glob("cocodiff-*/full.png"))) == 1


def test_a_picture_is_saved_by_the_suffix_and_a_clip_as_frames(tmp_path):
    assert files.save(PIXELS, tmp_path / "a.jpg") == tmp_path / "a.jpg"
    assert files.save(PIXELS, tmp_path / "b") == tmp_path / "b.png"
    assert len(list(files.save(np.stack([PIXELS] * 3), tmp_path / "c.png").iterdir())) == 3
    for clip, name in ((False, "x.gif"), (False, "x.mp4"), (False, "c")):
        with pytest.raises(CocodiffError, match="draws a picture|is a folder"):
            files.check_out(tmp_path / name, clip)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.png", "c"]

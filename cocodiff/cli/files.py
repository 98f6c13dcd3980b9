"""Reading pictures, and writing pictures and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cocodiff.errors import ConfigError

FRAMES_PER_SECOND = 16
CLIPS = (".mp4", ".gif")


def open_image(path: Path) -> Any:
    """Return the picture as RGB. ConfigError if there is none."""
    from PIL import Image

    if not path.is_file():
        raise ConfigError(f"there is no picture {path}.")
    return Image.open(path).convert("RGB")


def check(out: Path) -> None:
    """Raise ConfigError, before anything is drawn, if `save` could not write there."""
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}.")
    if out.suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"--out {out}: mp4 needs imageio-ffmpeg, which brings its encoder: pip install 'cocodiff[video]'. "
                ".gif and a folder of frames do without."
            ) from None


def save(pixels: Any, out: Path) -> Path:
    """Save a picture `(H, W, 3)` or a clip `(frames, H, W, 3)`, in [0, 1], and return where it was written.

    A clip becomes a .mp4 or .gif file. With any other suffix it becomes a folder of frames, whose name is `out`
    without the suffix.
    """
    from PIL import Image

    frames = (pixels.clip(0, 1) * 255).round().astype("uint8")
    if frames.ndim == 3:
        if out.suffix in CLIPS or not out.suffix:
            out = out.with_suffix(".png")
        Image.fromarray(frames).save(out)
        return out
    if out.suffix == ".mp4":
        import imageio_ffmpeg

        height, width = frames.shape[1:3]
        writer = imageio_ffmpeg.write_frames(str(out), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2)
        writer.send(None)  # starts the encoder
        for frame in frames:
            writer.send(frame.tobytes())
        writer.close()
        return out
    pictures = [Image.fromarray(frame) for frame in frames]
    if out.suffix == ".gif":
        pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=1000 / FRAMES_PER_SECOND, loop=0)
        return out
    folder = out.with_suffix("")
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index:04d}.png")
    return folder

"""Reading pictures, writing pictures and clips, and the check that what a command will write can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from cocodiff.errors import ConfigError

FRAMES_PER_SECOND = 16
CLIPS = (".mp4", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def open_image(path: Path, option: str) -> Any:
    """Return the whole picture as RGB. ConfigError, with the option's name, if there is none."""
    from PIL import Image

    if not exists(path) or not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file.")
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # Pillow has a different error for each way in which a file is broken
        words = str(error).split("\n")[0] or type(error).__name__
        raise ConfigError(f"{option} {path}: this is no picture that Pillow can read ({words}).") from None


def exists(path: Path) -> bool:
    """Whether there is such a file or folder."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def check_out(out: Path, clip: bool | None = None) -> None:
    """Raise ConfigError, before anything is drawn, if `save` could not write there.

    Args:
        clip: whether a clip or a picture will be saved; None if that is not known yet.
    """
    if not out.name or out.name.startswith("."):
        raise ConfigError(f"--out {str(out)!r} is no name of a file: write out.png.")
    suffix = out.suffix.lower()
    if suffix not in (*PICTURES, *CLIPS, ""):
        raise ConfigError(
            f"--out {out}: there is no format {suffix}. Pictures: {', '.join(PICTURES)}; clips: {', '.join(CLIPS)}."
        )
    if clip is False and suffix in CLIPS:
        raise ConfigError(f"--out {out}: this model draws a picture, no clip. Pictures: {', '.join(PICTURES)}.")
    if suffix == ".mp4":
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"--out {out}: mp4 needs imageio-ffmpeg, which brings its encoder: pip install 'cocodiff[video]'. "
                ".gif and a folder of frames do without."
            ) from None
    if clip is False and out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file, such as {out / 'out.png'}.")
    if not exists(out.parent):
        raise ConfigError(f"--out {out}: there is no folder {out.parent}.")
    if clip is None:
        check_folder(out.parent, "--out")
    elif clip and suffix not in CLIPS:
        check_folder(_frames_folder(out), "--out")
    else:
        check_file(_named(out), "--out")


def check_file(path: Path, option: str) -> None:
    """Raise ConfigError if no file can be written there. What is there stays as it is."""
    if not path.name:
        raise ConfigError(f"{option} {str(path)!r} is no name of a file.")
    try:
        new = not os.path.lexists(path)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except FileNotFoundError:
        raise ConfigError(f"{option} {path}: there is no folder {path.parent}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: cannot be written ({_reason(error)}).") from None


def check_folder(path: Path, option: str) -> None:
    """Make the folder. ConfigError if no files can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: cannot write into this folder ({_reason(error)}).") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def save(pixels: Any, out: Path) -> Path:
    """Save a picture `(H, W, 3)` or a clip `(frames, H, W, 3)`, in [0, 1], and return where it was written.

    A clip becomes a .mp4 or .gif file. With any other suffix it becomes a folder of frames, whose name is `out`
    without the suffix. What cannot be written there goes into a new folder elsewhere.

    Raises:
        ConfigError: it could not be written there; the words say where it is, or that nothing could be written.
    """
    frames = (pixels.clip(0, 1) * 255).round().astype("uint8")
    try:
        return _write(frames, out)
    except Exception as error:  # of the system, of Pillow or of the encoder: the picture is what counts
        rescued = _rescue(frames, out)
        where = f"what was drawn is in {rescued}" if rescued else "nor anywhere else: what was drawn is lost"
        raise ConfigError(f"--out {out}: could not be written ({_reason(error)}); {where}.") from error


def _rescue(frames: Any, out: Path) -> Path | None:
    """Write it as PNG into a new folder, of the first place that takes it: temporary files, home, here."""
    for place in (tempfile.gettempdir, Path.home, Path.cwd):
        try:
            return _write(frames, Path(tempfile.mkdtemp(prefix="cocodiff-", dir=place())) / f"{out.stem[:60]}.png")
        except Exception:
            continue
    return None


def _named(out: Path) -> Path:
    return out if out.suffix else out.with_suffix(".png")


def _frames_folder(out: Path) -> Path:
    return out.with_suffix("")


def _write(frames: Any, out: Path) -> Path:
    from PIL import Image

    if frames.ndim == 3:
        out = _named(out)
        Image.fromarray(frames).save(out)
        return out
    if out.suffix.lower() == ".mp4":
        import imageio_ffmpeg

        height, width = frames.shape[1:3]
        writer = imageio_ffmpeg.write_frames(str(out), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=2)
        writer.send(None)  # starts the encoder
        for frame in frames:
            writer.send(frame.tobytes())
        writer.close()
        if out.stat().st_size == 0:
            raise OSError("the encoder wrote nothing")
        return out
    pictures = [Image.fromarray(frame) for frame in frames]
    if out.suffix.lower() == ".gif":
        pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=1000 / FRAMES_PER_SECOND, loop=0)
        return out
    folder = _frames_folder(out)
    folder.mkdir(exist_ok=True)
    for index, picture in enumerate(pictures):
        picture.save(folder / f"{index:04d}.png")
    return folder

"""Films and contact sheets of episodes, by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from .errors import EvalError

Frame = npt.NDArray[np.uint8]


def captioned(frame: Frame, text: str) -> Image.Image:
    """The frame with a line of text under it."""
    height, width = frame.shape[:2]
    out = Image.new("RGB", (width, height + 16), "white")
    out.paste(Image.fromarray(frame), (0, 0))
    ImageDraw.Draw(out).text((4, height + 2), text, fill="black")
    return out


def film(frames: Sequence[Image.Image], file: pathlib.Path, frame_ms: int = 60, hold_ms: int = 1200) -> None:
    """An animated picture, GIF or WebP by the file's name; the last frame stays a while. It plays for ever."""
    if file.suffix.lower() not in (".gif", ".webp"):
        raise EvalError(f"{file}: an animated picture's name ends with .gif or .webp")
    if not frames:
        raise EvalError(f"{file}: no frames")
    file.parent.mkdir(parents=True, exist_ok=True)
    times = [frame_ms] * (len(frames) - 1) + [hold_ms]
    temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")
    if file.suffix.lower() == ".gif":
        # One palette for all frames, from some of them: no flicker, and differences between frames stay small.
        some = frames[:: max(1, len(frames) // 8)]
        sheet = Image.new("RGB", (some[0].width, sum(f.height for f in some)))
        for i, f in enumerate(some):
            sheet.paste(f, (0, sum(g.height for g in some[:i])))
        palette = sheet.quantize(128, method=Image.Quantize.MEDIANCUT)
        reduced = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
        reduced[0].save(
            temporary, save_all=True, append_images=reduced[1:], duration=times, loop=0, optimize=True
        )
    else:
        frames[0].save(
            temporary, save_all=True, append_images=list(frames[1:]), duration=times, loop=0, quality=75
        )
    temporary.replace(file)


def contact_sheet(frames: Sequence[Image.Image], file: pathlib.Path, columns: int = 8) -> None:
    """Up to `columns` frames of an episode in a row, evenly spread, first and last included."""
    if not frames:
        raise EvalError(f"{file}: no frames")
    columns = min(columns, len(frames))
    chosen = [frames[round(i * (len(frames) - 1) / max(1, columns - 1))] for i in range(columns)]
    width, height = chosen[0].size
    sheet = Image.new("RGB", (width * columns, height), "white")
    for i, frame in enumerate(chosen):
        sheet.paste(frame, (i * width, 0))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.tmp.png")
    sheet.save(temporary)
    temporary.replace(file)


def beside(rows: Sequence[Sequence[Image.Image]]) -> list[Image.Image]:
    """Several films as one, beside each other; shorter ones hold their last frame."""
    longest = max(len(r) for r in rows)
    out = []
    for i in range(longest):
        now = [r[min(i, len(r) - 1)] for r in rows]
        frame = Image.new("RGB", (sum(f.width for f in now), max(f.height for f in now)), "white")
        x = 0
        for f in now:
            frame.paste(f, (x, 0))
            x += f.width
        out.append(frame)
    return out

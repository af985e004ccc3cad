"""Calibration data for the CRNN of `ddddocr` 1.4.11 (MIT), a reader of captchas: rendered strings, 64 pixels high.

    python benchmarks/real/captcha/samples.py OUT.npz

Of `OUT.npz` the first three quarters calibrate, the last is measured on, as `convert --calibration` parts them. The
strings are letters and digits in the fonts of matplotlib, turned, moved and blurred a little.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COUNT, HEIGHT, WIDTH = 320, 64, 176
LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"


def image(draw: random.Random, fonts: list[Path]) -> np.ndarray:
    """One picture (1, height, width) in -1 .. 1, as the model was trained on."""
    text = "".join(draw.choice(LETTERS) for _ in range(draw.randint(4, 6)))
    picture = Image.new("L", (WIDTH, HEIGHT), draw.randint(215, 255))
    at = draw.randint(4, 14)
    for letter in text:
        font = ImageFont.truetype(str(draw.choice(fonts)), draw.randint(28, 38))
        tile = Image.new("L", (56, HEIGHT), 0)
        ImageDraw.Draw(tile).text((12, draw.randint(4, 16)), letter, fill=255, font=font)
        tile = tile.rotate(draw.uniform(-18, 18), resample=Image.Resampling.BILINEAR)
        picture.paste(draw.randint(0, 90), (at - 12, 0), tile)
        at += int(font.getlength(letter)) + draw.randint(-1, 4)
    for _ in range(draw.randint(0, 3)):
        line = [(draw.randint(0, WIDTH), draw.randint(0, HEIGHT)) for _ in range(2)]
        ImageDraw.Draw(picture).line(line, fill=draw.randint(80, 180), width=1)
    picture = picture.filter(ImageFilter.GaussianBlur(draw.uniform(0, 0.7)))
    return (np.asarray(picture, dtype=np.float32)[None] / 255 - 0.5) / 0.5


def main() -> None:
    """Write the samples."""
    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVuSans*.ttf"))
    draw = random.Random(0)
    np.savez(sys.argv[1], input1=np.stack([image(draw, fonts) for _ in range(COUNT)]))


if __name__ == "__main__":
    main()

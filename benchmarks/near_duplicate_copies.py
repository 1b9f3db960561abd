"""What copies of pictures that stand in a training set twice, nearly, are by d1/d2: the numbers in docs/design.md.

    python benchmarks/near_duplicate_copies.py --source pictures.zip      writes benchmarks/results/near-duplicates.json

600 images train, of which 200 stand in the set a second time: encoded as JPEG, or a tenth brighter. Samples are these 200
with noise, and 500 images that are not in the set. Rates by `nearest_two`, for which a near-duplicate is a picture of
its own, and by `nearest_pictures`, for which it is not. And the other way round: of 40 images 16 shots each train, which
differ by soft light, and 5 new shots of each are the samples, which copy none.
"""

from __future__ import annotations

import argparse
import io
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import protocol
import torch
from PIL import Image

from fastambient.data import open_source
from fastambient.evaluation.memorization import nearest_two
from fastambient.evaluation.nearest_pictures import nearest_pictures
from fastambient.files import write_json

IMAGES, TWICE, OTHERS = 600, 200, 500
SUBJECTS, SHOTS, NEW, LIGHT = 40, 16, 5, 10.0  # LIGHT in grey levels, drawn for each eighth of the width and height
SIGMAS = (0.05, 0.1)  # of the noise, in units of pixels in [-1, 1]


def by_jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """uint8 [N, 3, H, W], encoded and decoded."""
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(file)).transpose(2, 0, 1))
    return np.stack(out)


def shots(images: np.ndarray, count: int, generator: np.random.Generator, light: float = LIGHT) -> np.ndarray:
    """uint8 [N * count, 3, H, W]: each image `count` times, in light of its own."""
    size = images.shape[-1] // 8
    out = []
    for image in images.repeat(count, 0).astype(np.float64):
        soft = light * generator.standard_normal((3, 8, 8)).repeat(size, 1).repeat(size, 2)
        out.append(np.clip(image + soft, 0, 255).astype(np.uint8))
    return np.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="colour pictures of 32 pixels or more: any SOURCE")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "near-duplicates.json")
    a = parser.parse_args()
    images = np.stack([item.image for item in islice(open_source(a.source).read(), IMAGES + OTHERS)])
    train, others, copied = images[:IMAGES], images[IMAGES:], images[:TWICE]
    brighter = np.clip(np.rint(1.1 * copied.astype(np.float64)), 0, 255).astype(np.uint8)
    versions = {"JPEG quality 85": by_jpeg(copied, 85), "JPEG quality 50": by_jpeg(copied, 50), "brighter": brighter}
    generator, rows = np.random.default_rng(0), []
    for name, again in versions.items():
        for sigma in SIGMAS:
            noise = sigma * 127.5 * generator.normal(size=copied.shape)
            samples = np.concatenate([np.clip(np.rint(copied + noise), 0, 255).astype(np.uint8), others])
            row: dict[str, object] = {"again": name, "sigma": sigma}
            for search in (nearest_two, nearest_pictures):
                copies = search(samples, np.concatenate([train, again])).copies()
                row[search.__name__] = {"copies": float(copies[:TWICE].mean()), "others": float(copies[TWICE:].mean())}
            print(row)
            rows.append(row)
    subjects = images[:SUBJECTS]
    many, new = (shots(subjects, count, generator) for count in (SHOTS, NEW))
    row = {"again": f"{SHOTS} shots in other light", "sigma": None}
    for search in (nearest_two, nearest_pictures):
        row[search.__name__] = {"copies": None, "others": float(search(new, many).copies().mean())}
    print(row)
    rows.append(row)
    settings = {
        "data": Path(a.source).name, "images": IMAGES, "twice": TWICE, "others": OTHERS, "subjects": SUBJECTS,
        "shots": SHOTS, "new": NEW, "light": LIGHT,
    }  # fmt: skip
    device = protocol.environment(torch.device("cpu"))["device"]
    write_json(a.out, {"device": device, "date": str(date.today()), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()

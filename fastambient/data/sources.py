"""Sources of images: what a user points at, read as rows of (name, uint8 [C, H, W], label, text).

A SOURCE is `digits` (scikit-learn's 1,797 real 8x8 pictures; write `./digits` for a folder of that name), a folder
of images, a zip in EDM's data set layout, an `.npy`/`.npz` of uint8 images, WebDataset tars, or a Hugging Face data set
on this machine. The rules, for all of them:

Files    PNG, JPEG, WebP, BMP by content, found by suffix; sub-folders too (links to folders are not followed);
         names that begin with a dot are ignored; sorted by path. Of an animation the first frame.
Colour   EXIF orientation is applied, colour profiles are not. 16-bit grey is scaled by 1/257, 16-bit colour keeps its
         high byte; palette and CMYK become RGB; transparency is composited over white. If every picture is stored as
         grey (1, 8 or 16 bits, with or without alpha) the set has one channel, otherwise all are RGB.
Size     With a resolution R: the largest centred square, resized to R x R with Lanczos (after a box reduction where
         it is more than three times too large). Without: all pictures must be square and of one size.
Labels   From `dataset.json` where there is one, in EDM's form {"labels": [["00000/img00000000.png", 6], ...]} or
         null; every image needs one, and every label an image. Otherwise from the sub-folders of the folder that all
         images lie in, if there are several and every image lies in one. In an `.npz`, the integer array `labels`.
Text     `photo.txt`, `photo.caption` and `photo.json` (UTF-8, suffixes in lower case) beside `photo.jpg` go with it.
Arrays   uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] in C order, C 1 or 3 (channels last where both would fit); in an
         `.npz` the array `images`, or the only one. No pickle is ever loaded.
Tars     A plain `.tar`, a folder of them, or a pattern such as `shards-{0000..0099}.tar` or `shards/*.tar`. Entries
         that follow each other and share the path up to the file name's first dot are a sample: an image, its class
         number as text in `.cls` (on all samples or none), text as above. A sample without an image is left out.
Tables   A `.parquet` file, a folder or pattern of them (also in the folder's `data/`; of several splits `train`), or a
         folder made by `datasets.save_to_disk`. The images are the column that the Hugging Face metadata calls Image,
         else the only one of structs {bytes, path} or of bytes; labels are the ClassLabel column, without metadata the
         integers in `label`; columns of strings are text, each a kind of its own.
Looking  Opening a folder or a zip reads every image's header. In tars and tables that would read everything, so at most
         256 images spread over the set decide: grey if all of them are, else RGB, and, without a resolution, the size
         of the first. When the rest is read, an image of another size ends it, and a coloured one in a grey set is a
         broken one.
Limits   64 megapixels a picture, by its header; 512 MiB an entry of a zip, tar or table; 200-fold expansion of one
         above 16 MiB; 1 MiB a text.
"""

from __future__ import annotations

import glob
import importlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from fastambient.data.archives import Folder, Zip
from fastambient.data.arrays import open_array, open_digits
from fastambient.data.decode import MAX_PIXELS
from fastambient.data.items import MAX_CLASSES, ON_BAD_IMAGE, Item, Source, is_hidden
from fastambient.data.pictures import Pictures, is_image_name
from fastambient.data.tars import Tars
from fastambient.errors import InputError, data_option, did_you_mean, nearest_beside

__all__ = ["MAX_CLASSES", "ON_BAD_IMAGE", "Item", "Source", "open_source"]

_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt"}
_EXPECTED = "a folder, a .zip, .tar, .parquet, .npy or .npz file, or the word digits"
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$", re.IGNORECASE)


def open_source(spec: str | os.PathLike[str], *, resolution: int | None = None, on_bad_image: str = "error") -> Source:
    """Open a SOURCE by the rules at the top of this file.

    Parameters
    ----------
    spec : `digits`, a path, or a pattern of `.tar` or `.parquet` files
    resolution : pixels; None keeps the pictures' own size
    on_bad_image : "error", or "skip" to leave out pictures that cannot be read, counted and named

    Raises
    ------
    InputError : nothing there, no image in it, or an image or label that breaks a rule
    """
    if on_bad_image not in ON_BAD_IMAGE:
        raise InputError(f"--on-bad-image must be one of {', '.join(ON_BAD_IMAGE)}, got {on_bad_image!r}")
    if resolution is not None and not 1 <= resolution <= MAX_PIXELS**0.5:
        given = data_option("resolution", resolution)
        raise InputError(f"{given}: expected 1 to {int(MAX_PIXELS**0.5)} pixels")
    if str(spec) == "digits":
        return open_digits(resolution)
    if not str(spec):  # as a path it would be the folder one is in
        raise InputError(f"the source is empty; expected {_EXPECTED}")
    path, suffix = Path(spec), Path(spec).suffix.lower()
    try:
        if path.is_dir():
            return _open_folder(path, resolution, on_bad_image)
        if not path.exists():
            if re.search(r"[*?\[]|\{.*\}", str(spec)):
                return _open_shards(Path(spec).name, expand(str(spec)), resolution, on_bad_image)
            if re.match(r"\w+://|pipe:", str(spec)):
                raise InputError(f"{spec} is a URL; sources are read from files: download it first")
            hint = nearest_beside(path) or did_you_mean(str(spec), ["digits"])
            if re.fullmatch(r"[\w.-]+/[\w.-]+", str(spec)) and not path.parent.exists():
                hint = (
                    f"; a data set of the Hugging Face hub is downloaded first: hf download {spec} --repo-type dataset"
                    f" --local-dir {path.name}, then prepare the folder that its .parquet files lie in"
                )
            raise InputError(
                f"the source {str(spec)!r} is no built-in data set and no such file or folder exists{hint}"
            )
        if not path.is_file():
            raise InputError(f"{path} is no regular file, but a pipe, a socket or a device; expected {_EXPECTED}")
        if suffix in _PICKLES:
            raise InputError(
                f"{path} is a pickle, which can run any code and is never loaded; save an .npz of uint8 images"
            )
        if _COMPRESSED_TAR.search(path.name):
            raise InputError(f"{path} is a compressed tar, which can only be read from its start; {_unpack(path)}")
        if suffix == ".zip":
            return Pictures(Zip(path), resolution, on_bad_image)
        if suffix in (".npy", ".npz"):
            return open_array(path, resolution)
        if suffix in (".tar", ".parquet"):
            return _open_shards(path.name, [path], resolution, on_bad_image)
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    part = (
        "; an .arrow file is part of a data set: name the folder that save_to_disk made" if suffix == ".arrow" else ""
    )
    raise InputError(f"{path} is no source: expected {_EXPECTED}{part}")


def _unpack(path: Path) -> str:
    tool = {"gz": "gunzip", "tgz": "gunzip", "xz": "unxz", "txz": "unxz", "zst": "unzstd"}
    return f"unpack it to a plain .tar ({tool.get(path.name.rpartition('.')[2].lower(), 'bunzip2')} {path.name})"


def _open_folder(path: Path, resolution: int | None, on_bad_image: str) -> Source:
    """A folder is of one kind: image files, shards (in it or in its `data/`), or what `save_to_disk` wrote."""
    files = Folder(path)
    near = [name for name in files.names if "/" not in name.removeprefix("data/") and not is_hidden(name)]
    kinds = {suffix: [name for name in near if name.endswith(suffix)] for suffix in (".tar", ".parquet")}
    kinds["saved"] = [name for name in ("dataset_dict.json", "state.json") if name in near]
    if kinds["saved"] == ["state.json"] and "dataset_info.json" not in near:
        kinds["saved"] = []
    kinds["image"] = list(itertools.islice(filter(is_image_name, files.names), 1))
    found = [kind for kind, names in kinds.items() if names]
    if len(found) > 1:
        examples = ", ".join(kinds[kind][0] for kind in found)
        raise InputError(
            f"{path} holds several kinds of images ({examples}); move all but one away, or name the files, as in "
            f"'{path}/*.tar'"
        )
    if found == ["saved"]:
        return _tables().open_saved(path, resolution, on_bad_image)
    if found in ([".tar"], [".parquet"]):
        return _open_shards(path.resolve().name, [path / name for name in kinds[found[0]]], resolution, on_bad_image)
    if not found and (packed := next(filter(_COMPRESSED_TAR.search, near), None)):
        raise InputError(f"{files.where(packed)} is a compressed tar; {_unpack(Path(packed))}")
    return Pictures(files, resolution, on_bad_image)


def _open_shards(name: str, paths: list[Path], resolution: int | None, on_bad_image: str) -> Source:
    if odd := next((path for path in paths if not path.is_file()), None):
        raise InputError(f"{odd} is no regular file, but a folder, a pipe, a socket or a device; leave it out")
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".tar"}:
        return Tars(name, paths, resolution, on_bad_image)
    if suffixes == {".parquet"}:
        return _tables().open_parquet(name, paths, resolution, on_bad_image)
    raise InputError(f"{name} names {paths[0].name} and {len(paths) - 1:,} more files; expected .tar or .parquet alone")


def _tables() -> ModuleType:
    """The module for parquet and arrow, whose library is an extra."""
    try:
        return importlib.import_module("fastambient.data.tables")
    except ImportError as error:
        if not (error.name or "").startswith("pyarrow"):
            raise
        raise InputError(
            "parquet files and Hugging Face data sets are read with pyarrow: python -m pip install pyarrow"
        ) from error


def expand(pattern: str) -> list[Path]:
    """The files of a pattern, in its order: {a,b} and {000..123} as in a shell, then * ? [ ], sorted."""
    paths: dict[Path, None] = {}
    for name in expand_braces(pattern):
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name]
        if not found or not Path(found[0]).exists():
            raise InputError(f"{name} of the pattern {pattern} does not exist; restore it, or name what is there")
        paths |= dict.fromkeys(map(Path, found))
    return list(paths)


def expand_braces(pattern: str) -> Iterator[str]:
    """All names of a pattern with {a,b} and {000..123}, in its order."""
    if (match := re.search(r"\{([^{}]*)\}", pattern)) is None:
        yield pattern
        return
    choices: Iterable[str] = match[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        choices = (f"{i:0{len(span[1])}d}" for i in range(int(span[1]), int(span[2]) + 1))
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])

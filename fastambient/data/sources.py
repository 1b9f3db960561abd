"""Sources of images: what a user points at, read as (name, uint8 [C, H, W], label).

A SOURCE is `digits` (scikit-learn's 1,797 real 8x8 pictures; write `./digits` for a folder of that name), a folder
of images, a zip in EDM's data set layout, or an `.npy`/`.npz` of uint8 images. The rules, for all of them:

Files    PNG, JPEG, WebP, BMP by content, found by suffix; sub-folders too (links to folders are not followed);
         names that begin with a dot are ignored; sorted by path. Of an animation the first frame.
Colour   EXIF orientation is applied, colour profiles are not. 16-bit grey is scaled by 1/257, 16-bit colour keeps its
         high byte; palette and CMYK become RGB; transparency is composited over white. If every picture is stored as
         grey (1, 8 or 16 bits, with or without alpha) the set has one channel, otherwise all are RGB.
Size     With a resolution R: the largest centred square, resized to R x R with Lanczos (after a box reduction where
         it is more than three times too large). Without: all pictures must be square and of one size.
Labels   From `dataset.json` where there is one, in EDM's form {"labels": [["00000/img00000000.png", 6], ...]} or
         null; every image needs one, and every label an image. Otherwise from the first-level sub-folders, if there
         are several and every image lies in one. In an `.npz`, the integer array `labels`.
Arrays   uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] in C order, C 1 or 3 (channels last where both would fit); in an
         `.npz` the array `images`, or the only one. No pickle is ever loaded.
Limits   64 megapixels a picture, by its header; 512 MiB a zip entry; 200-fold expansion of a zip entry above 16 MiB.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image

from fastambient.console import progress, warn
from fastambient.data.archives import ZIP_ERRORS, Files, Folder, Zip, open_entry, open_zip
from fastambient.data.decode import MAX_PIXELS, BadEntry, fit, is_grey, to_8_bits, to_array, use_image
from fastambient.errors import InputError, data_option, did_you_mean

MAX_CLASSES = 1 << 20  # labels become one-hot vectors
ON_BAD_IMAGE = ("error", "skip")

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt"}
_EXPECTED = "a folder, a .zip, .npy or .npz file, or the word digits"
_NAMED_SKIPS = 5  # of the skipped pictures this many are named on the console
_T = TypeVar("_T")


class Source:
    """A set of pictures that can be read again and again, in the same order.

    Attributes
    ----------
    name : the SOURCE's last path part, or `digits`
    channels : 1 or 3
    resolution : height and width in pixels
    length : number of pictures; `read` yields fewer where it skips broken ones
    num_classes : 0 without labels
    class_names : one name a class, or None
    default_train : how many pictures train when the user does not say; None means all but a tenth
    skipped : name -> reason of every picture left out so far
    """

    def __init__(self, name: str, *, channels: int, resolution: int, length: int, num_classes: int = 0) -> None:
        self.name, self.channels, self.resolution = name, channels, resolution
        self.length, self.num_classes = length, num_classes
        self.class_names: list[str] | None = None
        self.default_train: int | None = None
        self.skipped: dict[str, str] = {}

    def read(self) -> Iterator[tuple[str, np.ndarray, int]]:
        """Yield (name, uint8 [channels, resolution, resolution], label or -1).

        Raises
        ------
        InputError : a picture cannot be read (unless the source was opened with ``on_bad_image="skip"``)
        """
        raise NotImplementedError


def open_source(spec: str | os.PathLike[str], *, resolution: int | None = None, on_bad_image: str = "error") -> Source:
    """Open a SOURCE by the rules at the top of this file.

    Parameters
    ----------
    spec : `digits`, or the path of a folder, `.zip`, `.npy` or `.npz`
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
        return _digits(resolution)
    if not str(spec):  # as a path it would be the folder one is in
        raise InputError(f"the source is empty; expected {_EXPECTED}")
    path, suffix = Path(spec), Path(spec).suffix.lower()
    try:
        if path.is_dir():
            return _Pictures(Folder(path), resolution, on_bad_image)
        if not path.exists():
            hint = did_you_mean(str(spec), ["digits"])
            raise InputError(
                f"the source {str(spec)!r} is no built-in data set and no such file or folder exists{hint}"
            )
        if not path.is_file():
            raise InputError(f"{path} is no regular file, but a pipe, a socket or a device; expected {_EXPECTED}")
        if suffix in _PICKLES:
            raise InputError(
                f"{path} is a pickle, which can run any code and is never loaded; save an .npz of uint8 images"
            )
        if suffix == ".zip":
            return _Pictures(Zip(path), resolution, on_bad_image)
        if suffix in (".npy", ".npz"):
            return _open_array(path, resolution)
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    raise InputError(f"{path} is no source: expected {_EXPECTED}")


def _load_json(files: Files, name: str) -> object:
    try:
        with files.open(name) as stream:
            return json.loads(stream.read())
    except ZIP_ERRORS as error:
        raise InputError(
            f"{files.where(name)} is no valid JSON ({error}); expected EDM's form, or remove it"
        ) from error


def _check_labels(labels: np.ndarray, where: str) -> int:
    """The number of classes of integer labels [N]."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise InputError(f"{where}: a class label must lie in 0..{MAX_CLASSES - 1}, got {low if low < 0 else high}")
    return high + 1


def _read_labels(files: Files, images: list[str]) -> tuple[dict[str, int] | None, list[str] | None]:
    """(label of each image or None, class names or None)."""
    if "dataset.json" not in files.names:
        folders = {name.split("/")[0] for name in images if "/" in name}
        if len(folders) < 2 or not all("/" in name for name in images):
            return None, None
        class_names = sorted(folders)
        number = {folder: i for i, folder in enumerate(class_names)}
        return {name: number[name.split("/")[0]] for name in images}, class_names

    where, content = files.where("dataset.json"), _load_json(files, "dataset.json")
    entries = content.get("labels") if isinstance(content, dict) else "no object"
    if entries is None:
        return None, None
    labels: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case [str(name), int(label)] if not isinstance(label, bool):
                if labels.setdefault(name, label) != label:
                    raise InputError(f"{where} gives {name} two labels, {labels[name]} and {label}")
            case _:
                expected = '{"labels": [["path", integer], ...]}'
                raise InputError(f"{where}: expected {expected} or null, got {json.dumps(entry)[:80]}")
    if missing := next((name for name in images if name not in labels), None):
        raise InputError(f'{where} has no label for {missing}; add it, or set "labels" to null to train without labels')
    if extra := labels.keys() - set(images):
        raise InputError(
            f"{where} has a label for {min(extra)}, which is not there; restore the image or remove the entry"
        )
    return labels, None


def _check_size(size: tuple[int, int], first: tuple[int, int], where: str) -> None:
    if size[0] != size[1] or size != first:
        other = f" (the first is {first[0]} x {first[1]})" if size != first else ""
        raise InputError(
            f"{where} is {size[0]} x {size[1]} pixels, but images must be square and of one size{other}; "
            f"pass {data_option('resolution', 'R')} to crop and resize all of them"
        )


class _Pictures(Source):
    """Image files in a folder or a zip. Opening reads every header; pixels are decoded by `read` alone."""

    def __init__(self, files: Files, resolution: int | None, on_bad_image: str) -> None:
        super().__init__(files.path.resolve().name, channels=1, resolution=0, length=0)
        self._files, self._skip_bad = files, on_bad_image == "skip"
        visible = (name for name in files.names if not any(part[:1] == "." for part in name.split("/")))
        found = [name for name in visible if Path(name).suffix.lower() in _SUFFIXES]
        if not found:
            raise InputError(f"no image in {files.path}: expected PNG, JPEG, WebP or BMP files, also in sub-folders")
        self._labels, self.class_names = _read_labels(files, found)
        if self._labels is not None:
            self.num_classes = _check_labels(np.array(list(self._labels.values())), files.where("dataset.json"))

        size: tuple[int, int] | None = None
        self._names: list[str] = []
        with progress(f"looking through {self.name}", len(found)) as advance:
            for name in found:
                header = self._use(name, lambda image: (image.size, is_grey(image)), whole=False)
                advance(1)
                if header is None:
                    continue
                size = size or header[0]
                if resolution is None:
                    _check_size(header[0], size, files.where(name))
                self.channels = self.channels if header[1] else 3
                self._names.append(name)
        if size is None:
            raise InputError(
                f"none of the {len(found):,} images in {files.path} can be read; the first: {self.skipped[found[0]]}"
            )
        self.length, self.resolution = len(self._names), resolution or size[0]

    def _use(self, name: str, use: Callable[[Image.Image], _T], *, whole: bool) -> _T | None:
        """None for a picture that is skipped."""
        try:
            return use_image(lambda: self._files.open(name), use, whole=whole)
        except BadEntry as error:
            where = self._files.where(name)
            if not self._skip_bad:
                remedy = f"repair or remove it, or pass {data_option('on_bad_image', 'skip')}"
                raise InputError(f"{where} {error}; {remedy}") from error
            if name not in self.skipped and len(self.skipped) < _NAMED_SKIPS:
                warn(f"skipped: {where} {error}")
            self.skipped[name] = str(error)
            return None

    def read(self) -> Iterator[tuple[str, np.ndarray, int]]:
        mode = "L" if self.channels == 1 else "RGB"
        for name in self._names:
            array = self._use(name, lambda image: to_array(fit(to_8_bits(image, mode), self.resolution)), whole=True)
            if array is not None:
                yield name, array, -1 if self._labels is None else self._labels[name]


class _Arrays(Source):
    """Pictures that come as uint8 [H, W], [H, W, C] or [C, H, W] arrays, one after the other."""

    def __init__(
        self, name: str, where: str, shape: tuple[int, ...], rows: Callable[[], Iterable[np.ndarray]],
        labels: np.ndarray | None, resolution: int | None,
    ) -> None:  # fmt: skip
        self._channels_last = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
        full = (*shape, 1) if len(shape) == 3 else shape
        if len(full) != 4 or full[3 if self._channels_last else 1] not in (1, 3):
            raise InputError(
                f"{where} has the shape {list(shape)}; expected [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3"
            )
        if 0 in full:
            raise InputError(f"no image in {where}: its shape is {list(shape)}")
        length, *rest = full
        height, width = rest[:2] if self._channels_last else rest[1:]
        if resolution is None:
            _check_size((width, height), (width, height), f"every image of {where}")
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (length,)):
            raise InputError(f"{where}: labels must be {length:,} integers, got {labels.dtype} {list(labels.shape)}")
        super().__init__(
            name, length=length, channels=rest[2 if self._channels_last else 0], resolution=resolution or width,
            num_classes=0 if labels is None else _check_labels(labels, where),
        )  # fmt: skip
        self._rows, self._labels = rows, labels

    def read(self) -> Iterator[tuple[str, np.ndarray, int]]:
        for i, row in enumerate(self._rows()):
            picture = row if self._channels_last else row.transpose(1, 2, 0)
            image = Image.fromarray(picture.reshape(picture.shape[:2]) if self.channels == 1 else picture)
            yield f"{i}", to_array(fit(image, self.resolution)), -1 if self._labels is None else int(self._labels[i])


def _digits(resolution: int | None) -> Source:
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    source = _Arrays("digits", "digits", images.shape, lambda: images, data.target, resolution)
    source.class_names, source.default_train = [str(i) for i in range(10)], 100
    return source


def _read_header(stream: BinaryIO, where: str, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy stream of `size` bytes that stands at its start; leaves it at the first item."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except ValueError as error:
        raise InputError(f"{where} is no readable .npy array ({error})".replace("\n", " ")) from error
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, which are pickles and never loaded; save numbers")
    if fortran_order and len(shape) > 1:
        raise InputError(f"{where} is in Fortran order; save np.ascontiguousarray(array)")
    expected, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if there != expected:
        raise InputError(f"{where} is truncated or damaged: {expected:,} bytes of data expected, {there:,} there")
    return shape, dtype


def _open_array(path: Path, resolution: int | None) -> Source:
    if path.suffix.lower() == ".npy":
        return _array_source(path, str(path), lambda: open(path, "rb"), path.stat().st_size, None, resolution)
    archive = open_zip(path)
    sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
    keys = sorted(sizes.keys() - {"labels"})
    if "images" not in keys and len(keys) != 1:
        raise InputError(f"{path} must hold an array images, or a single one; it holds {', '.join(keys) or 'none'}")
    key = "images" if "images" in keys else keys[0]
    labels: np.ndarray | None = None
    try:
        if "labels" in sizes:
            with open_entry(archive, "labels.npy") as file:
                shape, dtype = _read_header(file, f"{path}: labels", sizes["labels"])
                labels = np.frombuffer(file.read(), dtype).reshape(shape)
        size = sizes[key]
        return _array_source(
            path, f"{path}: {key}", lambda: open_entry(archive, f"{key}.npy", size), size, labels, resolution
        )
    except (*ZIP_ERRORS, KeyError) as error:
        raise InputError(f"{path} is damaged, or no .npz of arrays ({error}); save it again") from error


def _array_source(
    path: Path, where: str, stream: Callable[[], BinaryIO], size: int, labels: np.ndarray | None, resolution: int | None
) -> Source:
    with stream() as opened:
        shape, dtype = _read_header(opened, where, size)
    if dtype != np.uint8:
        raise InputError(f"{where} is {dtype}; images must be uint8 in 0..255: convert them and save again")

    def rows() -> Iterator[np.ndarray]:
        try:
            with stream() as opened:
                _read_header(opened, where, size)
                for _ in range(shape[0]):
                    yield np.frombuffer(opened.read(math.prod(shape[1:])), np.uint8).reshape(shape[1:])
        except ZIP_ERRORS as error:
            raise InputError(f"{where} is damaged ({error}); save it again") from error

    return _Arrays(path.name, where, shape, rows, labels, resolution)

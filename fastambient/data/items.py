"""What a source of images is: rows that can be read again and again, in the same order, from any row on.

A source is picklable: it holds paths and offsets, and opens its files where it reads them, so a worker process can be
handed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from fastambient.console import warn
from fastambient.data.decode import BadEntry, fit, is_grey, to_8_bits, to_array, use_image
from fastambient.errors import InputError, data_option

MAX_CLASSES = 1 << 20  # labels become one-hot vectors
MAX_TEXT_BYTES = 1 << 20  # of one sidecar of one image
ON_BAD_IMAGE = ("error", "skip")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
UNREAD_SUFFIXES = frozenset(  # of pictures that are not read
    {
        ".gif",
        ".tif",
        ".tiff",
        ".heic",
        ".heif",
        ".avif",
        ".jfif",
        ".jp2",
        ".jxl",
        ".ppm",
        ".pgm",
        ".dng",
        ".psd",
        ".dcm",
    }
)
TEXT_KINDS = ("txt", "caption", "json")  # sidecar files, by suffix
LOOK_AT = 256  # images whose headers say what a set of tars or tables is like

_NAMED_SKIPS = 5  # of the skipped pictures this many are named on the console


class Item(NamedTuple):
    """One image of a source."""

    row: int  # 0 .. length - 1
    name: str
    image: np.ndarray  # uint8 [C, H, W]
    label: int  # -1 without
    text: dict[str, str]  # kind -> text, {} without


class Source:
    """A set of pictures that can be read again and again, in the same order.

    Attributes
    ----------
    name : the SOURCE's last path part, or `digits`
    channels : 1 or 3
    resolution : height and width in pixels
    length : number of rows; `read` yields fewer where it skips broken pictures
    num_classes : 0 without labels
    class_names : one name a class, or None
    default_train : how many pictures train when the user does not say; None means all but a tenth
    text_kinds : kinds of text that images have, such as ("txt", "json"); () without
    skipped : name -> reason of every picture left out so far, in this process
    enlarged, looked_at : how many of the pictures whose size is known have a shorter side below the resolution
    """

    def __init__(self, name: str, *, channels: int = 1, resolution: int = 0, length: int = 0) -> None:
        self.name, self.channels, self.resolution, self.length = name, channels, resolution, length
        self.num_classes = 0
        self.class_names: list[str] | None = None
        self.default_train: int | None = None
        self.text_kinds: tuple[str, ...] = ()
        self.skipped: dict[str, str] = {}
        self.enlarged, self.looked_at = 0, 0

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """Yield rows start .. stop - 1 (by default all) in order; a skipped row is not yielded.

        Raises
        ------
        InputError : a picture cannot be read (unless the source was opened with ``on_bad_image="skip"``)
        IndexError : rows outside of 0 .. length
        """
        raise NotImplementedError

    def fingerprint(self, start: int, stop: int) -> str:
        """Hex digits that change when a file of rows start .. stop - 1 has another name, size or time of change, or
        the whole set other channels, pixels or classes."""
        start, stop = self._span(start, stop)
        of_all = (type(self).__name__, self.channels, self.resolution, self.num_classes, self.class_names)
        digest = hashlib.sha256(repr((*of_all, start, stop)).encode())
        for stamp in self._stamps(start, stop):
            digest.update(repr(stamp).encode())
        return digest.hexdigest()

    def _stamps(self, start: int, stop: int) -> Iterable[tuple[str, int, int]]:
        """`file_stamp` of the files that hold rows start .. stop - 1."""
        raise NotImplementedError

    def _span(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.length if stop is None else stop
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"rows {start} to {stop} of {self.name}, which has {self.length:,}")
        return start, stop


class Entry(NamedTuple):
    """An image file that is still to be decoded."""

    row: int
    name: str
    where: str  # for messages
    open: Callable[[], BinaryIO]
    label: int
    text: Callable[[], dict[str, str]]


class EncodedSource(Source):
    """Image files, wherever they lie. What is derived from it gives `_entries` and `_stamps`."""

    def __init__(self, name: str, resolution: int | None, on_bad_image: str) -> None:
        super().__init__(name, resolution=resolution or 0)
        self._own_size, self._skip_bad = resolution is None, on_bad_image == "skip"

    def _entries(self, start: int, stop: int) -> Iterator[Entry]:
        raise NotImplementedError

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        for entry in self._entries(*self._span(start, stop)):
            try:
                item = Item(entry.row, entry.name, self._decode(entry), entry.label, entry.text())
            except BadEntry as error:
                self._bad(entry.name, entry.where, error)
            else:
                yield item

    def _decode(self, entry: Entry) -> np.ndarray:
        """uint8 [C, H, W] of an image file; BadEntry where it cannot be used."""
        return use_image(entry.open, lambda image: self._array(image, entry.where), whole=True)

    def _array(self, image: Image.Image, where: str) -> np.ndarray:
        if self._own_size:
            check_size(image.size, (self.resolution, self.resolution), where)
        if self.channels == 1 and not is_grey(image):
            raise BadEntry(
                "is in colour, but the images looked at on opening are grey: make all of them one or the other"
            )
        return to_array(fit(to_8_bits(image, "L" if self.channels == 1 else "RGB"), self.resolution))

    def _bad(self, name: str, where: str, error: BadEntry) -> None:
        """Leave out a picture that cannot be used, or end with its reason."""
        if not self._skip_bad:
            remedy = f"repair or remove it, or pass {data_option('on_bad_image', 'skip')}"
            raise InputError(f"{where} {error}; {remedy}") from error
        if name not in self.skipped and len(self.skipped) < _NAMED_SKIPS:
            warn(f"skipped: {where} {error}")
        self.skipped[name] = str(error)

    def _note_size(self, size: tuple[int, int]) -> None:
        self.looked_at += 1
        self.enlarged += min(size) < self.resolution

    def _look(self, spans: Iterable[tuple[int, int]]) -> None:
        """Set channels and resolution from the headers of the rows of `spans`."""
        found: list[tuple[int, int]] = []
        for start, stop in spans:
            for entry in self._entries(start, stop):
                try:
                    size, grey = use_image(entry.open, lambda image: (image.size, is_grey(image)), whole=False)
                except BadEntry as error:
                    self._bad(entry.name, entry.where, error)
                    continue
                found.append(size)
                self._note_size(size)
                self.channels = self.channels if grey else 3
                if self._own_size:
                    check_size(size, found[0], entry.where)
                    self.resolution = found[0][0]
        if not found:
            name, reason = next(iter(self.skipped.items()))
            raise InputError(
                f"none of the images of {self.name} that were looked at can be read; the first: {name} {reason}"
            )


def file_stamp(path: Path, name: str) -> tuple[str, int, int]:
    """(name, bytes, time of change in ns)."""
    try:
        stat = path.stat()
    except OSError as error:
        unreadable(path, error)
    return name, stat.st_size, stat.st_mtime_ns


def open_binary(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        unreadable(path, error)


def unreadable(path: Path, error: OSError) -> NoReturn:
    raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def check_labels(labels: np.ndarray, where: str) -> int:
    """The number of classes of integer labels [N]."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise InputError(f"{where}: a class label must lie in 0..{MAX_CLASSES - 1}, got {low if low < 0 else high}")
    return high + 1


def check_size(size: tuple[int, int], first: tuple[int, int], where: str) -> None:
    if size[0] != size[1] or size != first:
        other = f" (the first is {first[0]} x {first[1]})" if size != first else ""
        raise InputError(
            f"{where} is {size[0]} x {size[1]} pixels, but images must be square and of one size{other}; "
            f"pass {data_option('resolution', 'R')} to crop and resize all of them"
        )


def decode_text(data: bytes, name: str) -> str:
    """A sidecar's text, as it is but for a byte order mark; `data` may be one byte over the limit."""
    if len(data) > MAX_TEXT_BYTES:
        raise BadEntry(f"has the text {name} of more than {MAX_TEXT_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadEntry(f"has the text {name}, which is no UTF-8 ({error.reason} at byte {error.start})") from error


def warn_of_unread(counts: Mapping[str, int], where: str) -> None:
    """Say once that pictures of another kind are left out: a set that lacks them should not be a surprise."""
    if counts:
        found = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(counts.items()))
        warn(f"{where} also holds pictures that are not read ({found}): convert them to PNG, or they are left out")


def is_hidden(name: str) -> bool:
    """Whether a part of a relative name begins with a dot."""
    return any(part[:1] == "." for part in name.split("/"))

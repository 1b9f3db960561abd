"""Near-duplicates: the same picture encoded, scaled or lit a little differently.

Two pictures are near-duplicates where their perceptual hashes (64 bits: signs of the low frequencies, `imagehash`)
differ in at most 4 bits, and 16x16 grey versions of them correlate by 0.95 or more; groups are what such pairs connect.
The hash finds candidates among millions without comparing all; the correlation keeps apart what merely has the same
layout, of which sets of X-rays or of portraits are full.

Encoding, lighting and scaling are found, shifts and crops seldom, mirror images never (the store looks for exact ones
itself): docs/design.md has what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

MIN_RESOLUTION = 32  # the hash looks at 32x32 pixels

_DISTANCE = 4  # bits
_CORRELATION = 0.95
_SIDE = 16  # pixels of the grey versions
_FLAT = 1.0  # grey levels; a picture of less contrast is one colour
_READ = 32  # pictures read at once, of any size
_BLOCK = 4096  # grey versions compared at once with another
_COMPARED = 1 << 24  # pairs of them at once: 64 MiB of correlations
_MAX_LEADERS = 32  # different pictures of one hash that are told apart
_POPCOUNT = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


class Images(Protocol):
    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...  # uint8 [n, C, H, W]


def perceptual_hash(image: np.ndarray) -> int:
    """64 bits of a uint8 [C, H, W] picture with 1 or 3 channels."""
    import imagehash  # scipy's transforms take a while to import

    bits = imagehash.phash(_picture(image)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicate_groups(hashes: np.ndarray, images: Images) -> np.ndarray:
    """The group of each image, named by its first row: int64 [N].

    Parameters
    ----------
    hashes : uint64 [N], `perceptual_hash` of each image
    images : gives the pictures of some rows; asked for those alone whose hash is near another one's
    """
    n = len(hashes)
    distinct, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    pairs = _near_pairs(distinct)
    candidates = counts > 1
    candidates[pairs.ravel()] = True
    if not candidates.any():
        return np.arange(n)
    rows = np.flatnonzero(candidates[which])
    small = _Small(images, rows)

    # Rows of one hash meet its leaders, the first rows of different pictures; leaders of near hashes meet each other.
    edges: list[tuple[int, int]] = []
    leaders: dict[int, list[int]] = {}
    order = rows[np.argsort(which[rows], kind="stable")]
    for same in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
        heads = leaders.setdefault(int(which[same[0]]), [])
        while len(same) and len(heads) < _MAX_LEADERS:
            head, same = int(same[0]), same[1:]
            heads.append(head)
            alike = small.alike(head, same)
            edges += [(head, int(row)) for row in same[alike]]
            same = same[~alike]
    for a, b in pairs.tolist():
        others = np.array(leaders[b])
        edges += [(head, int(row)) for head in leaders[a] for row in others[small.alike(head, others)]]
    return _connected(n, np.array(edges, np.int64).reshape(-1, 2))


def are_near_duplicates(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool [n]: whether the pictures a[k] and b[k], uint8 [n, C, H, W] each, are near-duplicates of each other."""
    first, second = (_Versions(_Small(side, np.arange(len(a))).grey) for side in (a, b))
    alike = _alike(first, second, (first.centred * second.centred).mean(1))
    for k in np.flatnonzero(alike).tolist():
        alike[k] = (perceptual_hash(a[k]) ^ perceptual_hash(b[k])).bit_count() <= _DISTANCE
    return alike


def near_duplicates_of(rows: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (a, b), int64 [p] each, of which image rows[a] is a near-duplicate of image b: of itself, too, and not of
    what a chain of other pairs leads to.

    Parameters
    ----------
    rows : int64 [n], positions among the images
    images : uint8 [M, C, H, W]
    """
    small, pairs = _Small(images, np.arange(len(images))).grey, [np.zeros((2, 0), np.int64)]
    own = _Versions(small[rows])
    block = min(_BLOCK, max(_COMPARED // max(len(rows), 1), 1))
    for start in range(0, len(images), block):
        first, second = np.nonzero(_all_alike(own, _Versions(small[start : start + block])))
        pairs.append(np.stack([first, second + start]))
    a, b = np.concatenate(pairs, 1)
    hashes = {i: perceptual_hash(images[i]) for i in np.union1d(rows[a], b).tolist()}
    near = [(hashes[i] ^ hashes[j]).bit_count() <= _DISTANCE for i, j in zip(rows[a].tolist(), b.tolist(), strict=True)]
    return a[near], b[near]


def join_groups(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One group for all that share a group in either: int64 [N] from two int64 [N].

    A group is named by its least name in `first`, so that names which do not depend on the order of rows stay so.
    """
    edges = []
    for groups in (first, second):
        _, start, inverse = np.unique(groups, return_index=True, return_inverse=True)
        edges.append(np.stack([start[inverse], np.arange(len(groups))], 1))
    _, member = np.unique(_connected(len(first), np.concatenate(edges)), return_inverse=True)
    least = np.full(member.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, member, first)
    return least[member]


def _near_pairs(distinct: np.ndarray) -> np.ndarray:
    """All pairs (a < b) of distinct uint64 hashes that differ in at most _DISTANCE bits: int64 [P, 2].

    Of _DISTANCE + 1 bands of bits one is equal in such a pair, so only hashes that share a band are compared.
    """
    found = [np.zeros((0, 2), np.int64)]
    edges = np.linspace(0, 64, _DISTANCE + 2).astype(int)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = (distinct >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, ordered = band[order], distinct[order]
        for step in range(1, len(order)):
            (here,) = np.nonzero(band[step:] == band[:-step])
            if not len(here):
                break
            near = here[_bits(ordered[here] ^ ordered[here + step]) <= _DISTANCE]
            found.append(np.sort(np.stack([order[near], order[near + step]], 1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _bits(words: np.ndarray) -> np.ndarray:
    return _POPCOUNT[words.view(np.uint16).reshape(-1, 4)].sum(1)


def _connected(n: int, edges: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


class _Small:
    """16x16 grey versions of some rows, 256 bytes each."""

    def __init__(self, images: Images, rows: np.ndarray) -> None:
        self.rows = rows
        self.grey = np.concatenate(list(self._read(images, rows)))

    @staticmethod
    def _read(images: Images, rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), _READ):
            for image in images[rows[start : start + _READ]]:
                picture = _picture(image).convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
                yield np.asarray(picture, np.uint8).reshape(1, -1)

    def alike(self, row: int, others: np.ndarray) -> np.ndarray:
        """bool [n]: which of `others` are the picture `row`."""
        own = self._of(np.array([row]))
        parts = [self._of(others[start : start + _BLOCK]) for start in range(0, len(others), _BLOCK)]
        return np.concatenate([np.zeros(0, bool), *(_all_alike(own, part)[0] for part in parts)])

    def _of(self, rows: np.ndarray) -> _Versions:
        return _Versions(self.grey[np.searchsorted(self.rows, rows)])


class _Versions:
    """What decides whether two grey versions, uint8 [n, 256], are of one picture: their mean levels, what differs from
    them, and the size of that."""

    def __init__(self, grey: np.ndarray) -> None:
        x = grey.astype(np.float32)
        self.level = x.mean(1)
        self.centred = x - self.level[:, None]
        self.size = np.sqrt(np.square(self.centred).mean(1))


def _all_alike(a: _Versions, b: _Versions) -> np.ndarray:
    """bool [n, m], of each with each."""
    return _alike(a, b, a.centred @ b.centred.T / a.centred.shape[1], (slice(None), None))


def _alike(a: _Versions, b: _Versions, products: np.ndarray, of_a: Any = slice(None)) -> np.ndarray:
    """bool: which are of one picture, as far as grey versions tell. `products`: means over pixels of a[of_a] by b."""
    size, level = a.size[of_a], a.level[of_a]
    flat_a, flat_b = size < _FLAT, b.size < _FLAT
    alike = products >= _CORRELATION * np.maximum(size * b.size, 1e-12)
    return np.where(flat_a | flat_b, flat_a & flat_b & (np.abs(level - b.level) < 4), alike)

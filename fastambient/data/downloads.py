"""Files behind http(s) addresses, in a cache folder of bounded size.

A file is downloaded under a temporary name, held to its size and SHA-256, and renamed: what has its name is whole. One
process of a machine downloads it, the others wait. What was used longest ago goes first. No other kind of address is
opened, also not by way of a redirection: `file:` and `ftp:` have no handler here.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from fastambient.errors import InputError

CACHE_GB = 64.0  # 10^9 bytes

_TRIES, _PAUSE = 5, 1.0  # s before the second try; each pause is twice the one before
_TIMEOUT = 30.0  # s without a byte
_SLOWEST = 1 << 16  # bytes/s, on the average; a server that drips would hold a run for ever
_ABANDONED = 600.0  # s without a write: nobody downloads it any more
_LOCKS = 64  # files of locks, shared by the shards


class _Gone(Exception):
    """Trying again would not help."""


def is_url(spec: str) -> bool:
    return re.match(r"https?://[^/]", spec, re.IGNORECASE) is not None


class _Redirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not is_url(newurl) or (req.full_url.lower().startswith("https:") and newurl.lower().startswith("http:")):
            raise _Gone(f"it redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """As urllib's own, without the handlers for ftp:, file: and data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirect,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def read_url(url: str, limit: int, remedy: str = "") -> bytes:
    """The bytes of a small file; InputError, ending in `remedy`, where it cannot be had or is above `limit` bytes."""
    parts: list[bytes] = []
    _retry(url, lambda: _receive(url, limit, parts.clear, parts.append), remedy)
    return b"".join(parts)


class Downloads:
    """Parameters
    ----------
    folder : of the cache; None: `fastambient/shards` in the user's folder for caches
    limit : bytes that it may hold
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder, self.limit = folder or base / "fastambient" / "shards", limit

    def check_room(self, wanted: int, what: str) -> None:
        if wanted > self.limit:
            raise InputError(
                f"{what} take {wanted:,} bytes, above the {self.limit:,} of the cache {self.folder}: "
                "allow it more, or use a smaller window"
            )

    def get(self, url: str, *, size: int, sha256: str | None) -> Path:
        """The file of `url`, downloaded where it is not there: `size` bytes, of the checksum `sha256` if given.

        Raises
        ------
        InputError : it cannot be downloaded, or has another size or checksum
        """

        def download(file: IO[bytes]) -> None:
            with FileLock(str(self.folder / "lock-room")):
                self._make_room(size)
                file.truncate(size)  # reserved: the next one to make room counts it
            _retry(url, lambda: _receive_whole(url, file, size, sha256))

        name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rpartition("/")[2])[-80:]
        return self.made(f"{url} {size} {sha256}", name, download)

    def made(self, key: str, name: str, make: Callable[[IO[bytes]], object]) -> Path:
        """The file for `key`, whose own name ends in `name`: written by `make` where it is not there, by one process
        of the machine.

        Raises
        ------
        InputError : it cannot be written
        """
        digest = hashlib.sha256(key.encode()).hexdigest()
        path = self.folder / f"{digest[:24]}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _touch(path):
                with FileLock(str(self.folder / f"lock-{int(digest[:8], 16) % _LOCKS}")):
                    if not _touch(path):
                        self._make(path, make)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    def _make(self, path: Path, make: Callable[[IO[bytes]], object]) -> None:
        for left in self.folder.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as file:
                make(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        kept: list[tuple[float, int, Path]] = []
        total = size
        for file in (*self.folder.glob(".*.tmp"), *self.folder.glob("[0-9a-f]*-*")):  # so none is missed
            with suppress(FileNotFoundError):  # whole now, or tidied away
                stat = file.stat()
                total += stat.st_size
                if file.suffix != ".tmp" or time.time() - stat.st_mtime > _ABANDONED:
                    kept.append((stat.st_mtime, stat.st_size, file))
        for _, held, file in sorted(kept):
            if total <= self.limit:
                break
            with suppress(OSError):  # Windows keeps a file that somebody reads
                file.unlink()
                total -= held


def _touch(path: Path) -> bool:
    """Whether the file is there; then it was used just now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _receive_whole(url: str, file: IO[bytes], size: int, sha256: str | None) -> None:
    digest = hashlib.sha256()

    def restart() -> None:
        nonlocal digest
        digest = hashlib.sha256()
        file.seek(0)

    def keep(block: bytes) -> None:
        digest.update(block)
        file.write(block)

    received = _receive(url, size, restart, keep)
    if received != size:
        raise EOFError(f"{received:,} bytes came, expected {size:,}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise ValueError(f"its SHA-256 begins with {digest.hexdigest()[:12]}, expected {sha256[:12]}")


def _receive(url: str, limit: int, restart: Callable[[], object], keep: Callable[[bytes], object]) -> int:
    """Hand the file's bytes to `keep`, at most `limit` of them; the number of bytes."""
    restart()
    received, start = 0, time.monotonic()
    with _opener().open(urllib.request.Request(url, headers={"User-Agent": "fastambient"}), timeout=_TIMEOUT) as answer:
        claimed = answer.headers.get("Content-Length")
        while block := answer.read1(1 << 20):  # what is there: read would wait for all of it, however slowly it comes
            received += len(block)
            if received > limit:
                raise _Gone(f"it has more than {limit:,} bytes")
            if time.monotonic() - start > 2 * _TIMEOUT + received / _SLOWEST:
                raise TimeoutError(f"only {received:,} bytes came in {time.monotonic() - start:.0f} s")
            keep(block)
    if claimed is not None and claimed.isdigit() and received != int(claimed):
        raise EOFError(f"it was cut off after {received:,} of {int(claimed):,} bytes")
    return received


def _retry(url: str, action: Callable[[], object], remedy: str = "") -> None:
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            action()
            return
        except _Gone as error:
            raise InputError(_cannot(url, str(error), remedy)) from error
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {error.reason}"
            if 300 <= error.code < 500 and error.code not in (408, 425, 429):
                raise InputError(_cannot(url, reason, remedy)) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError, EOFError, ValueError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
    raise InputError(_cannot(url, f"{reason}, the last of {_TRIES} tries", remedy))


def _cannot(url: str, reason: str, remedy: str) -> str:
    return f"{url} cannot be downloaded: {reason}" + (f"; {remedy}" if remedy else "")

"""A file whose changes reach the disk together or not at all. It knows pages and bytes, nothing of HDF5 or traces.

HDF5 updates a file in place, in many separate writes: a process killed between two of them leaves a file that may not
open. `JournaledFile` is the file-like object that the trace is written through instead. Everything since the last
`commit` stays in memory as changed pages; `commit` appends those pages to a *journal* beside the file (length and
checksum at the front, so that a torn tail is recognised). About once a second the journal is synced to the disk and
then its pages are copied to their places. Whatever moment the process dies at, "file + complete transactions of the
journal" is the state after its last commit; if the machine loses power, it is the state after some commit of the
last second, since no page is in its place before the journal is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # no POSIX locks here (Windows): an owner file stands in, see `lock`
    fcntl = None  # type: ignore[assignment]

PAGE = 4096
TOKEN_BYTES = 16
_HEADER = struct.Struct("<8s16sQI")  # magic, token of the file that this journal belongs to, see `_applied`
_MAGIC = b"PRBJRNL2"
_APPLIED = 24  # where the header says how many bytes of the journal are in their places, and a checksum of that
_TRANSACTION = struct.Struct("<4sQQI")  # magic, pages, size of the file afterwards, crc32 of what follows
_BEGIN = b"TXN1"


def read_journal(journal: BinaryIO, main: BinaryIO) -> tuple[dict[int, bytearray], int] | None:
    """The pages that complete transactions would write over `main`, and the size of the file after them.

    None if there is no complete transaction, or if the journal belongs to another file: page 0 of `main` must hold
    the journal's token, or be empty (page 0 is written last, so it is empty only while the file is being begun).
    """
    journal.seek(0)
    head = journal.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        return None
    _, token, applied, check = _HEADER.unpack(head)
    if zlib.crc32(head[_APPLIED : _APPLIED + 8]) != check:
        applied = 0
    main.seek(0)
    first_page = main.read(PAGE)
    if token not in first_page and first_page.strip(b"\0"):
        return None
    pages, size, end = _transactions(journal)
    if end < applied:
        # A transaction is damaged whose pages, and those of later ones, are in their places already: older pages must
        # not be laid over them. What was not copied yet follows.
        journal.seek(applied)
        pages, size, _ = _transactions(journal)
    return (pages, size) if size >= 0 else None


def _transactions(journal: BinaryIO) -> tuple[dict[int, bytearray], int, int]:
    """Complete transactions from the present position on: pages, size of the file (-1: none), where they end."""
    pages: dict[int, bytearray] = {}
    size, end = -1, journal.tell()
    while len(head := journal.read(_TRANSACTION.size)) == _TRANSACTION.size:
        magic, count, new_size, crc = _TRANSACTION.unpack(head)
        if magic != _BEGIN or count > (1 << 40) // PAGE:
            break
        body = journal.read(count * (8 + PAGE))
        if len(body) < count * (8 + PAGE) or zlib.crc32(body) != crc:
            break  # the tail that was being written when the process died
        for i, page in enumerate(struct.unpack_from(f"<{count}Q", body)):
            start = count * 8 + i * PAGE
            pages[page] = bytearray(body[start : start + PAGE])
        size, end = new_size, journal.tell()
    return pages, size, end


class JournaledFile:
    """A seekable binary file for `h5py.File(fileobj)`; changes are kept in memory until `commit`.

    `main` is open for reading and writing without buffer. `journal_path` None: read-only use, `commit` is refused.
    """

    checkpoint_bytes = 16 << 20  # how large the journal may grow before the main file is synced and it starts anew
    sync_seconds = 1.0  # how long a commit may wait for the disk

    def __init__(self, main: BinaryIO, journal_path: Path | None = None, token: bytes = b"\0" * TOKEN_BYTES) -> None:
        self._main = main
        self._journal_path = journal_path
        self._journal: BinaryIO | None = None
        self.token = token
        self._pages: dict[int, bytearray] = {}  # changed since the last commit
        self._logged: dict[int, bytearray] = {}  # in the journal, not yet in its place
        self._synced = -self.sync_seconds
        self._closed = False
        self._position = 0
        self._size = self._main_size = os.fstat(main.fileno()).st_size

    # ---------------------------------------------------------------- what h5py calls

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move; the new position."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from the position: committed bytes under changed pages. The number of bytes read."""
        out = memoryview(buffer).cast("B")
        start = self._position
        count = max(0, min(len(out), self._size - start))
        self._main.seek(start)
        data = self._main.read(count)
        out[: len(data)] = data
        out[len(data) : count] = bytes(count - len(data))
        if self._pages or self._logged:
            for page in range(start // PAGE, (start + count + PAGE - 1) // PAGE):
                changed = self._pages.get(page) or self._logged.get(page)
                if changed is not None:
                    a, b = max(start, page * PAGE), min(start + count, (page + 1) * PAGE)
                    out[a - start : b - start] = changed[a - page * PAGE : b - page * PAGE]
        self._position += count
        return count

    def read(self, count: int = -1) -> bytes:
        """Up to `count` bytes from the position (all that follow if negative)."""
        buffer = bytearray(max(0, self._size - self._position) if count < 0 else count)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def write(self, data: bytes | memoryview) -> int:
        """Change bytes at the position, in memory only."""
        data = memoryview(data).cast("B")
        if self._closed:  # HDF5 writes once more when the last reference to its file goes
            return len(data)
        start, end = self._position, self._position + len(data)
        at = start
        while at < end:
            page, inside = divmod(at, PAGE)
            count = min(PAGE - inside, end - at)
            if count == PAGE:
                self._pages[page] = bytearray(data[at - start : at - start + PAGE])
            else:
                self._page(page)[inside : inside + count] = data[at - start : at - start + count]
            at += count
        self._size = max(self._size, end)
        self._position = end
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file."""
        self._size = self._position if size is None else size
        for page in [p for p in self._pages if p * PAGE >= self._size]:
            del self._pages[page]  # what `_logged` or the file hold there is beyond the end, and is never read
        return self._size

    def flush(self) -> None:
        """Nothing: only `commit` makes changes last (HDF5 flushes at moments that are not ours)."""

    def _page(self, page: int) -> bytearray:
        if page not in self._pages:
            if page in self._logged:
                self._pages[page] = bytearray(self._logged[page])
            else:
                self._main.seek(page * PAGE)
                self._pages[page] = bytearray(self._main.read(PAGE).ljust(PAGE, b"\0"))
        return self._pages[page]

    # ---------------------------------------------------------------- transactions

    def overlay(self, pages: dict[int, bytearray], size: int) -> None:
        """See the file as if these pages were in it (read-only use of a file that needs its journal)."""
        self._logged, self._size = dict(pages), size

    def cover(self, page: int, content: bytearray, size: int) -> None:
        """See one page, and the length, otherwise than they are (read-only use of a damaged file)."""
        self._logged[page] = content
        self._size = size

    def recover(self) -> None:
        """Bring complete transactions of a journal left by a killed process into the file; then start it anew."""
        assert self._journal_path is not None
        if self._journal_path.exists():
            with open(self._journal_path, "rb") as journal:
                found = read_journal(journal, self._main)
            if found is not None:
                self._logged, self._size = found
                self._apply()
                os.fsync(self._main.fileno())

    def commit(self) -> None:
        """Make everything since the last commit last. On OSError (disk full) the file keeps its previous state."""
        assert self._journal_path is not None
        if self._pages or self._size != self._main_size:
            if self._journal is None:
                self._journal = open(self._journal_path, "w+b", buffering=0)  # noqa: SIM115 (lives as long as we do)
                self._journal.write(_HEADER.pack(_MAGIC, self.token, 0, zlib.crc32(bytes(8))))
            with self._commit_lock():
                self._log(self._journal)
                late = time.monotonic() - self._synced >= self.sync_seconds
                if late or self._journal.tell() > self.checkpoint_bytes:
                    self._checkpoint(self._journal)

    def _log(self, journal: BinaryIO) -> None:
        """Append what changed to the journal, as one transaction."""
        numbers = sorted(self._pages)
        body = b"".join([struct.pack(f"<{len(numbers)}Q", *numbers), *(self._pages[n] for n in numbers)])
        data = _TRANSACTION.pack(_BEGIN, len(numbers), self._size, zlib.crc32(body)) + body
        before, size_before = journal.tell(), self._main_size
        try:
            self._reserve()
            _write_all(journal, data)
        except OSError:
            with contextlib.suppress(OSError):
                journal.truncate(before)
                journal.seek(before)
                os.ftruncate(self._main.fileno(), size_before)
            raise
        self._logged.update(self._pages)
        self._pages.clear()
        self._main_size = self._size

    def _checkpoint(self, journal: BinaryIO) -> None:
        """The journal to the disk, then its pages to their places."""
        os.fsync(journal.fileno())
        self._apply()
        self._synced = time.monotonic()
        end = journal.tell()
        if end > self.checkpoint_bytes:
            os.fsync(self._main.fileno())
            end = _HEADER.size
        applied = struct.pack("<Q", end)
        journal.seek(_APPLIED)
        journal.write(applied + struct.pack("<I", zlib.crc32(applied)))
        journal.seek(end)
        journal.truncate(end)

    def _reserve(self) -> None:
        """Claim the disk space of a longer file before anything is promised, so that copying cannot run out of it."""
        if self._size > self._main_size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._main.fileno(), self._main_size, self._size - self._main_size)
            except OSError as error:  # some file systems cannot; then copying may fail, and the journal heals that
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise

    def _apply(self) -> None:
        """Copy logged pages to their places, page 0 last (see `read_journal`)."""
        main, pages = self._main, self._logged
        if os.fstat(main.fileno()).st_size != self._size:
            os.ftruncate(main.fileno(), self._size)
        runs: list[list[int]] = []
        for n in sorted(n for n in pages if n * PAGE < self._size):
            if runs and runs[-1][-1] == n - 1:
                runs[-1].append(n)
            else:
                runs.append([n])
        for run in reversed(runs):
            main.seek(run[0] * PAGE)
            _write_all(main, b"".join(pages[n] for n in run)[: self._size - run[0] * PAGE])
        pages.clear()
        self._main_size = self._size

    @contextlib.contextmanager
    def _commit_lock(self) -> Iterator[None]:
        """Keeps `snapshot` (another process that looks at the running trace) from copying half of a commit."""
        assert self._journal is not None
        if fcntl is None:
            yield
            return
        with contextlib.suppress(OSError):
            fcntl.flock(self._journal, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._journal, fcntl.LOCK_UN)

    def settle(self) -> None:
        """Bring what was committed to its place now; what was not is forgotten."""
        if self._journal is not None:
            self._pages.clear()
            with self._commit_lock():
                self._checkpoint(self._journal)

    def finish(self) -> None:
        """After the last commit: sync the file and remove the journal, which is not needed any more."""
        assert self._journal_path is not None
        self.settle()
        os.fsync(self._main.fileno())
        self.close()
        self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the journal; uncommitted changes are forgotten. The main file belongs to the caller."""
        self._closed = True
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Unbuffered files may take a part only."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


# -------------------------------------------------------------------- who may write


class Busy(Exception):
    """Another process holds the file."""


class Lock:
    """One writer, or any readers. An advisory lock on the open file, which ends with the process however that ends;
    where the file system has none, a file beside it that names the owner.
    """

    def __init__(self, file: BinaryIO, path: Path, *, shared: bool = False) -> None:
        self._file = file
        self._owner: Path | None = None
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks")
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy from error
        except OSError:
            if not shared:
                self._owner = self._own(path.with_name(path.name + ".owner"))

    @staticmethod
    def _own(owner: Path) -> Path:
        me = f"{socket.gethostname()} {os.getpid()}"
        for _ in range(2):
            try:
                with open(owner, "x", encoding="utf-8") as file:
                    file.write(me)
                return owner
            except FileExistsError:
                host, _, pid = owner.read_text(encoding="utf-8").partition(" ")
                if host != socket.gethostname() or not pid.isdigit() or _alive(int(pid)):
                    raise Busy(f"{owner} says: host {host}, process {pid}; remove it if that run is dead") from None
                owner.unlink(missing_ok=True)
        raise Busy(str(owner))

    def release(self) -> None:
        """Let others in."""
        if self._owner is not None:
            self._owner.unlink(missing_ok=True)
        elif fcntl is not None and not self._file.closed:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def snapshot(path: Path, journal_path: Path) -> tuple[BinaryIO, JournaledFile]:
    """A private copy of a file that another process is writing, as it was after one of its commits."""
    with contextlib.ExitStack() as stack:
        if journal_path.exists():
            journal = stack.enter_context(open(journal_path, "rb"))
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(journal, fcntl.LOCK_SH)  # waits for a commit that is under way, holds off the next
        copy: BinaryIO = tempfile.TemporaryFile(buffering=0)  # type: ignore[assignment]  # noqa: SIM115
        with open(path, "rb") as main:
            shutil.copyfileobj(main, copy, 1 << 20)
        return copy, with_journal(copy, journal_path)


def with_journal(main: BinaryIO, journal_path: Path) -> JournaledFile:
    """A read-only view of `main` with the complete transactions of its journal, if there is one; neither changes."""
    view = JournaledFile(main)
    if journal_path.exists():
        with open(journal_path, "rb") as journal:
            found = read_journal(journal, main)
        if found is not None:
            view.overlay(*found)
    return view

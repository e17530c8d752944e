"""Arrow files mapped into memory, whose pages are given back when they have been read.

A page that was read counts as resident memory of the process until it is needed for something else.
Giving it back costs nothing but finding it again in the cache of the system.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmgraft.atomic import atomic_write
from mmgraft.data.formats.record_files import Stamp, gone
from mmgraft.errors import UsageError

_GIVE_BACK = 16
"""Reads after which pages are given back."""
_BATCH = 1 << 20
_MOST = 4096
"""Bytes and rows of a batch of a copy, about and at most."""
_UNPACKED = 64 << 20
"""Bytes that are unpacked at a time at most, where rows are not larger."""
_BOMB, _BOMB_RATIO = 1 << 30, 1000
"""Bytes of a column of a group, and for each byte of it in the file: above both it is no data."""


class ArrowRows:
    """Rows of stream files, one behind another; opened in each process that reads them.

    Args:
        files: as `datasets` writes them.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self._maps: list[mmap.mmap] = []
        self._batches: list[Any] | None = None
        self._ends: list[int] = []
        self._read = 0

    def __len__(self) -> int:
        self._open()
        return self._ends[-1] if self._ends else 0

    def rows(self, start: int, stop: int) -> list[Any]:
        """Record batches with the rows from a number up to another.

        Raises:
            UsageError: a file is gone.
        """
        batches = self._open()
        self._read += 1
        if self._read % _GIVE_BACK == 0:
            self.give_back()
        found: list[Any] = []
        while start < stop:
            at = bisect_right(self._ends, start)
            begins = self._ends[at - 1] if at else 0
            end = min(stop, self._ends[at])
            found.append(batches[at].slice(start - begins, end - start))
            start = end
        return found

    def give_back(self) -> None:
        """Let no page of the files count as memory of this process."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _open(self) -> list[Any]:
        if self._batches is None:
            self._maps, found = [], []
            for name in self.files:
                mapped, batches = _mapped(name)
                self._maps.append(mapped)
                found += batches
            self._batches = found
            self._ends = list(accumulate(batch.num_rows for batch in found))
            self.give_back()
        return self._batches

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["files"])


def _mapped(name: str) -> tuple[mmap.mmap, list[Any]]:
    import pyarrow as pa

    try:
        with Path(name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped)))
        return mapped, [batch for batch in reader if batch.num_rows]
    except ValueError as error:  # Arrow's, and that of an empty file
        raise UsageError(
            f"{name} is damaged ({first_line(error)}); remove it, and it is made anew where it is "
            "the copy of a parquet file"
        ) from None
    except OSError as error:
        raise gone(name, error) from None


class DatasetRows:
    """Rows of a data set that are not all rows of its files in their order: a part, or a choice.

    Args:
        table: a `datasets.Dataset`.
    """

    def __init__(self, table: Any) -> None:
        self.table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, start: int, stop: int) -> list[Any]:
        """See `ArrowRows`."""
        return self.table[start:stop].to_batches()

    def give_back(self) -> None:
        """Its pages are left to the system."""


def rows_of(table: Any) -> ArrowRows | DatasetRows:
    """What reads the rows of a `datasets.Dataset`."""
    rows = ArrowRows([str(one["filename"]) for one in table.cache_files])
    # Rows that were chosen or shuffled lie in their files in another order, or not all of them.
    chosen = getattr(table, "_indices", None) is not None
    return DatasetRows(table) if chosen or len(rows) != len(table) else rows


def parquet_copy(file: str) -> Path:
    """A copy of a parquet file as an Arrow file, in the cache of `datasets`, made once.

    Rows of a parquet file lie packed in groups, which would have to be unpacked for each of them.

    Raises:
        UsageError: no parquet, or `pyarrow` is not installed.
        MMGraftError: there is no room for the copy.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from filelock import FileLock
    except ImportError:
        raise UsageError(f"{file} needs pyarrow to be read: pip install 'mmgraft[data]'") from None
    stamp = Stamp.of(file)
    name = f"{os.path.abspath(file)} {stamp.size} {stamp.time}"
    folder = _cache()
    copy = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.arrow"
    if copy.is_file():
        return copy
    try:
        source = pq.ParquetFile(file, buffer_size=_BATCH)
    except (pa.ArrowException, OSError) as error:
        raise no_table(file, error) from None

    def write(path: Path) -> None:
        schema = source.schema_arrow
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(source, file):
                writer.write_batch(batch)

    with source:
        _refuse_bomb(source.metadata, file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be made ({error}); set HF_DATASETS_CACHE") from None
        with FileLock(copy.with_suffix(".lock")):
            if not copy.is_file():  # another process may have made it meanwhile
                for left in folder.glob(f".{copy.name}.*.tmp"):
                    left.unlink()  # of one that was killed
                atomic_write(copy, write)
    pa.default_memory_pool().release_unused()
    return copy


def _batches(source: Any, file: str) -> Iterator[Any]:
    """All rows in batches of about the same bytes.

    One value of a column with a dictionary may stand in every row, and is written out in each: few
    rows are unpacked at a time where it may be large, and put together as far as they are small.
    """
    import pyarrow as pa

    head = source.metadata
    groups = [head.row_group(at) for at in range(head.num_row_groups)]
    mean = sum(group.total_byte_size for group in groups) // max(1, head.num_rows)
    worst = max((_largest_row(group) for group in groups), default=0)
    rows = max(1, min(_MOST, _BATCH // max(1, mean), _UNPACKED // max(1, worst)))
    waiting: list[Any] = []
    held = count = 0

    def together(batches: list[Any]) -> list[Any]:
        table = pa.Table.from_batches(batches, source.schema_arrow)
        return table.combine_chunks().to_batches()

    try:
        for batch in source.iter_batches(batch_size=rows, use_threads=False):
            if waiting and (held + batch.nbytes > _BATCH or count + batch.num_rows > _MOST):
                yield from together(waiting)
                waiting, held, count = [], 0, 0
            waiting.append(batch)
            held, count = held + batch.nbytes, count + batch.num_rows
        yield from together(waiting)
    except (pa.ArrowException, OSError) as error:
        raise no_table(file, error) from None


def _largest_row(group: Any) -> int:
    """Bytes of a row whose values are all that the dictionaries of a group hold, about."""
    total = 0
    for column in (group.column(at) for at in range(group.num_columns)):
        begins = column.dictionary_page_offset if column.has_dictionary_page else None
        if begins is not None:
            ratio = column.total_uncompressed_size / max(1, column.total_compressed_size)
            total += int((column.data_page_offset - begins) * max(1.0, ratio))
    return total


def _refuse_bomb(head: Any, file: str) -> None:
    for at in range(head.num_row_groups):
        for number in range(head.num_columns):
            column = head.row_group(at).column(number)
            size, packed = column.total_uncompressed_size, column.total_compressed_size
            if size > max(_BOMB, _BOMB_RATIO * packed):
                raise UsageError(
                    f"{file}: {packed:,} bytes of its column {column.path_in_schema} unpack to "
                    f"{size:,}, which is no data but could fill the memory; leave the file out"
                )


def _cache() -> Path:
    from huggingface_hub import constants

    named = os.environ.get("HF_DATASETS_CACHE")
    return (Path(named) if named else Path(constants.HF_HOME) / "datasets") / "mmgraft"


def no_table(where: str, error: BaseException) -> UsageError:
    """The error for what cannot be read as a table."""
    return UsageError(f"{where} cannot be read as a table ({first_line(error)}); correct it")


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

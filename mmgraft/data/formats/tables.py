"""Tables of rows: parquet shards, and data sets that the ``datasets`` package keeps as Arrow files.

A table lies memory-mapped on disk, so that any row is read without the others.
"""

import glob
import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmgraft.data.formats.record_files import Found, Record
from mmgraft.data.rows import HUB
from mmgraft.errors import MMGraftError, UsageError, first_line
from mmgraft.vision.images import StoredImage

#: Rows that are looked at together.
_SLICE = 256
#: Reads after which files are mapped anew.
_MAPPED_ANEW = 64
#: Rows of a parquet file that are unpacked at a time, and about how many bytes of larger rows.
_FEWEST, _MOST, _UNPACKED = 256, 4096, 64 << 20
#: Bytes of a column of a group, and for each byte of it in the file: above both it is no data.
_BOMB, _BOMB_RATIO = 1 << 30, 1000


class TableFile:
    """A table with a row a record; a record's position is its index.

    Args:
        file: Names it in errors.
        table: A ``datasets.Dataset``.
    """

    unit = "row"

    def __init__(self, file: str, table: Any) -> None:
        self.file = file
        self.table = table.with_format("arrow")
        # Of a ``ClassLabel`` the names are read, not the numbers.
        self.labels = {n: k.names for n, k in table.features.items() if hasattr(k, "names")}
        self._reads = 0

    def scan(self) -> Iterator[Found]:
        """Yield all rows."""
        for start in range(0, len(self.table), _SLICE):
            stop = min(start + _SLICE, len(self.table))
            for position, record in enumerate(self._between(start, stop), start=start):
                yield Found(position, position + 1, record)
            self._count_read()

    def read(self, position: int, number: int) -> Record:
        """Read one row."""
        (found,) = self._between(position, position + 1)
        self._count_read()
        if isinstance(found, UsageError):
            raise found
        return found

    def _count_read(self) -> None:
        """Map the files anew from time to time, or all that was read stays resident memory."""
        self._reads += 1
        if self._reads % _MAPPED_ANEW == 0:
            self.table = pickle.loads(pickle.dumps(self.table))

    def _between(self, start: int, stop: int) -> Iterator[Record | UsageError]:
        for rows in self.table[start:stop].to_batches():
            yield from self._records(rows, start + 1)
            start += rows.num_rows

    def _records(self, rows: Any, first: int) -> Iterator[Record | UsageError]:
        names = rows.schema.names
        try:
            columns = [_values(column) for column in rows.columns]
        except UnicodeDecodeError as error:
            if rows.num_rows == 1:
                yield self._bad(first, f"not UTF-8 text ({error.reason}) in it")
            else:  # which row it is is not said
                for at in range(rows.num_rows):
                    yield from self._records(rows.slice(at, 1), first + at)
            return
        for number, cells in enumerate(zip(*columns, strict=True), start=first):
            count = itertools.count(1)

            def named(number: int = number, count: Iterator[int] = count) -> str:
                return f"{self.file}, row {number}, image {next(count)}"

            try:
                data = {n: _plain(cell, named) for n, cell in zip(names, cells, strict=True)}
                data |= {n: c[data[n]] for n, c in self.labels.items() if data[n] in range(len(c))}
            except UnicodeDecodeError as error:
                yield self._bad(number, f"not UTF-8 text ({error.reason}) in it")
            except RecursionError:
                yield self._bad(number, "lists in lists, deeper than can be read")
            else:
                yield Record(data)

    def _bad(self, number: int, reason: str) -> UsageError:
        return UsageError(f"{self.file}, row {number}: {reason}; correct it")


def _values(column: Any) -> list[Any]:
    """Return cells of a column as Python values; only where there are bytes, as Arrow's own."""
    return list(column) if "binary" in str(column.type) else column.to_pylist()


def _plain(value: Any, name: Callable[[], str]) -> Any:
    """Return a cell as JSON would have it: keys without a value are left out, bytes are images.

    Every object of a table has all keys, so that nothing is said by one that is empty; the content
    of a message alone is kept, and an empty column.
    """
    import pyarrow as pa

    if isinstance(value, pa.Scalar):
        if not value.is_valid:
            return None
        if isinstance(value, pa.StructScalar):
            value = dict(value.items())
        elif isinstance(value, pa.ListScalar):  # and its subclasses
            value = list(value)
        elif pa.types.is_binary(value.type) or pa.types.is_large_binary(value.type):
            return StoredImage(name(), value.as_buffer())
        else:
            return value.as_py()
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            held = _plain(value["bytes"], name)
            return held if held is not None else _plain(value["path"], name)
        cells = {key: _plain(one, name) for key, one in value.items()}
        return {key: one for key, one in cells.items() if one is not None or key == "content"}
    return [_plain(one, name) for one in value] if isinstance(value, list) else value


def open_table(file: str, split: str, subset: str | None, revision: str | None) -> TableFile:
    """Open what ``datasets`` reads, memory-mapped from its cache.

    Args:
        file: A parquet file, a folder that ``save_to_disk`` wrote, or ``hub:OWNER/NAME``.
        split: As ``datasets`` writes it: "train", "train[:1000]".
        subset: Configuration of a set of the Hub that has several.
        revision: Branch, tag or commit of a set of the Hub.

    Raises:
        UsageError: No table, no such set, split or subset, or ``datasets`` is not installed.
        MMGraftError: It cannot be downloaded, or there is no room for it.
    """
    datasets = require_datasets(file)
    if file.startswith(HUB):
        name = file.removeprefix(HUB)
        load = partial(datasets.load_dataset, name, subset, split=split, revision=revision)
        return TableFile(file, _loaded(file, load))
    if os.path.isdir(file):
        found = _loaded(file, partial(datasets.load_from_disk, file))
        return TableFile(file, _of_split(found, file, split))
    rows = _rows_at_once(file)
    name = glob.escape(os.path.abspath(file))
    read: Any = datasets.Dataset.from_parquet
    # By itself `datasets` writes 100 rows of images a batch; to find those, all of it is mapped.
    return TableFile(
        file, _loaded(file, partial(read, name, batch_size=rows, writer_batch_size=rows))
    )


def _rows_at_once(file: str) -> int:
    """Return how many rows of a parquet file are unpacked together, and written as one batch.

    Each batch of the mapped file costs resident memory, so that they are large. A value of a
    column's dictionary may stand in every row, and is written out in each.

    Raises:
        UsageError: One of its columns could fill the memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        head = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise no_table(file, error) from None
    total = largest = 0
    for at, number in itertools.product(range(head.num_row_groups), range(head.num_columns)):
        column = head.row_group(at).column(number)
        size, packed = column.total_uncompressed_size, column.total_compressed_size
        if size > max(_BOMB, _BOMB_RATIO * packed):
            raise UsageError(
                f"{file}: {packed:,} bytes of its column {column.path_in_schema} unpack to "
                f"{size:,}, which is no data but could fill the memory; leave the file out"
            )
        total += size
        if column.has_dictionary_page and column.dictionary_page_offset is not None:
            held = column.data_page_offset - column.dictionary_page_offset
            largest = max(largest, held * size // max(1, packed))
    mean = max(1, total // max(1, head.num_rows))
    return max(_FEWEST, min(_MOST, _UNPACKED // mean, _BOMB // max(1, largest)))


def require_datasets(file: str) -> Any:
    """Import ``datasets``.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{file} needs datasets to be read: pip install 'mmgraft[data]'") from None
    return datasets


def is_saved(folder: Path) -> bool:
    """Tell whether a folder is what ``save_to_disk`` writes."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _of_split(found: Any, where: str, split: str) -> Any:
    if not hasattr(found, "keys"):  # one table; "train" is the split where nothing is set
        if split not in ("train", str(found.split)):
            raise UsageError(
                f"{where} is one set and has no split {split!r}; leave split out (limit takes its "
                "first rows), or name the folder of that split"
            )
        return found
    if split not in found:
        raise UsageError(f"{where}: no split {split!r} but {', '.join(found)}; set split to one")
    return found[split]


def _loaded(where: str, load: Callable[[], Any]) -> Any:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return load()
    # What is no table, no split, or no name raises nearly any exception.
    except Exception as error:
        cause = error.__cause__ or error
        network = type(error).__module__.split(".")[0] in ("httpx", "requests", "urllib3")
        if network or isinstance(error, ConnectionError | TimeoutError):
            raise MMGraftError(
                f"{where} cannot be downloaded ({first_line(error)}); try again"
            ) from error
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, FileNotFoundError):
            raise MMGraftError(f"{where} cannot be kept on disk ({cause}); make room") from error
        raise no_table(where, cause) from error
    finally:
        if not silent:
            enable_progress_bars()


def no_table(where: str, error: BaseException) -> UsageError:
    """Give the error for what cannot be read as a table."""
    return UsageError(f"{where} cannot be read as a table ({first_line(error)}); correct it")

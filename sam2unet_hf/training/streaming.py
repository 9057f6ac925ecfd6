"""Rows of Parquet files, for training on more than fits into memory or onto the disk."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset, Sampler

from .sampling import ForegroundShare


# Uncompressed. A row group is read as a whole, and a process holds several.
MAX_ROW_GROUP_BYTES = 512 * 2**20


class ParquetFile(NamedTuple):
    """A file and its footer, which says where its row groups lie and how many rows they have."""

    path: str
    size: int
    footer: pq.FileMetaData


class ParquetRows(Dataset):
    """Rows of Parquet files, read from a disk or the Hub when they are asked for, and never written to a disk.

    It has what training needs of a `datasets.Dataset`: `len(rows)`, `rows[3]`, `rows[3:7]`, `rows[[3, 7]]`,
    `rows["case_id"]`, `features`, `column_names`, `select_columns`, `cast_column` and `with_transform`. The numbers of
    rows come from the footers of the files.

    A row group is read as a whole, but only its selected columns, and kept, encoded, until about `shuffle_buffer`
    other rows were read. So rows should be asked for in the order of a [`RowGroupSampler`], as
    [`~training.Sam2UNetTrainer`] does.

    Args:
        paths: Files, on a disk or at any address that `fsspec` knows, such as `hf://datasets/...`.
        features: Types of the columns; from the first file by default.
        shuffle_buffer: Rows among which a [`RowGroupSampler`] shuffles.
        storage_options: For `fsspec`.

    Attributes:
        spare_groups: Row groups that are kept beside those of `shuffle_buffer`: 0, or 2 where images take in
            neighbouring slices, which may lie in the row groups before and behind.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is no Parquet, a row group is larger than 512 MiB, or there are no rows.
    """

    def __init__(
        self,
        paths: Sequence[str],
        features: datasets.Features | None = None,
        shuffle_buffer: int = 1000,
        storage_options: Mapping[str, Any] | None = None,
    ):
        if shuffle_buffer < 0:
            raise ValueError(f"`shuffle_buffer` must be a number of rows from 0 on, got {shuffle_buffer}.")
        self._storage_options = dict(storage_options or {})
        with ThreadPoolExecutor(16) as pool:
            files = list(pool.map(self._read_footer, paths))
        self._files = files
        self._groups = [(file, index) for file in files for index in range(file.footer.num_row_groups)]
        sizes = [file.footer.row_group(index).total_byte_size for file, index in self._groups]
        for (file, index), size in zip(self._groups, sizes, strict=True):
            if size > MAX_ROW_GROUP_BYTES:
                raise ValueError(
                    f"Row group {index} of `{file.path}` has {size / 2**20:.1f} MiB, which each process would hold. "
                    f"At most {MAX_ROW_GROUP_BYTES / 2**20:.3g} can be streamed. Write smaller ones, such as by "
                    "`dataset.to_parquet(path, batch_size=100)`."
                )
        # The number of the first row of each row group, and at the end that of all rows.
        self.group_starts = np.cumsum([0, *(file.footer.row_group(index).num_rows for file, index in self._groups)])
        if not len(self):
            raise ValueError(f"There are no rows in {', '.join(f'`{path}`' for path in paths[:3])}.")
        self.features = features or datasets.Features.from_arrow_schema(files[0].footer.schema.to_arrow_schema())
        self.shuffle_buffer = shuffle_buffer
        self.transform: Callable[[Any], Mapping[str, Sequence[Any]]] | None = None
        self.seeds = (0, 0)
        self.spare_groups = 0
        self._cache: dict[int, pa.Table] = {}

    def set_epoch(self, epoch: int, seed: int | None = None) -> None:
        """Let a [`RowGroupSampler`] that has no seed of its own shuffle by seed and epoch, from now on."""
        self.seeds = (self.seeds[0] if seed is None else seed, epoch)

    def with_transform(self, transform: Callable[[Any], Mapping[str, Sequence[Any]]] | None) -> "ParquetRows":
        """Return the same rows, changed by a function of batches (a list per column) when they are read."""
        return self._copy(transform=transform)

    def select_columns(self, names: Sequence[str]) -> "ParquetRows":
        """Return the same rows with these columns alone; the others are not read."""
        if missing := [name for name in names if name not in self.features]:
            raise KeyError(f"There is no column {missing[0]}, only {', '.join(self.features)}.")
        return self._copy(features=datasets.Features({name: self.features[name] for name in names}))

    def cast_column(self, name: str, feature: Any) -> "ParquetRows":
        """Return the same rows with a column read as another type, such as `datasets.Image(decode=False)`."""
        return self._copy(features=datasets.Features({**self.features, name: feature}))

    def _copy(self, **changed: Any) -> "ParquetRows":
        rows = copy.copy(self)
        rows.__dict__.update(changed)
        rows._cache = {}
        return rows

    def head(self, count: int) -> datasets.Dataset:
        """Return the first rows in memory, at most those of the first row group."""
        table = self._read_group(0).select(self.column_names).slice(0, count)
        return datasets.Dataset(table.cast(self.features.arrow_schema), datasets.DatasetInfo(features=self.features))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the files' names, sizes and footers, which tell sizes of row groups and columns."""
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(f"{file.path.rsplit('/', 1)[-1]} {file.size} {file.footer.to_dict()}".encode())
        return digest.hexdigest()

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.features)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows in these columns, encoded."""
        groups = [file.footer.row_group(index) for file, index in self._groups]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        # Such as `flair.bytes` and `flair.path`.
        own = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in self.features]
        return sum(chunk.total_uncompressed_size for chunk in own)

    def __len__(self) -> int:
        return int(self.group_starts[-1])

    def __getitem__(self, key: int | slice | Sequence[int] | str) -> Any:
        if isinstance(key, np.integer):
            key = int(key)
        if isinstance(key, str):
            return self._read_column(key)
        if isinstance(key, slice):
            return self._batch(range(*key.indices(len(self))))
        if isinstance(key, int):
            return {name: values[0] for name, values in self._batch([key]).items()}
        return self._batch(key)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch, for PyTorch."""
        batch = self._batch(indices)
        return [{name: values[row] for name, values in batch.items()} for row in range(len(indices))]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def _batch(self, indices: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        examples = [self._row(index) for index in indices]
        batch = {name: [example[name] for example in examples] for name in self.features}
        if self.transform is None:
            return batch
        try:
            return self.transform(batch)
        except (OSError, SyntaxError, ValueError) as err:
            raise ValueError(f"One of the rows {', '.join(map(self.describe_row, indices))}: {err}") from err

    def _row(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no row {index}, there are {len(self)}.")
        index %= len(self)
        group = self._group_of(index)
        (example,) = self._cached_group(group).slice(index - self.group_starts[group], 1).to_pylist()
        for name, feature in self.features.items():
            image = example[name] if isinstance(feature, datasets.Image) else None
            if image is not None and image["bytes"] is None:  # `datasets` would open any path
                raise ValueError(
                    f"Row {self.describe_row(index)} names the file {image['path']} in column {name!r}, not an "
                    "image. Write the images into the rows, as `to_parquet` does."
                )
        try:
            return self.features.decode_example(example)
        except (OSError, SyntaxError, ValueError) as err:  # what Pillow raises
            raise ValueError(f"Row {self.describe_row(index)} cannot be decoded: {err}") from err

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.group_starts, index, side="right")) - 1

    def describe_row(self, index: int) -> str:
        """Say where a row is to be found."""
        group = self._group_of(index)
        file, number = self._groups[group]
        return f"{index} (row {index - self.group_starts[group - number]} of `{file.path}`)"

    def _cached_group(self, group: int) -> pa.Table:
        """Return a row group, read if it is not among those used last."""
        table = self._cache.pop(group, None)
        self._cache[group] = table = self._read_group(group) if table is None else table
        limit = self.shuffle_buffer + (1 + self.spare_groups) * int(np.diff(self.group_starts).max())
        while len(self._cache) > 1 and sum(map(len, self._cache.values())) > limit:
            del self._cache[next(iter(self._cache))]
        return table

    def _open(self, path: str, size: int | None = None) -> Any:
        file_system, path = fsspec.core.url_to_fs(path, **self._storage_options)
        # Each read asks for all that it needs; what `fsspec` reads ahead would be read twice.
        return file_system.open(path, "rb", cache_type="none", **({} if size is None else {"size": size}))

    def _read_footer(self, path: str) -> ParquetFile:
        with self._open(path) as file:
            size = file.seek(0, 2)
            try:
                return ParquetFile(path, size, pq.read_metadata(file))
            except pa.ArrowInvalid as err:
                raise ValueError(f"`{path}` is no Parquet file: {err}") from err

    def _read_group(self, group: int) -> pa.Table:
        file, index = self._groups[group]
        with self._open(file.path, file.size) as opened:
            parquet = pq.ParquetFile(opened, metadata=file.footer, pre_buffer=True)
            return parquet.read_row_group(index, columns=self.column_names, use_threads=False)

    def _read_column(self, name: str) -> list[Any]:
        if name not in self.features:
            raise KeyError(f"There is no column {name}, only {', '.join(self.features)}.")
        values: list[Any] = []
        for file in self._files:
            with self._open(file.path, file.size) as opened:
                parquet = pq.ParquetFile(opened, metadata=file.footer)
                values += parquet.read(columns=[name], use_threads=False)[name].to_pylist()
        return self.features.decode_column(values, name)


class RowGroupSampler(Sampler[int]):
    """Orders rows so that each row group is read once, by one process and one worker of its `DataLoader`.

    Rows are laid out row group after row group, in random order with `shuffle`, and cut into as many equal shares as
    there are readers; a row group is read by two of them only where a cut goes through it. Within a share, row groups
    of together at least `shuffle_buffer` rows are then shuffled. Batches are taken from the shares in turn, because
    accelerate deals batches out to processes in turn, and PyTorch to workers. The workers of a process have shares
    side by side, so those of the processes, which make a step, lie apart. The last rows, too few for a batch of each
    reader, are dealt out as they lie, and their row groups read by each who gets some. Whoever deals otherwise gets
    each row once, too, but reads more.

    Args:
        rows: The rows.
        batch_size: Rows in a batch.
        num_processes: Processes that train.
        num_workers: Workers of each process's `DataLoader`.
        shuffle: Shuffle.
        seed: For the order. By default it depends on `rows.set_epoch`.
        foreground: Chooses the rows of an epoch, by its own seed and epoch unless `seed` is given. By default these
            are all rows.
    """

    def __init__(
        self,
        rows: ParquetRows,
        batch_size: int,
        num_processes: int = 1,
        num_workers: int = 0,
        shuffle: bool = False,
        seed: int | None = None,
        foreground: ForegroundShare | None = None,
    ):
        self.rows = rows
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.num_workers = max(num_workers, 1)
        self.num_shares = self.num_processes * self.num_workers
        self.shuffle = shuffle
        self.seed = seed
        self.foreground = foreground

    def __len__(self) -> int:
        return len(self.rows if self.foreground is None else self.foreground)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> np.ndarray:
        """Return the numbers of all rows, or of those that are chosen for the epoch, of shape `(rows,)`."""
        starts = self.rows.group_starts
        groups = np.arange(len(starts) - 1)
        generator = np.random.default_rng(self.rows.seeds if self.seed is None else self.seed)
        if self.shuffle:
            generator.shuffle(groups)
        order = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
        sizes, held = np.diff(starts), self.rows.shuffle_buffer
        if self.foreground is not None:
            is_chosen = np.zeros(len(order), bool)
            seeds = self.foreground.seeds if self.seed is None else (self.seed, 0)
            is_chosen[self.foreground.choose(*seeds)] = True
            sizes = np.diff(np.cumsum([0, *is_chosen])[starts])
            held = held * len(self) // len(order)  # the rows that are not chosen are held, too
            order = order[is_chosen[order]]
        bounds = np.cumsum([0, *sizes[groups]])
        # What is too little for a batch of each reader; a single one reads it anyway.
        rest = len(order) % (self.num_shares * self.batch_size) if self.num_shares > 1 else 0
        dealt = len(order) - rest
        shares = order[:dealt].reshape(self.num_shares, -1)
        if self.shuffle:
            for number, share in enumerate(shares):
                self._shuffle_blocks(share, bounds - number * len(share), held, generator)
            self._shuffle_blocks(order[dealt:], bounds - dealt, 0, generator)
        if self.num_shares > 1:
            # Each process takes a batch for its first worker, then each one for its second.
            batches = shares.reshape(self.num_processes, self.num_workers, -1, self.batch_size)
            order[:dealt] = batches.transpose(2, 1, 0, 3).flatten()
        return order

    @staticmethod
    def _shuffle_blocks(rows: np.ndarray, bounds: np.ndarray, size: int, generator: np.random.Generator) -> None:
        """Shuffle row groups of together at least `size` rows, in place.

        Row groups begin and end at `bounds`, counted from the first of these rows, which may lie within one.
        """
        start = 0
        held_from = bounds[bounds <= 0].max()  # a row group is held as a whole
        for end in [*bounds[(bounds > 0) & (bounds < len(rows))], len(rows)]:
            if end - held_from >= size or end == len(rows):
                generator.shuffle(rows[start:end])
                start = held_from = end


def open_parquet(name: str, config_name: str | None = None, shuffle_buffer: int = 1000) -> dict[str, ParquetRows]:
    """Open the splits of a data set of Parquet files, without downloading it.

    Args:
        name: Hub id, or folder.
        config_name: Configuration of the data set.
        shuffle_buffer: Rows among which a [`RowGroupSampler`] shuffles.

    Returns:
        Rows by split.

    Raises:
        OSError: If there is no such data set, or it cannot be reached.
        ValueError: If it is not made of Parquet files, or they cannot be streamed.
    """
    builder = datasets.load_dataset_builder(name, config_name)
    splits = {}
    for split, files in (builder.config.data_files or {}).items():
        paths = [str(path) for path in files]
        if other := [path for path in paths if not path.endswith(".parquet")]:
            raise ValueError(
                f"Only Parquet files can be streamed, got `{other[0]}`. Write each split by `to_parquet`, or the data "
                "set to the Hub by `push_to_hub`."
            )
        protocol = paths[0].split("://")[0] if "://" in paths[0] else "file"
        options = (builder.storage_options or {}).get(protocol)
        splits[str(split)] = ParquetRows(paths, builder.info.features, shuffle_buffer, options)
    return splits


__all__ = ["ParquetRows", "RowGroupSampler", "open_parquet"]

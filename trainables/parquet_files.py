"""Finds the parquet files of a split, as on Hugging Face, and reads their images and labels.

A file belongs to the split after which it or a folder above it is named: `train-00000-of-00002.parquet`,
`train/0000.parquet`. It has an image column (a struct of bytes and path, or binary) and a label column of integers;
images stay encoded here, `trainables.image_files` decodes them. A missing shard is an error, never a smaller data set.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainables import plugins
from trainables.errors import DataError


def find(name: str, place: Path, *splits: str) -> list[Path]:
    """Parquet files below `place` of the first of the splits that has any, sorted; all shards must be there.

    Folders of other data sets' names are left out, so that a folder which holds only MNIST is no Fashion-MNIST.

    Raises:
        DataError: a shard is missing, or several folders hold the split.
    """
    others = {plain(other) for other in plugins.describe("trainables.data")} - {plain(name)}
    files = [
        path
        for path in sorted(place.rglob("*.parquet"))
        if not others & {plain(part) for part in path.relative_to(place).parts[:-1]}
    ]
    for split in splits:
        homes = {path: _home(path, place, split) for path in files}
        found = [path for path, home in homes.items() if home]
        folders = sorted({str(home) for home in homes.values() if home})
        if len(folders) > 1:
            raise DataError(f"{split} parquet files of {name} lie in {' and '.join(folders)}; name one of them")
        _check_shards(found)
        if found:
            return found
    return []


def find_beside(name: str, place: Path, *splits: str) -> list[Path]:
    """As `find`, where those for training were found: there must be some.

    Raises:
        DataError: as `find`, or there are none.
    """
    files = find(name, place, *splits)
    if not files:
        raise DataError(f"no parquet file named {' or '.join(splits)} in {place}, beside those for training; add it")
    return files


def plain(name: str) -> str:
    """A data set's or a folder's name as they are compared: `CIFAR-10` is `cifar10`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _home(path: Path, place: Path, split: str) -> Path | None:
    """The folder that holds the split to which the file belongs: its own, or the one above a folder named `split`."""
    if re.match(rf"{split}(?![a-z])", path.name.lower()):
        return path.parent
    above = [place / part for part in path.relative_to(place).parents]
    return next((folder.parent for folder in above if folder != place and folder.name.lower() == split), None)


def _check_shards(files: list[Path]) -> None:
    numbered = [(path, match) for path in files if (match := re.search(r"-(\d+)-of-(\d+)\.parquet$", path.name))]
    for path, match in numbered:
        if len(numbered) != int(match[2]):
            raise DataError(
                f"{path.parent} holds {len(numbered)} of the {int(match[2])} files of {path.name}; add the rest"
            )


@dataclass(frozen=True)
class ParquetFile:
    """One parquet file with an image and a label column.

    Attributes:
        path: where it is.
        groups: number of rows of each row group.
        image: name of the image column.
        label: name of the label column.
    """

    path: Path
    groups: tuple[int, ...]
    image: str
    label: str

    @classmethod
    def open(cls, path: Path) -> "ParquetFile":
        """Looks at the file's schema.

        Raises:
            DataError: not a parquet file, or one without such columns.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a readable parquet file ({error}); fetch it again") from error
        images = [column.name for column in schema if _holds_images(column.type)]
        labels = [column.name for column in schema if pa.types.is_integer(column.type)]
        return cls(
            path,
            groups,
            _column(path, "image", images, ("image", "img"), schema.names),
            _column(path, "label", labels, ("label", "labels"), schema.names),
        )

    def images(self, group: int | None = None) -> list[bytes | None]:
        """Encoded images of one row group, or of all."""
        return self._values(self.image, group)

    def images_with_rows(self) -> Iterator[tuple[bytes | None, str]]:
        """All encoded images, each with words for where it was."""
        for row, data in enumerate(self.images()):
            yield data, f"{self.path}, row {row}"

    def labels(self, classes: int) -> np.ndarray:
        """All labels, int64 (n,), checked to be 0..classes - 1."""
        values = self._values(self.label)
        if None in values:
            raise DataError(f"{self.path}, row {values.index(None)}: no label; it is one of 0..{classes - 1}")
        labels = np.array(values, dtype=np.int64)
        check_labels(labels, self.path, classes)
        return labels

    def _values(self, column: str, group: int | None = None) -> list[Any]:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                wanted = [column]
                table = file.read(wanted) if group is None else file.read_row_group(group, wanted)
        except (pa.ArrowException, OSError) as error:
            where = self.path if group is None else f"{self.path}, row group {group},"
            raise DataError(f"{where} cannot be read ({error}); fetch it again") from error
        values = table.column(0)
        return (pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values).to_pylist()


def check_labels(labels: np.ndarray, source: Path, classes: int) -> None:
    """Refuses labels outside 0..classes - 1, naming the first row that has one."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        row = wrong[0]
        raise DataError(
            f"{source}, row {row}: label {labels[row]} is outside 0..{classes - 1}; is it another data set?"
        )


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _column(path: Path, what: str, fitting: list[str], preferred: Sequence[str], names: list[str]) -> str:
    named = [name for name in preferred if name in fitting]
    if not named and len(fitting) != 1:
        raise DataError(f"{path} has no {what} column among {', '.join(names)}; name it {preferred[0]!r}")
    return (named or fitting)[0]

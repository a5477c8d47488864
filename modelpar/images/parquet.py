"""Images in Parquet files as Hugging Face stores them: a column ``image`` and a column ``label``.

pyarrow is imported when the first file is opened.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from modelpar.errors import DataError, readable

ENDING: Final = ".parquet"
AGAIN: Final = "download it again"


def find_shards(folder: Path, parts: Sequence[str]) -> list[Path]:
    """Return the files ``PART-00000-of-00005*.parquet`` of the first of ``parts`` that has any.

    Raises DataError if there are none, or not as many as their names say.
    """
    found = next((one for part in parts if (one := sorted(folder.glob(_names(part))))), [])
    if not found:
        raise DataError(f"{folder}: no {' or '.join(map(_names, parts))}; {AGAIN}")
    total = found[0].stem.split("-")[3]
    with readable(f"{found[0]}: is not named PART-00000-of-00005{ENDING}", "rename it"):
        numbers = [int(path.stem.split("-")[1]) for path in found]
        if numbers != list(range(int(total))):
            raise DataError(
                f"{folder}: {len(found)} files {found[0].stem.partition('-')[0]}-*-of-{total}*, "
                f"and there are {int(total)}; {AGAIN}"
            )
    return found


def _names(part: str) -> str:
    return f"{part}-*-of-*{ENDING}"


def class_names(path: Path) -> list[str]:
    """Return the names of the classes; raises DataError if the file has no images and labels."""
    needs = "needs a column image with bytes, a column label and the names of its classes"
    with readable(f"{path}: {needs}", AGAIN):
        with _opened(path) as file:
            schema = file.schema_arrow
        schema.field("image").type.field("bytes")
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]


def read_labels(path: Path, classes: Sequence[str]) -> list[int]:
    """Return the label of each row; raises DataError for one that is not of ``classes``."""
    if class_names(path) != classes:
        raise DataError(f"{path}: its classes are not those of the other files; {AGAIN}")
    with readable(f"{path}: the labels cannot be read", AGAIN), _opened(path) as file:
        labels = file.read(columns=["label"])["label"].cast("int64").to_pylist()
    for row, label in enumerate(labels):
        if label not in range(len(classes)):
            raise DataError(f"{path}: row {row} has the label {label}, of {len(classes)}; {AGAIN}")
    return labels


def read_row(path: str, row: int) -> bytes:
    """Return the image of a row; raises ValueError or what pyarrow raises.

    The last row group is kept in memory, so rows are best read in their order.
    """
    ends = _ends(path)
    group = bisect_right(ends, row)
    content = _images(path, group)[row - (ends[group - 1] if group else 0)].as_py()["bytes"]
    if content is None:
        raise ValueError("the row has no bytes")
    return content


def _opened(path: Path | str) -> Any:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path}: needs pyarrow; pip install 'modelpar[parquet]'") from None
    return parquet.ParquetFile(path)


@lru_cache(maxsize=1024)  # ImageNet has 308 files
def _ends(path: str) -> list[int]:
    """Return the number of rows up to the end of each row group."""
    with _opened(path) as file:
        groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
        return list(accumulate(group.num_rows for group in groups))


@lru_cache(maxsize=1)
def _images(path: str, group: int) -> Any:
    with _opened(path) as file:
        return file.read_row_group(group, columns=["image.bytes"], use_threads=False)["image"]

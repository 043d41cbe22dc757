"""Reading tables: CSV, TSV and Parquet. Each problem is one message with the file, the place and what to do."""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlx_esm_hf.checks import nearest, suggestion
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.outputs import check_library

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT = "text"
# {first bytes of a file: what it is, and what to do}
FOREIGN = {
    b"\x1f\x8b": "compressed with gzip. Decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard. Decompress it first",
    b"PK\x03\x04": "a zip archive or an Excel workbook. Save the table as CSV",
    b"PAR1": "a Parquet file, not CSV. Rename it, or save the table as CSV",
    codecs.BOM_UTF32_BE: "UTF-32. Save the table as UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16. Save the table as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16. Save the table as UTF-8",
}


class Table(NamedTuple):
    """A table that is read row by row.

    Attributes:
        columns: the names of all its columns.
        types: what each wanted column contains: "text", "integers", "booleans", "numbers", or another Arrow type.
        rows: the place of each row, for messages, and {column: text} with at least the wanted columns. A missing value
            is "".
    """

    columns: list[str]
    types: dict[str, str]
    rows: Iterator[tuple[str, dict[str, str]]]


def open_table(path: str | os.PathLike[str], **wanted: str) -> Table:
    """Open a `.csv`, `.tsv` or `.parquet` file.

    Args:
        path: the file.
        wanted: {what: name of its column}; the option `--what-column` chooses the name.

    Raises:
        UserError: the suffix is unknown, or the file is damaged, has another format or encoding, or lacks a column.
            Reading `rows` raises it as well.
        OSError: the file cannot be opened.
    """
    suffix = Path(path).suffix
    if suffix == ".parquet":
        return _open_parquet(path, wanted)
    if suffix not in DELIMITERS:
        what = f"`{suffix}`" if suffix else "a file without a suffix"
        hint = suggestion(suffix, [*DELIMITERS, ".parquet"])
        raise UserError(f"{path}: can't read {what}. Use .csv, .tsv or .parquet.{hint}")
    return open_csv(path, DELIMITERS[suffix], **wanted)


def open_csv(path: str | os.PathLike[str], delimiter: str = ",", **wanted: str) -> Table:
    """Open a CSV file, whatever its suffix. See `open_table`."""
    records = _records(path, _read_text(path), delimiter)
    _, columns = next(records, (1, []))
    if len(columns) == 1 and (others := [d for d in ",;\t|" if d != delimiter and d in columns[0]]):
        raise UserError(f"{path}, line 1: got {others[0]!r}. Values must be separated by {delimiter!r}.")
    _require(path, columns, wanted)
    return Table(columns, dict.fromkeys(wanted.values(), TEXT), _csv_rows(path, columns, records))


def _csv_rows(
    path: str | os.PathLike[str], columns: list[str], records: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[str, dict[str, str]]]:
    for line, values in records:
        if len(values) == len(columns):
            yield f"{path}, line {line}", dict(zip(columns, values, strict=True))
        elif "".join(values).strip():
            raise UserError(f"{path}, line {line}: expected {len(columns)} columns, got {len(values)}.")


def _read_text(path: str | os.PathLike[str]) -> str:
    data = Path(path).read_bytes()
    for start, what in FOREIGN.items():
        if data.startswith(start):
            raise UserError(f"{path} is {what}.")
    if len(data) > 1 and not (any(data[:64:2]) and any(data[1:64:2])):
        raise UserError(f"{path} is UTF-16. Save the table as UTF-8.")
    try:
        if (place := data.find(0)) >= 0:
            raise UserError(f"{path}, line {_line(data, place)}: contains a NUL byte. Remove it.")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"0x{data[error.start]:02X}"
        raise UserError(
            f"{path}, line {_line(data, error.start)}: not UTF-8 (byte {byte}). Save the table as UTF-8."
        ) from None


def _line(data: bytes, place: int) -> int:
    return len(data[:place].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))


def _records(path: str | os.PathLike[str], text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the values of each record and the line where it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: {_explained(str(error))}.") from None
        yield line, values


def _explained(error: str) -> str:
    if "end of data" in error:
        return 'a quote (") is not closed'
    if "field limit" in error:
        return f'a value has more than {csv.field_size_limit():,} characters. Is a quote (") not closed?'
    return f"{error}. Write a quote inside a quoted value twice"


def _open_parquet(path: str | os.PathLike[str], wanted: dict[str, str]) -> Table:
    check_library(path)
    import pyarrow.parquet as parquet

    with _reporting_damage(path):
        schema = parquet.read_schema(path)
    _require(path, schema.names, wanted)
    types = {name: _type_name(schema.field(name).type) for name in wanted.values()}
    return Table(schema.names, types, _parquet_rows(path, list(types)))


def _parquet_rows(path: str | os.PathLike[str], names: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    import pyarrow.parquet as parquet

    with _reporting_damage(path):
        rows = parquet.ParquetFile(path).read(columns=names).select(names).to_pylist()
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", {name: "" if value is None else str(value) for name, value in row.items()}


@contextmanager
def _reporting_damage(path: str | os.PathLike[str]) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except FileNotFoundError:
        raise
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a Parquet file, or it is damaged ({str(error).splitlines()[0]}).") from error


def _type_name(arrow_type: Any) -> str:
    from pyarrow import types

    if types.is_dictionary(arrow_type):
        return _type_name(arrow_type.value_type)
    text = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if any(is_text(arrow_type) for is_text in text):
        return TEXT
    if types.is_integer(arrow_type):
        return "integers"
    if types.is_boolean(arrow_type):
        return "booleans"
    if types.is_floating(arrow_type) or types.is_decimal(arrow_type):
        return "numbers"
    return str(arrow_type)


def _require(path: str | os.PathLike[str], columns: Sequence[str], wanted: dict[str, str]) -> None:
    for what, name in wanted.items():
        if not columns:
            raise UserError(f"No column {name!r} in {path}: its first line is empty.")
        if name not in columns:
            likely = columns[0] if len(columns) == 1 else next(iter(nearest(name, columns)), "NAME")
            raise UserError(
                f"No column {name!r} in {path} (columns: {', '.join(columns)}). Pass `--{what}-column {likely}`."
            )
    refuse_repeated(path, [name for name in columns if name in wanted.values()])


def refuse_repeated(path: str | os.PathLike[str], columns: Sequence[str]) -> None:
    """Refuse columns of the same name.

    Raises:
        UserError: two columns have the same name.
    """
    if repeated := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{path}: two columns are named {repeated[0]!r}. Rename one.")

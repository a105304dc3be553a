"""Rows of text files, saved datasets and hub datasets, each with its origin.

Imports no torch, and `datasets` only for datasets on the hub.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlinf_core import UserError
from rlinf_core.hub import local_path, parse_hub_id
from rlinf_core.untrusted.text import NotAFileError, check_file, not_a_file, parse_json, path_inside, read_json
from rlinf_plugins_text.rows.dataset import TextDatasetConfig

SPLITS, STATE = "dataset_dict.json", "state.json"
"""Descriptions in the folders of `save_to_disk`: of several splits, and of one."""
TextRow = tuple[str, dict[str, Any]]
"""Origin of a row, for messages, and the row itself."""


def read_rows(config: TextDatasetConfig, *, held_out: bool = False) -> Iterator[TextRow]:
    """All rows of a dataset, in the order of its files.

    Args:
        config: Which dataset.
        held_out: Read `validation_files` or `validation_split` instead of the rows to train on.

    Raises:
        UserError: A file is missing or cannot be read; the message names it with the line.
    """
    path = local_path(config.repo_id, "data.repo_id")
    if path is None:
        yield from _from_hub(config, config.validation_split if held_out else config.split)
        return
    wrong = [name for name in ("subset", "validation_split", "revision") if getattr(config, name)]
    wrong += ["split"] * (config.split != "train")
    if wrong := [name for name in wrong if not _is_saved(path) or name in ("subset", "revision")]:
        raise UserError(f"data.{wrong[0]} is for datasets on the hub, but {path} is a file or folder: remove it")
    files = _held_out_files(config, path) if held_out else text_files(config)
    for file in files:
        try:
            yield from READERS[file.suffix.lower()](file)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error}") from error


def text_files(config: TextDatasetConfig) -> list[Path]:
    """The local files to train on; empty for a dataset on the hub."""
    path = local_path(config.repo_id, "data.repo_id")
    if path is None:
        return []
    if _is_saved(path) and not config.files:
        return _saved_files(path, config.split, "data.split")
    found = _in_folder(path, config.files, "data.files") if path.is_dir() else [path]
    if path.is_file() and config.files:
        raise UserError(f"data.files: data.repo_id = {config.repo_id} is already a file; set only one of them")
    if path.suffix.lower() not in READERS and path.is_file():
        raise UserError(f"data.repo_id: {path} is not one of {', '.join(READERS)}")
    held_out = set(_held_out_files(config, path)) if config.validation_files else set()
    files = [file for file in found if file not in held_out]
    if not files:
        raise UserError(f"data.repo_id: {path} contains no file to train on ({', '.join(READERS)})")
    return files


def all_files(config: TextDatasetConfig) -> list[Path]:
    """All local files of a dataset, those held out last."""
    path = local_path(config.repo_id, "data.repo_id")
    return [] if path is None else text_files(config) + _held_out_files(config, path)


def _held_out_files(config: TextDatasetConfig, path: Path) -> list[Path]:
    if config.validation_split and _is_saved(path):
        return _saved_files(path, config.validation_split, "data.validation_split")
    patterns = config.validation_files
    beside = [Path(one).expanduser() for one in patterns if Path(one).expanduser().is_file()]
    inside = tuple(one for one in patterns if not Path(one).expanduser().is_file())
    if inside and not path.is_dir():
        raise UserError(f"data.validation_files: no file {inside[0]} (working directory: {Path.cwd()})")
    return beside + (_in_folder(path, inside, "data.validation_files") if inside else [])


def _in_folder(folder: Path, patterns: Sequence[str], setting: str) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns or ("**/*",):
        matches = [folder / one for one in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]
        readable = [one for one in matches if not one.is_dir() and one.suffix.lower() in READERS]
        for one in readable:
            if one.exists() and not one.is_file():
                raise UserError(
                    f"{setting}: {one} cannot be read: it is {not_a_file(one.stat())}, not a file. Remove it"
                )
        readable = [one for one in readable if one.is_file()]
        if patterns and not readable:
            raise UserError(f"{setting}: no readable file in {folder} matches {pattern!r}")
        found |= dict.fromkeys(readable)
    return list(found)


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    return (path / SPLITS).is_file() or ((path / STATE).is_file() and (path / "dataset_info.json").is_file())


def _saved_files(path: Path, split: str, setting: str) -> list[Path]:
    """The Arrow files of a split of such a folder; `datasets` itself would also restore pickled objects.

    Raises:
        UserError: There is no such split, or its description is damaged.
    """
    file = path / SPLITS
    try:
        if file.is_file():
            splits = read_json(file)["splits"]
            if split not in splits:
                raise UserError(f"{setting}: {path} has no split {split!r} (available: {', '.join(map(str, splits))})")
            path = path_inside(path, split)
        elif setting == "data.validation_split" or split != "train":
            raise UserError(f"{setting}: {path} has a single split: remove this setting")
        file = path / STATE
        state = read_json(file)
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise UserError(f"{path} selects rows by an index: save it again with a newer version of datasets")
        return [path_inside(path, one["filename"]) for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def _from_jsonl(path: Path) -> Iterator[TextRow]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", _object(line, f"{path}, line {number}")


def _from_json(path: Path) -> Iterator[TextRow]:
    with _opened(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):  # JSON lines with the wrong suffix.
        yield from _from_jsonl(path)
        return
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a row must be an object of columns")
        yield f"{path}, row {number}", row


def _from_csv(path: Path) -> Iterator[TextRow]:
    csv.field_size_limit(2**31 - 1)  # The default limit is 128 kB.
    with _opened(path, newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: the number of fields differs from the header's: {', '.join(map(str, row))}")
            yield where, row


def _from_parquet(path: Path) -> Iterator[TextRow]:
    import pyarrow

    from rlinf_core.untrusted.parquet import open_parquet, read_batches

    try:
        with open_parquet(path) as file:
            number = 0
            for batch in read_batches(file, path):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _from_arrow(path: Path) -> Iterator[TextRow]:
    """A file of `datasets`: a stream of record batches, or Arrow's file format."""
    import pyarrow
    from pyarrow import ipc

    try:
        check_file(path)
        with pyarrow.memory_map(str(path)) as file:
            try:
                reader: Any = ipc.open_stream(file)
                batches = iter(reader)
            except pyarrow.ArrowInvalid:
                reader = ipc.open_file(file)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            number = 0
            for batch in batches:
                batch.validate(full=True)  # Reading offsets of a damaged file may end the process.
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _from_txt(path: Path) -> Iterator[TextRow]:
    """One text per paragraph; paragraphs are separated by empty lines."""
    with _opened(path) as file:
        text = file.read()
    for number, paragraph in enumerate(filter(str.strip, text.split("\n\n"))):
        yield f"{path}, paragraph {number}", {"text": paragraph.strip("\n")}


READERS: dict[str, Callable[[Path], Iterator[TextRow]]] = {
    ".jsonl": _from_jsonl,
    ".json": _from_json,
    ".parquet": _from_parquet,
    ".arrow": _from_arrow,
    ".csv": _from_csv,
    ".txt": _from_txt,
}
"""Suffix -> function that reads such files."""


def _from_hub(config: TextDatasetConfig, split: str) -> Iterator[TextRow]:
    for number, row in enumerate(_load_from_hub(config, split)):
        yield f"{config.repo_id}, {split}, row {number}", row


def _load_from_hub(config: TextDatasetConfig, split: str) -> Any:
    from datasets import load_dataset

    repository, revision = parse_hub_id(config.repo_id)
    if config.validation_files:
        raise UserError("data.validation_files is for local files; for a dataset on the hub set data.validation_split")
    if config.revision and revision:
        raise UserError(f"data.repo_id gives the revision {revision}, data.revision another one: set only one of them")
    try:
        return load_dataset(
            repository,
            config.subset or None,
            split=split,
            revision=config.revision or revision,
            data_files=list(config.files) or None,
        )
    except (OSError, ValueError, KeyError) as error:  # Raised by `datasets` and the hub's client.
        reason = (str(error).strip() or "-").splitlines()[0]
        raise UserError(
            f"data.repo_id: {config.repo_id!r} is not a file or folder (working directory: {Path.cwd()}), and its "
            f"split {split!r} could not be loaded from the hub ({type(error).__name__}: {reason}). Check the id, "
            "data.subset, data.split and the connection, or give a local file or folder"
        ) from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a line must be an object of columns, not {type(row).__name__}")
    return row


def _opened(path: Path, newline: str | None = None) -> Any:
    try:
        check_file(path)
    except NotAFileError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return path.open(encoding="utf-8-sig", newline=newline)


def content_tag(config: TextDatasetConfig) -> list[Any]:
    """A value that changes with the rows: files with sizes and times, or the fingerprint of a hub dataset."""
    if not config.repo_id:
        raise UserError("data.repo_id: give a file, a folder, or a dataset on the hub")
    if local_path(config.repo_id, "data.repo_id") is not None:
        files = [(path.resolve(), path.stat()) for path in all_files(config)]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files]
    splits = [config.split, *filter(None, [config.validation_split])]
    return [_load_from_hub(config, split)._fingerprint for split in splits]

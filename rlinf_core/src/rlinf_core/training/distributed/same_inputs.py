"""Require that all machines of a run have the same inputs: config, code, data, weights, tokenizer, statistics.

A machine with an older copy of a dataset would train on a mixture of both copies. So one process of each machine makes
digests of what it sees, and all compare them with those of rank 0 in one gather of a few hundred bytes per machine.
Only if some differ are files compared one by one, to name them. Times are never compared.

Covered in full: the config, Python sources of core and of the run's plugins, the rows (`SampleSource.fingerprint`),
small files. Sampled: files above `WHOLE` bytes, by size and `BLOCKS` blocks spread evenly, which finds other weights or
another version but not a single flipped bit; videos and other image files, by size and three parts.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlinf_core.config.toml import dotted, leaves
from rlinf_core.contract.datasets import DatasetConfig, FileSource, SampleSource
from rlinf_core.contract.process_group import ProcessGroup
from rlinf_core.contract.run import RunConfig
from rlinf_core.data.images.evidence import evidence_of_images
from rlinf_core.errors import UserError
from rlinf_core.plugins.owners import CORE, Owner
from rlinf_core.shared_files import name_process

BLOCK, BLOCKS = 1 << 16, 64
WHOLE = BLOCK * BLOCKS
"""Bytes up to which a file is read in full."""
LISTED = 5
"""An error lists at most this many files or keys."""
OWN_SETTINGS = ("cluster.", "loggers.", "runner.output_dir", "runner.checkpoint_dir")
"""Settings that may differ between machines, besides names of existing files: what only rank 0 or the launcher reads,
and folders, which `shared_folder` checks."""
OWN_KEYS = ("num_workers", "cache_dir", "download_limit_gb")
"""Last parts of keys that may differ between machines: they change no sample."""


@dataclass(frozen=True)
class Input:
    """Something that all machines must have alike, as this machine sees it."""

    digest: str
    """A digest of its content; empty: this machine does not have it, and it is not compared."""
    where: str
    """What this machine reads, for messages."""
    files: Callable[[], Mapping[str, str]]
    """Name -> digest of each of its files; only called if digests differ."""


def check_same_program(run: RunConfig, owners: Iterable[Owner], group: ProcessGroup) -> None:
    """Raise `UserError` on every rank if config, plugins, core or torch differ between the machines of a run."""
    if not _several_machines(group):
        return
    _compare_configs(run, group)
    way_out = "Install the same versions on all machines: one environment on a shared folder, or one image"
    _compare(group, dict(_program(run, owners)) if _is_first() else {}, way_out)


def check_same_files(
    run: RunConfig,
    rows: Iterable[tuple[str, SampleSource, SampleSource | None]],
    group: ProcessGroup,
    *,
    with_weights: bool,
) -> None:
    """Raise `UserError` on every rank if data, weights, tokenizer or given statistics differ between machines.

    Args:
        run: The run.
        rows: Name in the mixture, training rows and held-out rows of each dataset.
        group: All ranks.
        with_weights: Whether the run reads pretrained weights; one that continues does not.
    """
    if _several_machines(group):
        inputs: dict[str, Input] = {}
        if _is_first():  # Other processes of a machine read the same files.
            inputs = dict(_data(run, rows)) | dict(_statistics(run)) | dict(_policy(run, with_weights=with_weights))
        _compare(group, inputs, "Copy the same files to all machines, or name a shared folder")


def digest_of(path: Path) -> str:
    """Size and digest of a file: of its whole content up to `WHOLE` bytes, else of blocks spread over it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.blake2b(digest_size=16)
            if size <= WHOLE:
                digest.update(file.read())
            else:
                for block in range(BLOCKS):
                    file.seek((size - BLOCK) * block // (BLOCKS - 1))
                    digest.update(file.read(BLOCK))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return f"{size} bytes, {digest.hexdigest()}"


def _several_machines(group: ProcessGroup) -> bool:
    """Whether the ranks may be on several machines; a launcher that does not say may have started them anywhere."""
    return group.size > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(group.size)


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _compare_configs(run: RunConfig, group: ProcessGroup) -> None:
    """Compare all settings; where values differ, both may name an existing file, whose content is compared later."""
    table = {dotted(key): value for key, value in leaves(run.model_dump(mode="json", exclude_none=True))}
    kept = {key: value for key, value in table.items() if not _is_own(key)}
    mine = {key: (value, isinstance(value, str) and _exists(value)) for key, value in kept.items()}
    found = group.gather((name_process(group.rank), str(Path.cwd()), mine))
    (first, _, wanted), *others = found
    for name, folder, table in others:
        differs = [
            f"{key} = {_shown(table, key)} instead of {_shown(wanted, key)}"
            for key in {**wanted, **table}
            if wanted.get(key) != table.get(key) and not (_is_file(wanted, key) and _is_file(table, key))
        ]
        if differs:
            raise UserError(
                f"the config differs between machines: on {name}, started in {folder}, {_listed(differs)} on {first}. "
                "Start all machines with the same config file and the same key=value arguments. Only names of existing "
                "files and folders, output folders, num_workers, cache_dir, download_limit_gb, [cluster] and [loggers] "
                "may differ"
            )


def _is_own(key: str) -> bool:
    return key.startswith(OWN_SETTINGS) or key.rpartition(".")[2] in OWN_KEYS


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # Too long for a path, or without a home.
        return False


def _shown(table: Mapping[str, tuple[Any, bool]], key: str) -> str:
    return repr(table[key][0]) if key in table else "nothing"


def _is_file(table: Mapping[str, tuple[Any, bool]], key: str) -> bool:
    return key in table and table[key][1]


def _program(run: RunConfig, owners: Iterable[Owner]) -> Iterator[tuple[str, Input]]:
    """Core, the packages of plugins and of the run's own classes, and torch's version."""
    known = {_package(owner.module): f"{owner.distribution} {owner.version}" for owner in owners}
    classes = [run.policy, run.trainer, *(source.run.data for source in run.sources)]
    packages = {_package(type(one).__module__): "" for one in classes} | {"rlinf_core": CORE} | known
    for package, name in sorted(packages.items()):
        files = dict(_sources(package))
        digests = partial(_digests, files)
        folder = os.path.commonpath([path.parent for path in files.values()]) if files else package
        yield f"the package {package}", Input(f"{name} {_digest(digests())}", f"{name} in {folder}".strip(), digests)
    for name in ("torch", "numpy"):
        if module := sys.modules.get(name):
            yield name, Input(str(module.__version__), f"{name} {module.__version__}", dict)


def _package(module: str) -> str:
    """The outermost package of a module that has code: a namespace package may hold other people's."""
    names = module.split(".")
    for end in range(1, len(names)):
        package = sys.modules.get(".".join(names[:end]))
        if package is not None and getattr(package, "__file__", None):
            return ".".join(names[:end])
    return module


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return
    for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(folder.parent).as_posix(), path
    if spec and not spec.submodule_search_locations and spec.origin and Path(spec.origin).is_file():
        yield Path(spec.origin).name, Path(spec.origin)


def _data(run: RunConfig, rows: Iterable[tuple[str, SampleSource, SampleSource | None]]) -> Iterator[tuple[str, Input]]:
    for name, *splits in rows:
        what = f"data of {name}" if name else "data"
        where = _place(run.source(name).run.data)
        for split, source in zip(("", ", held-out rows"), splits, strict=True):
            if source is None:
                continue
            files = source.row_files() if isinstance(source, FileSource) else {}
            yield f"{what}{split}", Input(source.fingerprint(), where, partial(_digests, files))
            if isinstance(source, FileSource) and source.image_files_by_name():
                evidence = partial(evidence_of_images, source)
                yield f"{what}{split}, image files", Input(_digest(evidence()), where, evidence)


def _place(data: DatasetConfig) -> str:
    if not data.repo_id:
        return data.config_name
    return str(Path(data.repo_id).expanduser().absolute()) if _exists(data.repo_id) else data.repo_id


def _statistics(run: RunConfig) -> Iterator[tuple[str, Input]]:
    for source in run.sources:
        if given := source.run.data.given_statistics():
            files = {Path(given).name: Path(given).expanduser()}
            there = all(path.is_file() for path in files.values())  # Only rank 0 has to have it.
            digests = partial(_digests, files)
            name = f" of {source.name}" if source.name else ""
            yield f"data.norm_stats{name}", Input(_digest(digests()) if there else "", given, digests)


def _policy(run: RunConfig, *, with_weights: bool) -> Iterator[tuple[str, Input]]:
    found = {f"policy.{field}": [Path(path)] for field, path in run.policy.files().items()}
    found |= {setting: list(files) for setting, files in run.policy.local_files().items()}
    for setting, paths in found.items():
        if paths and (with_weights or setting != "policy.weights"):
            digests = partial(_digests, {path.name: path for path in paths})
            where = str(paths[0].absolute() if len(paths) == 1 else paths[0].absolute().parent)
            yield setting, Input(_digest(digests()), where, digests)


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: digest_of(path) for name, path in files.items()}


def _digest(digests: Mapping[str, str]) -> str:
    return hashlib.blake2b(repr(sorted(digests.items())).encode(), digest_size=16).hexdigest()


def _compare(group: ProcessGroup, mine: Mapping[str, Input], way_out: str) -> None:
    """Compare the digests of all machines; if some differ, the files, too."""
    seen = {name: (one.digest, one.where) for name, one in mine.items() if one.digest}
    found = group.gather((name_process(group.rank), seen))
    first, wanted = found[0]
    different = [
        (rank, name)
        for rank, (_, table) in enumerate(found)
        for name in table
        if name in wanted and table[name][0] != wanted[name][0]
    ]
    if not different:
        return
    rank, name = different[0]
    files = group.gather(mine[name].files() if name in mine and group.rank in (0, rank) else {})
    others = [found[other][0] for other, what in different if what == name and other != rank]
    raise UserError(
        f"{name} differs between machines: {found[rank][0]} reads {found[rank][1][name][1]}, and {first} reads "
        f"{wanted[name][1]}{_which_files((found[rank][0], files[rank]), (first, files[0]))}"
        + (f". So it is on {_listed(others)}" if others else "")
        + f". The run would train on a mixture of both. {way_out}"
    )


def _which_files(here: tuple[str, Mapping[str, str]], there: tuple[str, Mapping[str, str]]) -> str:
    """Which files of two processes differ: (name of the process, its files)."""
    (one, mine), (other, others) = here, there
    if not (mine or others):
        return ""
    names = [name for name in sorted({**mine, **others}) if mine.get(name) != others.get(name)]
    if not names:
        return "; their files are the same in size and in the parts that were compared: compare them with sha256sum"
    notes = []
    for name in names:
        if name in mine and name in others:
            mine_, others_ = mine[name].split(",")[0], others[name].split(",")[0]
            notes.append(f"{name} ({mine_} instead of {others_})" if mine_ != others_ else f"{name} (its content)")
        else:
            notes.append(f"{name} (only on {one if name in mine else other})")
    return f"; these files differ: {_listed(notes)}"


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return ", ".join(texts[:LISTED]) + more

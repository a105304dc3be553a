"""What a server says of its policy, compared with a robot: before it moves, not after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

RATES_DIFFER = 0.05
"""Relative difference of rates that is reported."""
LONGEST_TASK = 300
"""Characters of a task that a server lists."""
SAME_SHAPE = 0.01
"""Aspect ratios that differ by a smaller share are the same."""


def compare(metadata: Mapping[str, Any], observation: Mapping[str, Any], rate_hz: float | None = None) -> list[str]:
    """Compare an observation, and the rate at which a robot acts, with what the policy was trained on.

    Args:
        metadata: The server's first message.
        observation: As it would be sent.
        rate_hz: Actions per second of the robot; None: not compared.

    Returns:
        What may be intended: other sizes of images, another task, another rate. One sentence each.

    Raises:
        ValueError: What the server would refuse or misunderstand: missing names, values of other shapes; all of them.
    """
    sent = dict(_flat(observation))
    wrong = [*_missing(metadata, sent), *_wrong_state(metadata, sent)]
    remarks: list[str] = []
    for camera in _tables(metadata.get("cameras")):
        name, image = _value(metadata, sent, str(camera.get("column", "")))
        if name:
            bad, remark = _image(name, np.asarray(image), camera.get("sizes") or ())
            wrong, remarks = wrong + bad, remarks + remark
    if wrong:
        raise ValueError("; ".join(wrong))
    return [*remarks, *_task(metadata, sent), *_rate(metadata, rate_hz)]


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = prefix + str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        else:
            yield name, value


def _tables(value: Any) -> list[Mapping[str, Any]]:
    listed = value if isinstance(value, (list, tuple)) else ()
    return [one for one in listed if isinstance(one, Mapping)]


def _names(metadata: Mapping[str, Any], column: str) -> list[str]:
    """The names under which a column may be sent, its own first."""
    others = metadata.get("observation_names")
    listed = others.items() if isinstance(others, Mapping) else ()
    return [column, *(str(name) for name, its in listed if its == column and name != column)]


def _value(metadata: Mapping[str, Any], sent: Mapping[str, Any], column: str) -> tuple[str, Any]:
    return next(((name, sent[name]) for name in _names(metadata, column) if name in sent), ("", None))


def _missing(metadata: Mapping[str, Any], sent: Mapping[str, Any]) -> list[str]:
    columns = metadata.get("observation_columns")
    listed = [str(one) for one in columns] if isinstance(columns, (list, tuple)) else []
    lacking = [column for column in listed if not _value(metadata, sent, column)[0]]
    if not lacking:
        return []
    wanted = ", ".join(" or ".join(map(repr, _names(metadata, column)[:3])) for column in lacking)
    return [f"the observation lacks {wanted}; it has {', '.join(map(repr, list(sent)[:20])) or 'nothing'}"]


def _wrong_state(metadata: Mapping[str, Any], sent: Mapping[str, Any]) -> list[str]:
    columns, names = metadata.get("state_columns"), metadata.get("state_names")
    if not isinstance(columns, (list, tuple)) or not isinstance(names, (list, tuple)):
        return []
    values = [_value(metadata, sent, str(column))[1] for column in columns]
    width = sum(np.size(value) for value in values)
    if any(value is None for value in values) or width == len(names):
        return []
    return [f"the state has {width} numbers, in training {len(names)}: {', '.join(str(one) or '?' for one in names)}"]


def _image(name: str, image: Any, sizes: Sequence[Any]) -> tuple[list[str], list[str]]:
    """What is wrong with an image, and what differs from training."""
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype.kind not in "uf":
        return [f"{name!r} is {image.dtype} {list(image.shape)}, but an image is uint8 [height, width, 3], RGB"], []
    height, width = image.shape[:2]
    known = [(int(one[0]), int(one[1])) for one in sizes if isinstance(one, (list, tuple)) and len(one) == 2]
    if not known or (height, width) in known:
        return [], []
    ratio = width / max(height, 1)
    same = any(abs(ratio / (w / h) - 1) < SAME_SHAPE for h, w in known if h and w)
    trained = ", ".join(f"{w} x {h}" for h, w in known[:4])
    what = "details are finer or coarser" if same else "another aspect ratio shows objects elsewhere"
    return [], [f"{name!r} is {width} x {height} pixels, in training {trained}: {what}"]


def _task(metadata: Mapping[str, Any], sent: Mapping[str, Any]) -> list[str]:
    task, known = _value(metadata, sent, "task")[1], metadata.get("tasks")
    if not isinstance(task, str) or not isinstance(known, (list, tuple)) or not known:
        return []
    if task[:LONGEST_TASK] in known or metadata.get("num_tasks") != len(known):  # Not all tasks are listed.
        return []
    return [f"the task {task!r} is not among the {len(known)} of training, such as {str(known[0])!r}"]


def _rate(metadata: Mapping[str, Any], rate_hz: float | None) -> list[str]:
    trained = metadata.get("fps")
    if rate_hz is None or not isinstance(trained, (int, float)) or not trained > 0:
        return []
    if abs(rate_hz / trained - 1) <= RATES_DIFFER:
        return []
    return [f"the robot executes {rate_hz:g} actions per second, the training data have {trained:g}"]

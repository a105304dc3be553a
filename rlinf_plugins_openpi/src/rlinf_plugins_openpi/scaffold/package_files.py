"""The files of a package that `rlinf new-plugin` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import dedent, wrap

from rlinf_plugins_openpi.scaffold.proposal import Proposal, Vector

_TO_FIND_OUT = (
    "To find out, look at the action while the robot stands still. If every number is near 0, it is a displacement "
    "(True); if near the state, it is a target position (False). `rlinf norm-stats train.toml` also checks, and warns."
)


@dataclass(frozen=True)
class Format:
    """The content of the files."""

    distribution: str
    module: str
    class_name: str
    config_name: str
    policy: str
    dataset: str
    """A folder, or an id on the hub; the `repo_id` in the config."""
    hub_id: str
    """The `repo_id` in the class; empty for a local folder, which other users do not have."""
    fps: float
    proposal: Proposal

    @property
    def horizon(self) -> int:
        """Actions in a chunk: about one second, as for π0's robots at 50 Hz, but at least 10 and at most 50."""
        return min(50, max(10, round(self.fps)))

    @property
    def base(self) -> str:
        """The base class of the format."""
        return {"pi0": "Pi0DatasetConfig", "pi05": "Pi05DatasetConfig"}[self.policy]

    @property
    def policy_class(self) -> str:
        """The class of the policy's config."""
        return {"pi0": "Pi0Config", "pi05": "Pi05Config"}[self.policy]


def package_files(form: Format) -> dict[str, str]:
    """The files: name -> text."""
    return {
        f"{form.module}.py": _module(form),
        "pyproject.toml": _project(form),
        "train.toml": _config(form),
        f"test_{form.module}.py": _test(form),
        "README.md": _readme(form),
    }


def _module(form: Format) -> str:
    found = form.proposal
    state, action = _width(found.state), _width(found.actions)
    policy = f'{{"type": "{form.policy}", "action_horizon": {form.horizon}}}'
    cameras = f"{len(found.images)} camera{'s' * (len(found.images) > 1)}"
    lines = [
        f'"""The dataset format {form.config_name}: {cameras}, {form.fps:g} Hz."""',
        "",
        "from collections.abc import Mapping",
        "from typing import Any, ClassVar",
        "",
        f"from rlinf_plugins_openpi import {form.base}",
        "",
        "",
        f"class {form.class_name}({form.base}):",
        f'    """{cameras}, state of {state} and action of {action} numbers, {form.fps:g} Hz."""',
        "",
        *_comment(f"A chunk of {form.horizon} actions lasts {form.horizon / form.fps:.1f} s."),
        f'    run_defaults: ClassVar[Mapping[str, Any]] = {{"policy": {policy}}}',
        "",
        *([f"    repo_id: str = {_quoted(form.hub_id)}"] if form.hub_id else []),
        *_comment("CHECK: which camera is which. A camera of the policy that is left out is masked."),
        "    images: dict[str, str] = {",
        *(f"        {_quoted(camera)}: {_quoted(column)}," for camera, column in found.images.items()),
        "    }",
        *_not_used(found.other_images),
        *_comment("CHECK: the numbers of the state and of the action; several columns are concatenated."),
        f"    state: tuple[str, ...] = {_columns(found.state)}",
        *_numbers(found.state),
        f"    actions: tuple[str, ...] = {_columns(found.actions)}",
        *_numbers(found.actions),
        *_not_used([vector.column for vector in found.other_vectors]),
        f"    state_width: int = {state}",
        f"    action_width: int = {action}",
        *_way(found),
    ]
    return "\n".join(lines) + "\n"


def _way(found: Proposal) -> list[str]:
    """How actions are trained, with the evidence for it."""
    gripper = f"({', '.join(map(str, found.gripper))}{',' * (len(found.gripper) == 1)})"
    of_names = "found by name" if found.gripper else "no name suggests one"
    check = (
        "CHECK: True trains on actions as recorded; False, on their difference from the state at the start of a "
        f"chunk, except for the numbers in gripper. {found.evidence} {_TO_FIND_OUT}"
    )
    lines = [*_comment(check), f"    raw_action_is_delta: bool = {found.is_delta}"]
    if found.is_delta:
        return [*lines, f"    # gripper: tuple[int, ...] = {gripper}  # for False: the gripper, {of_names}"]
    return [
        *lines,
        *_comment(f"CHECK: indices of the action that are a gripper, counted from 0: {of_names}."),
        f"    gripper: tuple[int, ...] = {gripper}",
    ]


def _numbers(vectors: Iterable[Vector]) -> list[str]:
    """Comments that say which number is which."""
    lines, first = [], 0
    for vector in vectors:
        numbers = [f"{first + i} {name}" for i, name in enumerate(vector.names)]
        last = first + len(vector.names) - 1
        named = ", ".join(numbers) if any(vector.names) else f"{first} to {last}, without names"
        lines += _comment(f"{' '.join(vector.column.split())}: {named}", hang="    ")
        first += len(vector.names)
    return lines


def _not_used(columns: Iterable[str]) -> list[str]:
    listed = ", ".join(" ".join(column.split()) for column in columns)
    return _comment(f"Not used: {listed}") if listed else []


def _comment(text: str, hang: str = "") -> list[str]:
    return wrap(text, 120, initial_indent="    # ", subsequent_indent=f"    # {hang}", break_long_words=False)


def _columns(vectors: Iterable[Vector]) -> str:
    quoted = [_quoted(vector.column) for vector in vectors]
    return f"({', '.join(quoted)}{',' * (len(quoted) == 1)})"


def _width(vectors: Iterable[Vector]) -> int:
    return sum(len(vector.names) for vector in vectors)


def _quoted(text: str) -> str:
    """A string literal for Python and for TOML."""
    return json.dumps(text, ensure_ascii=False)


def _project(form: Format) -> str:
    return dedent(f"""\
        [build-system]
        requires = ["hatchling>=1.27,<2"]
        build-backend = "hatchling.build"

        [project]
        name = "{form.distribution}"
        version = "0.1.0"
        requires-python = ">=3.12"
        dependencies = ["rlinf-plugins-openpi>=0.1,<0.2"]

        [project.optional-dependencies]
        test = ["pytest"]

        [project.entry-points."rlinf.datasets"]
        {form.config_name} = "{form.module}:{form.class_name}"

        [tool.hatch.build.targets.wheel]
        only-include = ["{form.module}.py"]
        """)


def _config(form: Format) -> str:
    return dedent(f"""\
        # A first try: two steps on the CPU with a small model. For a real run, delete the lines of [trainer] and the
        # variant, uncomment the other lines, and set name and max_steps.

        [runner]
        name = "{form.module}_try"
        max_steps = 2
        # save_interval = 1000
        # val_check_interval = 1000

        [data]
        config_name = "{form.config_name}"
        repo_id = {_quoted(form.dataset)}
        # validation_fraction = 0.05       # episodes held out

        [policy]
        variant = "dummy"
        # weights = "checkpoints/{form.policy}_base"             # a folder, a file or a hub id
        # tokenizer = "google/paligemma-3b-pt-224"     # or the path of PaliGemma's tokenizer.model

        [trainer]
        device = "cpu"
        global_batch_size = 2
        micro_batch_size = 2
        param_dtype = "fp32"
        """)


def _test(form: Format) -> str:
    return dedent(f'''\
        """The format conforms, and the data fit it."""

        import tomllib
        from pathlib import Path

        from rlinf_core.testing import check_dataset
        from rlinf_plugins_openpi import {form.policy_class}

        from {form.module} import {form.class_name}

        CONFIG = tomllib.loads(Path(__file__).with_name("train.toml").read_text(encoding="utf-8"))


        def test_the_format_conforms_and_the_data_fit():
            """Columns, widths and inverses; also rows, if the dataset is a local folder."""
            dataset = {form.class_name}(repo_id=CONFIG["data"]["repo_id"])
            policy = {form.policy_class}(variant="dummy", action_horizon={form.horizon})
            print(check_dataset(dataset, policy=policy))
        ''')


def _readme(form: Format) -> str:
    return dedent(f"""\
        # {form.distribution}

        The dataset format `{form.config_name}` for rlinf-core. `{form.module}.py` has the facts of the robot.

        ```bash
        pip install -e .            # from this folder
        pytest
        rlinf norm-stats train.toml # normalisation statistics; warns if actions are not what the format says
        rlinf launch train.toml     # two steps on the CPU; the file says how to do a real run
        ```
        """)

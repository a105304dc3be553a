"""Where the golden data lies, what is in it, and what a run of the tests found about it.

Tests of an area take a fixture `<area>_case` (`model_case`, `train_case`, …) and run once for every folder found there,
so that another set of the same layout is tested as it is.
"""

import os
from collections.abc import Iterable
from pathlib import Path

GOLDEN = Path(os.environ.get("RLINF_GOLDEN_DIR") or Path(__file__).parents[1] / "golden").resolve()

AREAS = ("model", "train", "lora", "optim", "transforms", "resize", "tokenizer", "norm_stats", "augment")
"""Folders of the golden data; a folder that is not listed here fails a test, so that none is overlooked."""

NOT_YET = {
    "tokenizer/real_vocab_cases.json": "needs PaliGemma's tokenizer, which is not shipped: pytest -m vocabulary",
}
"""Parts that are known and not always checked: a pattern below the golden folder -> why. Cases without any check are
found by themselves."""

FOLDERS_ARE_CASES = ("model", "train", "lora", "transforms")
"""Areas in which every folder is a case; the others are one case each."""


def cases(area: str) -> list[Path]:
    """The folders of an area, or the area itself where they are not cases."""
    folder = GOLDEN / area
    if area in FOLDERS_ARE_CASES:
        return sorted(path for path in folder.glob("*") if path.is_dir())
    return [folder] if folder.is_dir() else []


def name_of(case: Path) -> str:
    return case.relative_to(GOLDEN).as_posix()


def unchecked(rows: Iterable[tuple[str, str, float, float]]) -> dict[str, str]:
    """What lies in the golden folder and was compared with nothing in these rows (case, quantity, ...), and why."""
    names = [f"{name}/" for name, *_ in rows]
    missing = {
        pattern: reason
        for pattern, reason in NOT_YET.items()
        if any(GOLDEN.glob(pattern)) and not any(name.startswith(f"{pattern}/") for name in names)
    }
    missing |= {area: "the set has nothing of it" for area in AREAS if not cases(area)}
    for name in (name_of(case) for area in AREAS for case in cases(area)):
        if not any(checked.startswith(f"{name}/") for checked in names):
            missing.setdefault(name, "no distance was reported for it in this run")
    return missing

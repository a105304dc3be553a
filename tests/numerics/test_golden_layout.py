"""Nothing in the golden folder goes unnoticed."""

from golden import AREAS, GOLDEN


def test_every_folder_is_known():
    unknown = {path.name for path in GOLDEN.iterdir() if path.is_dir()} - set(AREAS)
    assert not unknown, f"{GOLDEN} has folders that no test knows: {sorted(unknown)}"

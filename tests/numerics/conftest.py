"""The golden tests run once for every case that is there; `report` is in `distances.py`."""

from golden import AREAS, cases, name_of


def pytest_generate_tests(metafunc):
    for area in AREAS:
        if f"{area}_case" in metafunc.fixturenames:
            metafunc.parametrize(f"{area}_case", cases(area), ids=name_of)

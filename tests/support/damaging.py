"""Damages user input; reading it may succeed, or raise one message that says what is wrong.

`RLINF_FUZZ=2000` draws as many examples a test instead of a few, and others each time.
"""

import contextlib
import copy
import json
import math
import os
import resource

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from rlinf_core.errors import UserError

LONG = int(os.environ.get("RLINF_FUZZ", "0"))
SPARE = 6 * 2**30
"""Bytes of address space that reading one small file may take at most."""
ODD = (
    *(None, True, 0, -1, 2, 2**31, 2**63, -(2**63) - 1, 10**40, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.5),
    *("", " ", "0", "\0", "\x1b[31m", "\ud800", "../../x", "/etc/passwd", "a" * 5000, "{0.__class__}", "{:9999999d}"),
    *("{episode_index:99999999999d}", "{video_key!r}", "{", "float32", "video", "<script>alert(1)</script>", "[bold]"),
    *([], {}, [None], [[]], [-1], [0], [2**40, 2**40], {"": None}, {"a": {"b": []}}, ["x"], [1.5], [[1, 2], [3]]),
)
"""Values that replace others."""


def examples(count):
    """Hypothesis' settings: the same few examples in every run of the tests."""
    return settings(
        max_examples=LONG or count,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def places(document, above=()):
    """Every position in a tree of dicts and lists except the root."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs if isinstance(document, dict | list) else ():
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


@st.composite
def damaged(draw, document, odd=ODD):
    """A tree with one to three values replaced, left out or added."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(found))
        if not there:
            break
        *above, key = draw(st.sampled_from(there))
        holder = found
        for part in above:
            holder = holder[part]
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        value = copy.deepcopy(draw(st.sampled_from(odd)))
        if how == "remove":
            del holder[key]
        elif how == "add" and isinstance(holder, list):
            holder.insert(key, value)
        else:
            holder[draw(st.sampled_from(("", "x", "../x", "path"))) if how == "add" else key] = value
    return found


@st.composite
def damaged_bytes(draw, data):
    """Bytes that are truncated, changed in some places, or have others inserted."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(("cut", "flip", "flip", "insert", "zeros", "drop")))
        if how == "cut":
            data = data[:at]
        elif how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif how == "zeros":
            data[at : at + 16] = bytes(min(16, len(data) - at))
        else:
            del data[at : at + draw(st.integers(1, 16))]
    return bytes(data)


def json_texts(document, odd=ODD):
    """A document as JSON bytes: its tree damaged, or its bytes, or something else altogether."""
    trees = damaged(document, odd).map(_dumped)
    others = st.sampled_from([b"", b"null", b"[]", b"{}", b"1e999", b'"x"', b"\xff\xfe{}", b"[" * 100_000, b"{" * 3000])
    return st.one_of(trees, trees, trees, damaged_bytes(_dumped(document)), others)


def _dumped(tree):
    return json.dumps(tree).encode()


@contextlib.contextmanager
def little_memory(spare=SPARE):
    """Let this process allocate at most `spare` bytes of address space beyond what it has."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def complaint(read, *names, spare=SPARE):
    """The message of a failed read, or None if it succeeds; anything but a `UserError` fails the test.

    Args:
        read: Reads what is damaged.
        names: Of which the message has one.
        spare: See `little_memory`.
    """
    try:
        with little_memory(spare):
            read()
    except UserError as error:
        said = str(error)
        assert said.strip()
        assert not names or any(str(name) in said for name in names), said
        assert "Traceback" not in said
        return said
    return None

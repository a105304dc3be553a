"""Check that a pickle from anywhere can be unpickled in time and memory in proportion to its size.

An unpickler that allows few classes runs no code, but a key is hashed with all that it contains, as often as it is
contained: 60 tuples, each of them twice in the next, are 190 bytes and take 2**60 steps as a key. Positions in the
pickle's memo make Python reserve as much memory as they claim. Plugins may use this module.
"""

from __future__ import annotations

import pickle
import pickletools
from pickletools import OpcodeInfo
from typing import Any

HASHED_PER_BYTE = 100
"""Most values that keys may contain per byte of a pickle, each counted as often as it is contained. Checkpoints of
torch have less than one."""
FREE = 100_000
"""Values that the keys of any pickle may contain, however few bytes it has."""

_PUTS = frozenset({"MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"})
_GETS = frozenset({"BINGET", "LONG_BINGET", "GET", "DUP"})
_INTO = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
"""Operations that change the first of what they take."""
_UNHASHED = frozenset({"APPEND", "APPENDS", "BUILD", "LIST", "POP", "POP_MARK", "STOP"})
_UNHASHED |= frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
"""Operations that hash nothing of what they take; those that call something may."""


def check_pickle(data: bytes) -> None:
    """Check a pickle; builds none of its objects. Takes about seven times as long as unpickling.

    Raises:
        pickle.UnpicklingError: It is not a pickle, or its size does not bound the time and memory that it takes.
    """
    machine = _Machine(len(data))
    try:
        for operation, argument, _ in pickletools.genops(data):
            machine.follow(operation, argument)
    except (ValueError, IndexError, KeyError) as error:
        raise pickle.UnpicklingError(f"it is not a whole pickle: {error}") from error


class _Machine:
    """The stack and the memo of an unpickler, with numbers in place of objects.

    Args:
        size: Bytes of the pickle.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._weights = [1]
        """How many values hashing each object visits at most. The first stands for all that contain nothing."""
        self._stack: list[int] = []
        """Indices of weights."""
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}
        self._shared: set[int] = set()
        """Objects that something may refer to already."""
        self._hashed = 0

    def follow(self, operation: OpcodeInfo, argument: Any) -> None:
        """Follow the next operation. Raises `UnpicklingError` if it is out of proportion."""
        name, stack = operation.name, self._stack
        if name in _PUTS:
            place = len(self._memo) if argument is None else argument
            self._need(0 <= place <= self._size, f"it uses position {place} of its memo")
            self._memo[place] = stack[-1]
        elif name in _GETS:
            stack.append(stack[-1] if argument is None else self._memo[argument])
            self._shared.add(stack[-1])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "FRAME":
            self._need(argument <= self._size, f"it claims a frame of {argument} bytes")
        elif name == "POP" and self._marks and self._marks[-1] == len(stack):
            self._marks.pop()  # It takes the mark itself.
        elif operation.stack_before:
            self._take(operation)
        elif operation.stack_after:
            stack.append(self._new(1) if name.startswith("EMPTY") else 0)

    def _take(self, operation: OpcodeInfo) -> None:
        """Replace what an operation takes from the stack by what it puts there."""
        name, stack = operation.name, self._stack
        if pickletools.markobject in operation.stack_before:
            first = self._marks.pop() - (name in _INTO)  # A container is below its mark.
        else:
            first = len(stack) - len(operation.stack_before)
        self._need(0 <= first <= len(stack), "it takes more than there is")
        parts = stack[first:]
        del stack[first:]
        weight = 1 + sum([self._weights[part] for part in parts])
        if name in ("SETITEM", "SETITEMS"):
            self._hashed += sum([self._weights[key] for key in parts[1::2]])
        elif name not in _UNHASHED:
            self._hashed += weight
        self._need(self._hashed <= FREE + HASHED_PER_BYTE * self._size, "its keys contain one another too often")
        if name in _INTO:
            # What refers to the object already has counted it as it was before.
            self._need(name != "BUILD" or parts[0] not in self._shared, "it changes an object that is in use")
            self._weights[parts[0]] = weight
            stack.append(parts[0])
        else:
            stack += [self._new(weight) for _ in operation.stack_after]

    def _new(self, weight: int) -> int:
        self._weights.append(weight)
        return len(self._weights) - 1

    @staticmethod
    def _need(right: bool, reason: str) -> None:
        if not right:
            raise pickle.UnpicklingError(f"unpickling it could take any time or memory: {reason}")

"""The element types and the operators by number: one order, shared with the native core (`native/`).

A bool is a truth value, not a small number: its sum and max are "or", its product and min are "and". avg and
premul_sum are no operators of the kernels: they are a sum and a scaling (see `algorithms.plan.Scaling`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from ..errors import ArgumentError


class Op(IntEnum):
    """The operators that fold, in the native core's order."""

    SUM = 0
    PROD = 1
    MIN = 2
    MAX = 3
    BAND = 4
    BOR = 5
    BXOR = 6


@dataclass(frozen=True, slots=True)
class ElementType:
    """One element type.

    Attributes:
        name: as numpy and torch spell it.
        itemsize: bytes of an element.
        kind: numpy's letter: f floating, i and u integers, b bool, c complex.
    """

    name: str
    itemsize: int
    kind: str


TYPES = (
    ElementType("float16", 2, "f"),
    ElementType("bfloat16", 2, "f"),
    ElementType("float32", 4, "f"),
    ElementType("float64", 8, "f"),
    ElementType("int8", 1, "i"),
    ElementType("int16", 2, "i"),
    ElementType("int32", 4, "i"),
    ElementType("int64", 8, "i"),
    ElementType("uint8", 1, "u"),
    ElementType("uint16", 2, "u"),
    ElementType("uint32", 4, "u"),
    ElementType("uint64", 8, "u"),
    ElementType("bool", 1, "b"),
    ElementType("complex64", 8, "c"),
    ElementType("complex128", 16, "c"),
)
"""The element types; the index is the number."""

NUMBERS = {element.name: number for number, element in enumerate(TYPES)}
"""The number of an element type by name."""

OPERATORS = {op.name.lower(): int(op) for op in Op}
"""The number of an operator by name."""

_DEFINED_FOR = {
    "sum": "fiubc",
    "prod": "fiubc",
    "min": "fiub",
    "max": "fiub",
    "band": "iub",
    "bor": "iub",
    "bxor": "iub",
    "avg": "fc",
    "premul_sum": "fc",
}
_KINDS = {"f": "floating types", "i": "signed and", "u": "unsigned integers", "b": "bool", "c": "complex types"}


def element_type(name: str) -> ElementType:
    """The element type of that name.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return TYPES[NUMBERS[name]]
    except KeyError:
        raise ArgumentError(f"no element type {name!r} is served: convert to one of {', '.join(NUMBERS)}") from None


def check_operator(op: str, dtype: str) -> None:
    """Refuse an operator that is unknown, or not defined for the element type.

    Raises:
        ArgumentError: with the operators, or the types, that would do.
    """
    kind = element_type(dtype).kind
    if op not in _DEFINED_FOR:
        raise ArgumentError(f"no operator is called {op!r}: there are {', '.join(_DEFINED_FOR)}")
    if kind not in _DEFINED_FOR[op]:
        kinds = ", ".join(_KINDS[letter] for letter in _DEFINED_FOR[op]).replace("and, ", "and ")
        ops = ", ".join(name for name, defined in _DEFINED_FOR.items() if kind in defined)
        raise ArgumentError(f"{op} is defined for {kinds}, and this is {dtype}: {dtype} has {ops}")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype of that name; bfloat16 is the one of ml_dtypes.

    Raises:
        ArgumentError: the name is unknown, or it is bfloat16 and ml_dtypes is not installed.
    """
    element_type(name)
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise ArgumentError("bfloat16 arrays of numpy come from ml_dtypes: pip install ml_dtypes") from None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def numpy_operator(op: str, dtype: str) -> Callable[[Any, Any], Any]:
    """What `op` does to two numpy arrays of that element type: the meaning that kernels are held to."""
    check_operator(op, dtype)
    truth = {"sum": np.logical_or, "max": np.logical_or, "prod": np.logical_and, "min": np.logical_and}
    if element_type(dtype).kind == "b" and op in truth:
        return truth[op]
    operators: dict[str, Callable[[Any, Any], Any]] = {
        "sum": np.add,
        "prod": np.multiply,
        "min": np.minimum,
        "max": np.maximum,
        "band": np.bitwise_and,
        "bor": np.bitwise_or,
        "bxor": np.bitwise_xor,
        "avg": np.add,
        "premul_sum": np.add,
    }
    return operators[op]

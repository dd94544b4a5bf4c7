"""Reduction expressions: who was added to whom, and in which order."""

from __future__ import annotations

Value = int


class Expressions:
    """Reduction expressions, each kept once: equal expressions are the same number.

    The number of a rank is that rank's own contribution. Operands of a fold stand in the ascending order of the ranks
    that hold them, as engines fold them. None is commutative: min and max of 0.0 and -0.0 depend on the order.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.contributors = [1 << rank for rank in range(size)]
        self.doubled = [False] * size
        self._operands: list[tuple[Value, ...]] = [()] * size
        self._known: dict[tuple[Value, ...], Value] = {}

    def fold(self, operands: tuple[Value, ...]) -> Value:
        """The expression that folds the operands, in this order."""
        value = self._known.get(operands)
        if value is None:
            value = self._known[operands] = len(self.contributors)
            union, doubled = 0, False
            for operand in operands:
                mask = self.contributors[operand]
                doubled = doubled or self.doubled[operand] or bool(union & mask)
                union |= mask
            self.contributors.append(union)
            self.doubled.append(doubled)
            self._operands.append(operands)
        return value

    def is_canonical(self, value: Value, nested: bool = False) -> bool:
        """Whether it is 0+1+2+..., the contributions of all ranks folded in ascending order in one pass.

        With `nested` also where ((0+1)+2)+... takes several: the same bits, unless sums are rounded between passes.
        """
        operands = self._operands[value] or (value,)
        while nested and operands[0] >= self.size:
            operands = self._operands[operands[0]] + operands[1:]
        return operands == tuple(range(self.size))

    def ranks(self, value: Value) -> list[int]:
        """The ranks whose contributions an expression holds."""
        return [rank for rank in range(self.size) if self.contributors[value] >> rank & 1]

    def text(self, value: Value) -> str:
        """The expression in writing, (0+1)+2; what is deep inside becomes an ellipsis."""
        return self._text(value, 4).removeprefix("(").removesuffix(")")

    def _text(self, value: Value, depth: int) -> str:
        if value < self.size:
            return str(value)
        if depth == 0:
            return "(..)"
        return "(" + "+".join(self._text(operand, depth - 1) for operand in self._operands[value]) + ")"

"""A learning rate from a curve of losses at rising learning rates. Standard library only."""
from __future__ import annotations

import math
from collections.abc import Sequence

LEAST = 10                                        # points, below which a curve says nothing


def slopes(curve: Sequence[tuple[float, float]]) -> list[float]:
    """How fast the loss changes with ln lr at each point (lr, loss), lr rising.

    The slope of the least-squares line through the point and a twentieth of all points to either side, at least two:
    so noise of single steps does not count, and unlike a moving average it does not lag behind.
    """
    reach, found = max(2, len(curve) // 20), []
    for i in range(len(curve)):
        near = [(math.log(lr), loss) for lr, loss in curve[max(0, i - reach):i + reach + 1]]
        x_mean, y_mean = (sum(values) / len(near) for values in zip(*near))
        spread = sum((x - x_mean) ** 2 for x, _ in near)
        found.append(sum((x - x_mean) * (y - y_mean) for x, y in near) / spread if spread else 0.0)
    return found


def suggestion(curve: Sequence[tuple[float, float]]) -> float | None:
    """The learning rate at which the loss fell fastest, before it was lowest; None where it never fell.

    Where the loss is lowest the learning rate is already too large to train with, as it is about to rise; the steepest
    descent lies below it. After L. N. Smith, arXiv:1506.01186, who looks at the curve, and the rule "steep" of fastai.
    """
    if len(curve) < LEAST:
        return None
    lowest = min(range(len(curve)), key=lambda i: curve[i][1])
    falling = [(slope, lr) for slope, (lr, _) in zip(slopes(curve), curve[:lowest + 1])]
    steepest, lr = min(falling)
    return lr if steepest < 0 else None

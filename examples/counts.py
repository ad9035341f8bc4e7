"""A character model without a network: counts. It is the baseline of pages that predict text."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable


class Counts:
    """What followed the same few characters, mixed with shorter contexts where these were rare (Witten and Bell, 1991).

    texts: what is counted.
    width: of the longest context.
    """

    def __init__(self, texts: Iterable[str], width: int = 5):
        self.width = width
        self.after: dict[str, Counter[str]] = defaultdict(Counter)
        for text in texts:
            for at, letter in enumerate(text):
                for length in range(min(width, at) + 1):
                    self.after[text[at - length : at]][letter] += 1

    def bits(self, text: str, start: int = 0) -> list[float]:
        """What each character from `start` on costs."""
        costs = []
        for at in range(start, len(text)):
            probability = 1 / len(self.after[""])
            for length in range(min(self.width, at) + 1):
                seen = self.after.get(text[at - length : at])
                if seen:
                    probability = (seen[text[at]] + len(seen) * probability) / (seen.total() + len(seen))
            costs.append(-math.log2(probability))
        return costs

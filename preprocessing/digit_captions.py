"""The captions of the text quick start: four digits in a 2×2 grid, described in a small grammar.

A *combination* is the four digits row by row: 10,000 of them. A *caption* says them by position ("a seven top left, a three top
right, …") or by count ("two sevens, a three and a nine"). A tenth of the combinations is held out of training: all arrangements
of some sets of four digits, so that neither form of a caption has been seen. A *paraphrase* says the same in words or an order
that no caption of training has.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from common.errors import UserError
from randomness import generator

Combination = tuple[int, int, int, int]

HELD_OUT = 1000  # of the 10,000 combinations
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLACES = ("top left", "top right", "bottom left", "bottom right")


def by_position(digits: Combination) -> str:
    """E.g. "a seven top left, a three top right, a one bottom left and a nine bottom right"."""
    return _listed([f"{_a(d)} {place}" for d, place in zip(digits, PLACES, strict=True)])


def by_count(digits: Combination) -> str:
    """E.g. "two sevens, a three and a nine": each digit where it is first met, row by row."""
    return _listed([_a(d) if n == 1 else f"{NUMBERS[n]} {_plural(d)}" for d, n in Counter(digits).items()])


def numerals(digits: Combination) -> str:
    """By count in figures, e.g. "2 7s, 1 3 and 1 9"."""
    return _listed([f"{n} {d}" + ("s" if n > 1 else "") for d, n in Counter(digits).items()])


def reordered(digits: Combination) -> str:
    """By position, the last place first."""
    return _listed([f"{_a(d)} {place}" for d, place in reversed(list(zip(digits, PLACES, strict=True)))])


def reworded(digits: Combination) -> str:
    """By position in other words, e.g. "upper left: 7, upper right: 3, lower left: 1, lower right: 9"."""
    places = (place.replace("top", "upper").replace("bottom", "lower") for place in PLACES)
    return ", ".join(f"{place}: {d}" for d, place in zip(digits, places, strict=True))


CAPTIONS: dict[str, Callable[[Combination], str]] = {"position": by_position, "count": by_count}  # forms that training sees
PARAPHRASES: dict[str, Callable[[Combination], str]] = {"numerals": numerals, "reordered": reordered, "reworded": reworded}
COUNTED = ("count", "numerals")  # the forms that say no positions


def share_as_asked(form: str, asked: Sequence[int], read: Sequence[int]) -> float:
    """The share of the four quadrants `read` that are as `asked` by a prompt of this form.

    Of a prompt by count, the quadrants that belong to the asked digits in the best arrangement.
    """
    if form in COUNTED:
        return (Counter(asked) & Counter(read)).total() / len(asked)
    return sum(a == b for a, b in zip(asked, read, strict=True)) / len(asked)


@functools.cache
def combinations(held_out: bool) -> tuple[Combination, ...]:
    """All 1,000 combinations that training does not see, or the 9,000 that it may, in order.

    Whole sets of digits are taken in a fixed random order, with all their arrangements, until the tenth is full.
    """
    sets = [*itertools.combinations_with_replacement(range(10), 4)]
    arrangements = Counter(tuple(sorted(c)) for c in itertools.product(range(10), repeat=4))
    held: set[tuple[int, ...]] = set()
    room = HELD_OUT
    for i in generator("held-out digits", 0, 0).permutation(len(sets)):
        if arrangements[sets[i]] <= room:
            held.add(sets[i])
            room -= arrangements[sets[i]]
    assert room == 0
    everything = itertools.product(range(10), repeat=4)
    return tuple((a, b, c, d) for a, b, c, d in everything if (tuple(sorted((a, b, c, d))) in held) == held_out)


def drawn(held_out: bool, count: int, *, seed: int = 0) -> list[Combination]:
    """The first `count` of a random order of the combinations. Raises UserError where there are fewer."""
    known = combinations(held_out)
    if count > len(known):
        raise UserError(f"{count} combinations of digits: there are only {len(known)}")
    order = generator("digit combinations", seed, int(held_out)).permutation(len(known))
    return [known[i] for i in order[:count]]


def _a(digit: int) -> str:
    return f"{'an' if digit == 8 else 'a'} {NUMBERS[digit]}"


def _plural(digit: int) -> str:
    return NUMBERS[digit] + ("es" if digit == 6 else "s")


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))

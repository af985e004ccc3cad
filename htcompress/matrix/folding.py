"""How a size can be split into modes: the foldings that a layout search tries."""

from __future__ import annotations

from math import ceil, isqrt, prod

_SMALLEST = 3
"""The least mode of a folding: a mode of 2 saves nothing at ranks above 1."""


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def pairs(n: int, *, most: int = 10) -> list[tuple[int, int]]:
    """Ordered pairs of modes that hold n, the balanced ones first; padded where n has too few divisors.

    >>> pairs(24, most=2)
    [(4, 6), (6, 4)]
    >>> pairs(13)
    [(3, 5)]
    """
    exact = [(d, n // d) for d in divisors(n) if d >= _SMALLEST and n // d >= _SMALLEST]
    if not exact:
        side = isqrt(n)
        padded = [(side, ceil(n / side)), (ceil(n**0.5), ceil(n**0.5))]
        exact = [p for p in padded if min(p) >= _SMALLEST and prod(p) >= n][:1]
        if exact and prod(exact[0]) > n * 1.5:
            return []
    exact.sort(key=lambda p: abs(p[0] - p[1]))
    return exact[:most]


def row_foldings(gates: int, hidden: int) -> list[tuple[int, ...]]:
    """Foldings of the gates * hidden rows of a recurrent weight: whole, gates apart, units folded."""
    found: list[tuple[int, ...]] = [(gates * hidden,)]
    head = (gates,) if gates > 1 else ()
    if head:
        found.append((gates, hidden))
    for pair in pairs(hidden, most=2):
        found.append((*head, *pair))
        if head:
            found.append((gates * pair[0], pair[1]))
        inner = pairs(pair[1], most=1) if pair[1] >= 16 else []
        found += [(*head, pair[0], *split) for split in inner]
    return list(dict.fromkeys(tuple(m for m in modes if m > 1) or (1,) for modes in found))


def col_foldings(size: int) -> list[tuple[int, ...]]:
    """First foldings of `size` input columns: the whole, pairs, and images whose channels come last or first.

    >>> col_foldings(24)[:3]
    [(24,), (4, 6), (6, 4)]
    """
    found: list[tuple[int, ...]] = [(size,), *pairs(size)]
    for channels in (3, 2, 4):
        if size % channels == 0 and size >= 128:
            for a, b in pairs(size // channels, most=4):
                found += [(a, b, channels), (channels, a, b)]
    return list(dict.fromkeys(found))


def finer(modes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The foldings that split one mode of another in two, where it divides.

    >>> finer((8, 16))
    [(2, 4, 16), (4, 2, 16), (8, 4, 4), (8, 2, 8)]
    """
    found = []
    for k, mode in enumerate(modes):
        halves = sorted(((d, mode // d) for d in divisors(mode)[1:-1]), key=lambda p: abs(p[0] - p[1]))[:2]
        found += [(*modes[:k], *half, *modes[k + 1 :]) for half in halves]
    return found


def with_slabs(modes: tuple[int, ...], size: int, extra: int) -> tuple[int, ...] | None:
    """A folding of `size` columns that takes `extra` more as slabs of its first mode.

    The rest is padding; None where that is more than a slab and half of everything.

    >>> with_slabs((4, 6), 24, 2)
    (5, 6)
    """
    full = size + extra
    found = (max(modes[0], ceil(full / prod(modes[1:]))), *modes[1:])
    wanted = len(modes) == 1 or prod(found) - full < max(prod(modes[1:]), full // 2)
    return found if wanted else None

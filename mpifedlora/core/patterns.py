"""Regular expressions for names of layers, matched in a time that no pattern can make explode.

Python's own matcher tries one way after another, and `(.+)+x` keeps it busy for ever. Here each part takes
all places of the name that are reached so far to all those reached behind it, so no way is gone twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, reduce

from mpifedlora.errors import AdapterError

Places = frozenset[int]
Step = Callable[[str, Places], Places]

_LONGEST, _DEEPEST = 1000, 10
_TOKEN = re.compile(
    r"(?P<group>\((?:\?[:=!])?)|(?P<end>\))|(?P<bar>\|)|(?P<repeat>(?:[*+?]|\{\d{0,4}(?:,\d{0,4})?\})\??)"
    r"|(?P<atom>\\[^0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}*+?|])"
)


def compile_pattern(pattern: str) -> Step:
    r"""Return what takes a name and places in it to the places where a match from there may end.

    Characters, classes, `^ $ \b`, groups, `|`, repetitions and looking ahead are understood; looking back,
    flags and references to groups are not.

    Raises:
        AdapterError: if it is no such pattern, or longer or deeper than any pattern for names needs to be.

    >>> matches_whole(compile_pattern(r".*layer\.[01]\.(query|value)"), "encoder.layer.1.value")
    True
    >>> matches_whole(compile_pattern("(.+)+x"), "a" * 1000)
    False
    """
    try:
        tokens = _tokens(pattern)
        step = _alternatives(tokens, 0)
        if tokens:
            raise ValueError("a ) without its (")
    except (ValueError, OverflowError, re.error) as error:
        raise AdapterError(
            "lora.target_modules must be a list of names or a regular expression for whole names (without "
            f"flags, references and looking back), got {pattern[:100]!r} ({error}); "
            'for names write a list, as in ["query", "value"]'
        ) from error
    return step


def matches_whole(step: Step, name: str) -> bool:
    """Say whether a compiled pattern matches a whole name."""
    return len(name) in step(name, frozenset((0,)))


def matches_within(step: Step, name: str) -> bool:
    """Say whether a compiled pattern matches any part of a name."""
    return bool(step(name, frozenset(range(len(name) + 1))))


def _tokens(pattern: str) -> list[tuple[str, str]]:
    """Return kind and text of a pattern's tokens, the last one first."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"{len(pattern)} characters, at most {_LONGEST} are read")
    found, place = [], 0
    while place < len(pattern):
        match = _TOKEN.match(pattern, place)
        if not match:
            raise ValueError(f"at {pattern[place : place + 10]!r}")
        found.append((str(match.lastgroup), match[0]))
        place = match.end()
    return found[::-1]


def _alternatives(tokens: list[tuple[str, str]], depth: int) -> Step:
    if depth > _DEEPEST:
        raise ValueError(f"groups in more than {_DEEPEST} groups")
    choices: list[list[Step]] = [[]]
    while tokens and tokens[-1][0] != "end":
        kind, text = tokens.pop()
        if kind == "bar":
            choices.append([])
        elif kind == "repeat":
            if not choices[-1]:
                raise ValueError(f"nothing to repeat before {text}")
            choices[-1].append(partial(_repeated, choices[-1].pop(), *_bounds(text)))
        else:
            choices[-1].append(_group(tokens, text, depth) if kind == "group" else _atom(text))
    return partial(_any_of, choices)


def _group(tokens: list[tuple[str, str]], opening: str, depth: int) -> Step:
    inner = _alternatives(tokens, depth + 1)
    if not tokens:
        raise ValueError("a ( without its )")
    tokens.pop()
    return inner if opening in ("(", "(?:") else partial(_ahead, inner, opening == "(?=")


def _bounds(text: str) -> tuple[int, int | None]:
    known: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if text[0] in known:
        return known[text[0]]
    low, comma, high = text.rstrip("?").strip("{}").partition(",")
    return int(low or 0), (int(high) if high else None) if comma else int(low)


def _atom(text: str) -> Step:
    compiled = re.compile(text)

    def step(name: str, places: Places) -> Places:
        found = (compiled.match(name, place) for place in places)
        return frozenset(match.end() for match in found if match)

    return step


def _any_of(choices: list[list[Step]], name: str, places: Places) -> Places:
    ends = (reduce(lambda reached, step: step(name, reached), choice, places) for choice in choices)
    return frozenset().union(*ends)


def _repeated(step: Step, low: int, high: int | None, name: str, places: Places) -> Places:
    for _ in range(low):
        before, places = places, step(name, places)
        if places == before:
            break
    reached = new = places
    for _ in range(len(name) if high is None else min(high - low, len(name))):
        new = step(name, new) - reached
        if not new:
            break
        reached |= new
    return reached


def _ahead(step: Step, wanted: bool, name: str, places: Places) -> Places:
    return frozenset(place for place in places if bool(step(name, frozenset((place,)))) == wanted)

"""Pieces of HTML: whatever is not marked as HTML already is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_LETTERS = {
    "rank_max": "<i>r</i><sub>max</sub>",
    "rank_min": "<i>r</i><sub>min</sub>",
    "tau_end": "<i>τ</i><sub>end</sub>",
    "metropolis_temperature": "<i>τ</i><sub>metropolis</sub>",
    "tau": "<i>τ</i>",
    "eta_1": "<i>η</i><sub>1</sub>",
    "eta": "<i>η</i>",
    "start": "<i>t</i><sub>0</sub>",
    "cooling": "<i>n</i><sub>cooling</sub>",
    "num_steps": "<i>n</i><sub>steps</sub>",
    "num_rounds": "<i>T</i>",
    "pi": "π",
    "*": "·",
    "-": "\N{MINUS SIGN}",
}
_UPRIGHT = ("cos", "min", "max", "exp")


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def safe(value: object) -> Html:
    """Return a value as HTML: escaped, unless it is HTML already."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(name: str, *content: object, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: of the tag.
        content: one after another.
        attributes: by name; a trailing underscore is dropped (`class_`), others become hyphens.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{safe(text)}"' for key, text in attributes.items()
    )
    return Html(f"<{name}{given}>{''.join(map(safe, content))}</{name}>")


def join(parts: Iterable[object], between: str = "\n") -> Html:
    """Return parts one after another."""
    return Html(between.join(map(safe, parts)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> Html:
    """Return a table that scrolls by itself where the page is narrow.

    Args:
        head: of the columns; empty for none.
        rows: of cells.
        numeric: columns that are set to the right.
    """

    def line(tag: str, cells: Sequence[object]) -> Html:
        made = [
            element(tag, cell, class_="n") if place in numeric else element(tag, cell)
            for place, cell in enumerate(cells)
        ]
        return element("tr", *made)

    top = [element("thead", line("th", head))] if head else []
    body = element("tbody", join(line("td", row) for row in rows))
    return element("div", element("table", *top, body), class_="scroll")


def link_papers(text: str) -> Html:
    """Return a text with each arXiv number as a link; the page itself loads nothing from there."""
    address = r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>'
    return Html(re.sub(r"arXiv (\d{4}\.\d{5})", address, safe(text)))


def math(expression: str) -> Html:
    """Return a Python expression, `^` for powers, as mathematics.

    >>> math("(1 + u(t))^3")
    '(1 + <i>u</i>(<i>t</i>))<sup>3</sup>'
    >>> math("tau_end^u(t) + floor(2 * pi)")
    '<i>τ</i><sub>end</sub><sup><i>u</i>(<i>t</i>)</sup> + ⌊2 · π⌋'
    """
    shown: list[str] = []
    closing: list[str] = []  # what ends each open bracket
    tokens = re.findall(r"\^|\w+|[()]|[^\w()^]", expression)
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token == "floor":
            shown.append("⌊")
            closing.append("⌋")
            place += 1  # its bracket
        elif token == "(":
            shown.append("(")
            closing.append(")")
        elif token == ")":
            shown.append(closing.pop())
        elif token == "^":
            power = (
                tokens[place + 1 : place + 5]
                if tokens[place + 2 : place + 3] == ["("]
                else [tokens[place + 1]]
            )
            shown.append(f"<sup>{math(''.join(power))}</sup>")
            place += len(power)
        else:
            shown.append(_letter(token))
        place += 1
    return Html("".join(shown))


def _letter(token: str) -> str:
    if token in _LETTERS:
        return _LETTERS[token]
    if re.fullmatch(r"[A-Za-z]\w*", token) and token not in _UPRIGHT:
        return f"<i>{token}</i>"
    return html.escape(token)

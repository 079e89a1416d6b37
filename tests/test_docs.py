"""What the documents say of the code."""

from pathlib import Path

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.methods import METHODS

DOCS = Path(__file__).parents[1] / "docs"


def table_rows(text: str, heading: str) -> list[list[str]]:
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_methods_table_has_every_preset_with_its_paper_and_switches() -> None:
    rows = table_rows((DOCS / "methods.md").read_text(), "Presets")
    assert [row[0] for row in rows] == [f"`{name}`" for name in METHODS if name != "custom"]
    for row, method in zip(rows, METHODS.values(), strict=False):
        assert method.paper.split()[1] in row[1]
        kind = method.settings.get("aggregation.kind")
        assert (f"`{kind}`" in row[4]) == (kind is not None)
        weights = method.settings.get("aggregation.weights", "examples")
        assert row[5].lower() == weights


def test_every_way_to_combine_is_described() -> None:
    rows = table_rows((DOCS / "methods.md").read_text(), "Ways to combine")
    assert [row[0].strip("`") for row in rows][: len(AGGREGATORS)] == [
        "product",
        "factors",
        "zero-pad",
        "residual",
        "stack",
    ]
    assert set(AGGREGATORS) <= {row[0].strip("`") for row in rows}

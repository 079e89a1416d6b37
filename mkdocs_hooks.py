"""Pages of the site that are files of the repository, and links that work in both places.

README.md, CONTRIBUTING.md and others are written once, where people look for them in a repository. Here they
become pages, with the pictures that they show, and every link to a file of the repository becomes one to its
page, or plain text where it has none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent
PAGES = {
    "README.md": "index.md",
    "slurm/README.md": "hpc.md",
    "benchmarks/README.md": "performance.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGES.md": "changes.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and the pictures that they show."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
        for picture in {match[3] for match in LINK.finditer(text) if match[1]}:
            path = os.path.normpath(Path(source).parent / picture)
            if not path.startswith(("docs/", "..", "http")):
                files.append(File.generated(config, path, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to pages of the site; those to other files become plain text."""
    own = page.file.src_uri
    source = SOURCES.get(own, f"docs/{own}")

    def replace(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = os.path.normpath(Path(source).parent / path)
        place = PAGES.get(path, path.removeprefix("docs/"))
        if mark or path in PAGES or (path.startswith("docs/") and path.endswith(".md")):
            relative = os.path.relpath(place, Path(own).parent)
            return f"{mark}[{text}]({relative}{'#' * bool(anchor)}{anchor})"
        return text

    parts = FENCE.split(markdown)
    return "".join(part if FENCE.match(part) else LINK.sub(replace, part) for part in parts)

"""The report as one HTML page that loads no other file: the style and the figures (inline SVG) are within."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from tasks.drawing.style import Drawing
from tasks.drawing.tables import Table


@dataclass(frozen=True)
class PageSection:
    """A part of the page: `text` says what is shown, on which machine, and whether it is measured or modelled."""

    key: str
    title: str
    text: str
    drawing: Drawing | None = None
    tables: Sequence[Table] = field(default=())


@dataclass(frozen=True)
class Page:
    """The whole report: `lines` sum up each target, `missing` names the results that this run does not have."""

    title: str
    parent: str
    lines: Sequence[str]
    summary: Table
    sections: Sequence[PageSection]
    missing: Sequence[str]


def render(page: Page) -> str:
    """Render the page as HTML; the same page gives the same text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    figures = {section.key: section.drawing.inline for section in page.sections if section.drawing}
    return template.render(page=page, figures=figures) + "\n"

"""Results as one page of HTML that needs nothing else: no script, no other file, no network.

All that comes from files is escaped, and characters that would turn the direction of writing are replaced.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from self_speculation.measuring.report_parts import Section, shown
from self_speculation.speculative_streamer import NAMES
from self_speculation.terminal import harmless

TEMPLATE = "report_page.html"


def page(title: str, sections: Sequence[Section]) -> str:
    """The sections as a page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    return environment.get_template(TEMPLATE).render(title=title, sections=sections, producers=NAMES)


def _harmless(value: Any) -> Any:
    """What is put into the page; what the page itself made stays."""
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value

"""What the printed and shown pages share: elements that escape their text, one look, charts in the page's typeface.

Pages hold no scripts and ask nothing of a network.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FACES = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: #1c2024; font: 15px/1.5 {_FACES}; }}
h1 {{ font-size: 38px; font-weight: 250; letter-spacing: -0.015em; line-height: 1.15; margin: 0 0 10px; }}
p {{ margin: 0 0 12px; max-width: 84ch; }}
.facts, .note, footer {{ color: #6b727b; font-size: 13.5px; }}
table {{ border-collapse: collapse; width: 100%; margin: 14px 0 8px; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }}
th {{ font-weight: 450; color: #6b727b; text-align: right; vertical-align: bottom; padding: 6px 10px;
  border-bottom: 1px solid #aab1ba; line-height: 1.25; }}
td {{ text-align: right; padding: 8px 10px; border-bottom: 1px solid #e9ecef; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
th:last-child, td:last-child {{ padding-right: 0; }}
td small {{ color: #868d96; font-size: 11.5px; margin-left: 3px; }}
td strong {{ font-weight: 680; }}
.chart {{ display: block; max-width: 100%; height: auto; }}
footer {{ border-top: 1px solid #e9ecef; }}
"""


def node(tag: str, *content: ET.Element | str, **attributes: str) -> ET.Element:
    """An element that escapes its text; a trailing underscore keeps Python's own words apart: class_."""
    element = ET.Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    for piece in content:
        if isinstance(piece, ET.Element):
            element.append(piece)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + piece
        else:
            element.text = (element.text or "") + piece
    return element


def document(title: str, body: Iterable[ET.Element], style: str) -> ET.Element:
    """A whole page; `style` comes after the rules that all pages share."""
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", f"{title} · inspectd"),
        node("style", _STYLE + style),
    )
    return node("html", head, node("body", node("main", *body)), lang="en")


def save(path: Path, page: ET.Element) -> None:
    """Write a page.

    Raises:
        OSError: It cannot be written.
    """
    # Names of files may hold what is no Unicode; a page has to say something in its place.
    text = "<!DOCTYPE html>\n" + ET.tostring(page, encoding="unicode", method="html") + "\n"
    path.write_text(text, encoding="utf-8", errors="replace")


def svg(figure: "Figure") -> str:
    """Draw a chart as an SVG document, its text in the typeface of the pages."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue().replace("'DejaVu Sans'", _FACES.replace('"', "&quot;"))

"""What pictures are made of: colours, letters and arrow heads of SVG, written by hand."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

INK, FAINT, LINE = "#22303c", "#8a97a3", "#ccd5dd"
COLOURS = {"fold": "#c2571a", "copy": "#3d6fa5"}
PALE, DEEP, DONE = (236, 242, 250), (122, 170, 222), "#3f9b63"


def picture_of(width: float, height: float, parts: Iterable[str]) -> str:
    """The text of an SVG file, white behind its parts."""
    lines = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' "
        f"viewBox='0 0 {width:.0f} {height:.0f}' font-family='Helvetica, Arial, DejaVu Sans, sans-serif'>\n"
        f"<defs>{_tip('fold')}{_tip('copy')}</defs>\n<rect width='100%' height='100%' fill='white'/>\n{lines}\n</svg>\n"
    )


def _tip(kind: str) -> str:
    """The head of the arrows of one colour."""
    return (
        f"<marker id='{kind}' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8' "
        f"markerUnits='userSpaceOnUse' orient='auto'><path d='M0 0L8 4L0 8z' fill='{COLOURS[kind]}'/></marker>"
    )


def shade(part: float) -> str:
    """From white (nothing) over ever deeper blue to green (all)."""
    if part in (0, 1):
        return DONE if part else "white"
    return "#" + "".join(f"{round(pale + (deep - pale) * part):02x}" for pale, deep in zip(PALE, DEEP))


def text(
    x: float,
    y: float,
    words: str,
    size: float,
    *,
    anchor: str = "middle",
    weight: str = "normal",
    colour: str = INK,
    opacity: float = 1,
) -> str:
    """Words at a place."""
    faded = f" opacity='{opacity}'" if opacity < 1 else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}' font-weight='{weight}' "
        f"fill='{colour}'{faded}>{escape(words)}</text>"
    )

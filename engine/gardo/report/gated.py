"""The kept training pictures as HTML: gated beside trusted, and the best beside the worst.

Each picture says how the proxy and every other reward rank it among its iteration's samples: a bar
as long as the share that it beats. A picture that hacks has a long bar of the proxy over short
ones.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gardo.report.kept import picture_of, read_kept
from gardo.report.page import minus, number, picture, text
from gardo.report.progress import format_share

_LONGEST = 256  # pixels of an embedded picture
_EARLIER = 3  # iterations before the last that are shown, folded
_ROLES = ("proxy", "auxiliary", "held_out")
_PAIRS = {
    "gated": (
        ("gated", "Gated", "the KL holds the policy back on these"),
        ("trusted", "Trusted", "the best by proxy of those it learns from freely"),
    ),
    "best": (
        ("best", "Best", "what the proxy likes most"),
        ("worst", "Worst", "what it likes least"),
    ),
}

_BARS = (
    "A bar is the share of the step's samples that a picture beats by that reward: blue the proxy, "
    "green an auxiliary, orange held out."
)

KEPT_CSS = """
.pair{display:grid;gap:18px 28px;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr))}
.pair h4{margin:0;font-size:15px}
.kept{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(125px,1fr))}
.kept figure{margin:0;font-size:13px;line-height:1.35}
.kept img{display:block;width:100%;height:auto;image-rendering:pixelated}
.kept .large{image-rendering:auto}
.kept figcaption{overflow-wrap:anywhere}
.kept ul{list-style:none;margin:4px 0 0;padding:0;font-size:12px;color:var(--soft)}
.kept li{margin-top:3px;display:flex;justify-content:space-between;flex-wrap:wrap;gap:0 6px}
.kept .bar{flex:100%}.kept .bar{display:block;height:4px;background:var(--line)}
.kept .bar i{display:block;height:4px;background:var(--c7)}
.kept .proxy i{background:var(--c0)}.kept .held_out i{background:var(--c1)}
.kept .auxiliary i{background:var(--c2)}
""".strip()


def gated_section(run_folder: Path) -> str:
    """Gated on one side, trusted on the other, of the last iteration that was kept and had both.

    Earlier ones are folded below. "" where no kept iteration has a gate.
    """
    return _section(run_folder, "gated")


def best_and_worst_section(run_folder: Path) -> str:
    """The best and the worst by proxy of the last kept iteration; "" where none was kept."""
    return _section(run_folder, "best")


def _section(run_folder: Path, kind: str) -> str:
    records = [
        record
        for record in read_kept(run_folder)
        if any(kind in sample.get("shown", ()) for sample in record["samples"])
    ]
    if not records:
        return ""
    body = f'<p class="soft">{_BARS}</p>' + _pair(run_folder, records[-1], kind)
    earlier = _spread(records[:-1], _EARLIER)
    if earlier:
        older = "".join(_pair(run_folder, record, kind) for record in earlier)
        steps = ", ".join(str(record["step"]) for record in earlier)
        body += f"<details><summary>Before: step {steps}</summary>{older}</details>"
    return body


def _pair(run_folder: Path, record: Mapping[str, Any], kind: str) -> str:
    """Both sides of one iteration."""
    tiles = _tiles(run_folder, record)
    sides = []
    for shown, title, what in _PAIRS[kind]:
        figures = "".join(
            _figure(sample, tile, f"{title.lower()} sample of step {record['step']}")
            for sample, tile in zip(record["samples"], tiles, strict=False)
            if shown in sample.get("shown", ())
        )
        note = f'<p class="soft">{what}</p>'
        sides.append(f'<div><h4>{title}</h4>{note}<div class="kept">{figures}</div></div>')
    return f'<h3>Step {record["step"]}</h3><div class="pair">{"".join(sides)}</div>'


def _tiles(run_folder: Path, record: Mapping[str, Any]) -> list[bytes]:
    """The thumbnails of a strip as PNGs; none where the picture cannot be read."""
    try:
        with Image.open(run_folder / picture_of(int(record["step"])), formats=["PNG"]) as strip:
            count = len(record["samples"])
            width, height = strip.width // count, strip.height
            return [_png(strip.crop((n * width, 0, (n + 1) * width, height))) for n in range(count)]
    except (OSError, SyntaxError, ZeroDivisionError, Image.DecompressionBombError):
        return []


def _png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    return data.getvalue()


def _figure(sample: Mapping[str, Any], tile: bytes, alt: str) -> str:
    """A picture with its prompt, and a line with a bar for each reward that ranks it."""
    image = picture(tile, _LONGEST, f"{alt}: {sample.get('prompt', '')}")
    with Image.open(io.BytesIO(tile)) as found:
        if max(found.size) >= 128:  # not of a world whose pixels are to be seen
            image = image.replace("<img ", '<img class="large" ', 1)
    rewards = sample.get("rewards", {})
    lines = "".join(
        _line(name, reward)
        for role in _ROLES
        for name, reward in rewards.items()
        if reward.get("role") == role
    )
    facts = [("uncertainty", sample.get("uncertainty")), ("advantage", sample.get("advantage"))]
    more = "".join(
        f"<li><span>{name}</span><span>{number(value, 2)}</span></li>"
        for name, value in facts
        if value is not None
    )
    return (
        f"<figure>{image}<figcaption>{text(sample.get('prompt', ''))}"
        f"<ul>{lines}{more}</ul></figcaption></figure>"
    )


def _line(name: str, reward: Mapping[str, Any]) -> str:
    """One reward: its value, and the share of the iteration's samples that this one beats."""
    role, rank = str(reward.get("role", "")), reward.get("rank")
    if rank is None:
        return f"<li>{text(name)}: no value</li>"
    width = 100 * min(max(float(rank), 0.0), 1.0)
    return (
        f'<li class="{text(role)}"><span>{text(name)}</span>'
        f"<span>{minus(number(reward.get('value'), 3))}</span>"
        f'<span class="bar" title="beats {format_share(rank)}">'
        f'<i style="width:{width:.0f}%"></i></span></li>'
    )


def _spread(records: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` of the records, evenly spaced, the first among them; newest first."""
    count = min(len(records), most)
    picked = [records[round(k * (len(records) - 1) / max(count - 1, 1))] for k in range(count)]
    return picked[::-1]

"""What the self-contained HTML pages share: style, skeleton, and text made safe for them.

Nothing is fetched and no script runs but a page's own: a content policy in the page forbids both.
Every string that is not ours goes through `text`.
"""

import base64
import hashlib
import html
import io
import re
from collections.abc import Sequence

from PIL import Image

from gardo.report.chart import CHART_CSS
from gardo.report.progress import format_number

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}
h2{font-size:20px;margin:40px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:22px 0 8px;color:var(--soft);font-weight:600}
p{margin:8px 0;max-width:85ch}
.soft{color:var(--soft);font-size:14px;max-width:100ch}
.verdict{border-left:5px solid var(--c7);padding:4px 0 4px 16px;margin:18px 0;font-size:17px}
.verdict.good{border-color:var(--c2)}.verdict.bad{border-color:var(--c4)}
.conclusion{font-weight:600}
.scroll{overflow-x:auto;background:
 linear-gradient(90deg,var(--page) 40%,transparent) 0 0/40px 100% no-repeat local,
 linear-gradient(270deg,var(--page) 40%,transparent) 100% 0/40px 100% no-repeat local,
 linear-gradient(90deg,#8888,transparent) 0 0/14px 100% no-repeat scroll,
 linear-gradient(270deg,#8888,transparent) 100% 0/14px 100% no-repeat scroll}
.findings{list-style:none;padding:0;font-size:16px;max-width:95ch}
.finding{border-left:4px solid var(--line);padding:2px 0 2px 12px;margin:10px 0}
.finding.warning{border-color:var(--c4)}.finding.good{border-color:var(--c2)}
.finding small{display:block;color:var(--soft);font-size:14px}
dl.facts{display:grid;grid-template-columns:minmax(90px,max-content) minmax(0,1fr);gap:4px 18px}
dl.facts{font-size:14px}dl.facts dt{color:var(--soft)}dl.facts dd{margin:0;overflow-wrap:anywhere}
@media (max-width:600px){main{padding:16px 14px 40px}h1{font-size:23px}}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 0 6px 22px;text-align:right;white-space:nowrap}
tr{border-bottom:1px solid var(--line)}
th{vertical-align:bottom;font-weight:600}th:first-child,td:first-child{padding-left:0}
td{vertical-align:top}
td small,th small{display:block;color:var(--soft);font-weight:400}
.grids{display:grid;gap:6px 14px;align-items:start;overflow-x:auto}
.grids .prompts{display:grid;align-self:stretch;contain:size;font-size:13px;line-height:1.2}
.grids .prompts span{display:flex;align-items:safe center;min-height:0;overflow:hidden}
.grids .prompts{overflow-wrap:anywhere}
.grids img,.strip img{display:block;width:100%;height:auto}
.caption{font-size:13px;color:var(--soft)}.caption b{color:var(--ink)}
.strip{display:grid;gap:14px;margin-top:20px}
.strip{grid-template-columns:repeat(auto-fill,minmax(170px,1fr))}
pre{overflow-x:auto;font-size:13px;line-height:1.4;padding:12px;border:1px solid var(--line)}
summary{cursor:pointer}
ul{padding-left:20px;font-size:14px}
""".strip()

_PAGE = """<!doctype html>
<html lang="en"{live}><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{scripts}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
{again}<title>{title}</title><style>{css}</style></head>
<body><main>{body}</main>{script}</body></html>
"""


def page(
    title: str,
    body: Sequence[str],
    *,
    css: str = "",
    script: str = "",
    refresh: int | None = None,
) -> str:
    """A whole page; `title` is plain text, `body` HTML, `css` what it adds to the common style.

    `script`: JavaScript, the only one that the page lets run. `refresh`: seconds after which the
    file is read again, where it is being rewritten: by the script, which waits for who is reading
    a chart, or by a browser that runs none.
    """
    live, again, scripts = "", "", ""
    if refresh:
        live = f' data-refresh="{refresh}"'
        again = f'<meta http-equiv="refresh" content="{refresh}">'
        again = f"<noscript>{again}</noscript>\n" if script else f"{again}\n"
    if script:
        sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        scripts = f"; script-src 'sha256-{sha256}'"
        script = f"<script>{script}</script>"
    return _PAGE.format(
        title=text(title),
        css="\n".join(filter(None, [CHART_CSS, _CSS, css])),
        body="\n".join(body),
        live=live,
        again=again,
        scripts=scripts,
        script=script,
    )


def section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def text(value: object) -> str:
    return html.escape(str(value))


def minus(text: str) -> str:
    """A true minus sign before numbers; hyphens in names stay."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def number(value: float | None, digits: int = 4) -> str:
    return "\u2013" if value is None else minus(format_number(value, digits))


def picture(data: bytes, longest: int, alt: str) -> str:
    """An `<img>` with a PNG inside, made smaller if a side is longer than `longest` pixels."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as found:
        if max(found.size) > longest:
            reduced = found.convert("RGB")
            reduced.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            smaller = io.BytesIO()
            reduced.save(smaller, format="PNG", optimize=True)
            data = smaller.getvalue()
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/png;base64,{encoded}" alt="{text(alt)}">'

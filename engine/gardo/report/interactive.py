"""Charts that answer: values under the pointer or the arrow keys, zoom, smoothing.

A figure is whole without its script, `charts.js`, which reads the values that a chart carries. A
page holds the script once, and allows no other by the hash in its content policy.
"""

from collections.abc import Sequence
from importlib.resources import files

from gardo.report.page import text

FIGURE_CSS = """
.charts{display:grid;gap:18px 28px}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
.plot{margin:0;position:relative;border-radius:6px}
.plot:focus-visible{outline:2px solid var(--c0);outline-offset:4px}
.plot figcaption{color:var(--soft);font-size:13px;line-height:1.35;padding:0 12px;max-width:70ch}
.plot .chart{touch-action:pan-y;cursor:crosshair}
.plot .chart text{user-select:none;-webkit-user-select:none}
.plot .data *{vector-effect:non-scaling-stroke}
.plot.zoomed svg.chart .data{overflow:hidden}
.plot .cursor{stroke:var(--soft);stroke-width:1;display:none}
.plot .cursor.shown{display:inline}
.plot .picked{fill:var(--c0);fill-opacity:.15}
.plot .tip{display:none;position:absolute;top:44px;right:10px;max-width:75%;padding:4px 9px}
.plot .tip{background:var(--page);border:1px solid var(--line);border-radius:4px;font-size:13px}
.plot .tip{font-variant-numeric:tabular-nums;pointer-events:none;overflow-wrap:anywhere}
.plot .tip.shown{display:block}.plot .tip.left{right:auto;left:48px}
.plot .tip i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:6px}
.plot .reset{display:none;position:absolute;right:10px;bottom:100%;font:inherit;font-size:13px}
.plot .reset{top:2px;bottom:auto;color:var(--ink);background:var(--page)}
.plot .reset{border:1px solid var(--soft);border-radius:4px;cursor:pointer}
.plot.zoomed .reset{display:block}
.controls{display:flex;flex-wrap:wrap;gap:4px 26px;color:var(--soft);font-size:14px}
.controls{margin-bottom:14px}
.controls[hidden],.controls [hidden]{display:none}
.controls label{white-space:nowrap}.controls input{vertical-align:middle;accent-color:var(--c0)}
""".strip()

_CONTROLS = """<div class="controls" hidden><span>Point at a chart, or move along it with the arrow
keys, to read its values; drag, or press + and \u2212, to zoom; Esc shows the whole run
again.</span><label hidden>Smoothing <input type="range" min="0" max="30" step="1">
<output></output></label></div>"""


def script() -> str:
    """The script of a page with figures."""
    return (files("gardo.report") / "charts.js").read_text("utf-8")


def figure(chart: str, meaning: str = "") -> str:
    """A chart, as `line_chart` and `stacked_chart` make it, with a sentence on what it shows."""
    said = f"<figcaption>{text(meaning)}</figcaption>" if meaning else ""
    return f'<figure class="plot" tabindex="0">{chart}{said}</figure>'


def figures(charts: Sequence[str]) -> str:
    """Figures side by side, which are zoomed and smoothed together; "" of none."""
    if not charts:
        return ""
    return f'{_CONTROLS}<div class="charts">{"".join(charts)}</div>'

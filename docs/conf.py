"""The site of the docs: `./run docs` builds it to build/docs.

The pages are those that GitHub shows, so the sources' root is the repository's. What is built asks
no server for anything: the theme has no fonts of its own, and formulas become MathML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

project = "gardo"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "RELEASING.md",
    "recipes/README.md", "recipes/prompts/README.md", "suites/README.md", "benchmarks/README.md",
    "benchmarks/results/*.md", "docs/**.md",
]  # fmt: skip
html_theme = "furo"
html_title = "gardo"
html_extra_path = ["_site"]  # beside this file
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
myst_linkify_fuzzy_links = False
pygments_style = "friendly"

NAVIGATION = {  # beside each page of the site; on GitHub the table of docs/index.md does it
    "Start": "quickstart one-gpu eight-gpus first-day cluster troubleshooting coming-from",
    "Use": "choosing report trackers prompts rewards judges reward-servers fitting-rewards "
    "evaluation files ../recipes/README ../recipes/prompts/README ../suites/README",
    "Understand": "gardo algorithms distributed kernels reliability evidence ../benchmarks/README "
    "../benchmarks/results/toy",
    "Extend": "plug-ins library ../CONTRIBUTING ../RELEASING",
    "Reference": "reference/recipe reference/metrics reference/cli ../README ../CHANGELOG "
    "../SECURITY",
}


def formula(translator: Any, node: Any) -> None:
    block = isinstance(node, nodes.math_block)
    mathml = convert(node.astext(), display="block" if block else "inline")
    translator.body.append(f"<p>{mathml}</p>" if block else mathml)
    raise nodes.SkipNode


class Folders(SphinxPostTransform):
    """A link to a folder of the repository stays as its text: the site has pages, not folders."""

    default_priority = 1  # before MyST looks for a page of this name

    def run(self, **_: Any) -> None:
        page = Path(self.env.doc2path(self.env.docname)).parent
        for link in [*self.document.findall(addnodes.pending_xref)]:
            if (page / link["reftarget"].partition("#")[0]).is_dir():
                link.replace_self(link.children)


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(pages.split())
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_navigation)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.add_post_transform(Folders)

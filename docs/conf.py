"""Sphinx configuration; `make docs` builds these pages with warnings as errors."""

from __future__ import annotations

import re

from docutils import nodes
from sphinx import addnodes

import pyro_vae_defence

project = "pyro_vae_defence"
author = "the pyro_vae_defence developers"
version = release = pyro_vae_defence.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
# Generated tables, which pages include.
exclude_patterns = ["_build", "results"]

# A copy of MathJax 3.2.2's component tex-chtml and its fonts, Apache-2.0: pages need no network.
mathjax_path = "mathjax/tex-chtml.js"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes of a class are described in its docstring; as fields they are not objects of their own.
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"pyro_vae_defence {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]


def skip_member(app, what, name, member, skip, options):
    """Leave out the fields of named tuples: their class's docstring describes them."""
    return True if type(member).__name__ == "_tuplegetter" else skip


def anchor_terms(app, doctree):
    """Give the terms of definition lists in pages anchors, so that each can be linked to."""
    for term in doctree.findall(nodes.term):
        own = nodes.make_id(term.astext())
        if own and not term["ids"] and own not in doctree.ids:
            doctree.ids[own] = term
            term["ids"].append(own)
            term += nodes.reference("", "¶", refuri=f"#{own}", classes=["headerlink"])


def leave_out_files_of_tables(app, doctree):
    """Leave out paragraphs "Table:", links to what is included below them: of use where the sources
    are read, on GitHub, which shows nothing there."""
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link.parent.astext() == "Table:":
            link.parent.parent.remove(link.parent)


INTERVAL = re.compile(r"-?[\d.,]+ \[-?[\d.,]+, -?[\d.,]+\]")


def keep_intervals(app, doctree):
    """Intervals in tables, such as 0.968 [0.951, 0.980], are not broken over lines."""
    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            found = INTERVAL.search(text)
            if found and isinstance(text.parent, nodes.paragraph):
                before, inside, after = text[: found.start()], found[0], text[found.end() :]
                kept = nodes.inline(inside, inside, classes=["interval"])
                parts = [*map(nodes.Text, filter(None, [before])), kept]
                text.parent.replace(text, [*parts, *map(nodes.Text, filter(None, [after]))])


def setup(app):
    app.connect("autodoc-skip-member", skip_member)
    app.connect("doctree-read", anchor_terms)
    app.connect("doctree-read", keep_intervals)
    app.connect("doctree-read", leave_out_files_of_tables)

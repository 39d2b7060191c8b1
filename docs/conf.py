"""Sphinx configuration; `make docs` builds these pages with warnings as errors."""

from __future__ import annotations

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
# Tables are included by results.md.
exclude_patterns = ["_build", "results"]

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


def skip_member(app, what, name, member, skip, options):
    """Leave out the fields of named tuples: their class's docstring describes them."""
    return True if type(member).__name__ == "_tuplegetter" else skip


def setup(app):
    app.connect("autodoc-skip-member", skip_member)

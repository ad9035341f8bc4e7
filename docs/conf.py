"""Sphinx builds the site from these pages: `make docs`."""

from __future__ import annotations

import fastrnn

project = "fastrnn"
author = "the fastrnn authors"
copyright = "2026, the fastrnn authors"
version = release = fastrnn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
nitpicky = True
# The documentation of Python and torch is not at hand when this is built, so their names stay plain text.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|contextlib|nn|PackedSequence)\b.*"),
    (r"py:.*", r"(~?fastrnn\.(convert|frozen)\.)?M"),
]

napoleon_custom_sections = [("Shape", "params_style")]
default_role = "literal"  # `name` in a docstring is code
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"fastrnn {release}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sphinx = False

"""Sphinx builds the site from these pages: `make docs`."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

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
    "sphinx_gallery.gen_gallery",
]
nitpicky = True
# The documentation of Python and torch is not at hand when this is built, so their names stay plain text.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|contextlib|nn|PackedSequence)\b.*"),
    (r"py:.*", r"(~?fastrnn\.(convert|frozen)\.)?M"),
    (r"py:class", r"fastrnn\.kernels\..*"),  # the engines' own classes have no pages
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

# The gallery's pages are not run here, which would take half an hour. `make examples` runs them in full, and keeps what they
# print and draw in docs/results/. With --quick they would run here in minutes, and show models that have learnt nothing.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "plot_gallery": False,
    # pages lie in folders
    "ignore_pattern": "|".join(path.name for path in (Path(__file__).parent.parent / "examples").glob("*.py")),
    "subsection_order": [*(f"../examples/{name}" for name in ("basics", "language", "series", "video", "control")), "*"],
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "write_computation_times": False,
}

RESULTS = """

Results
-------

What ``python -m {module}`` printed:

.. literalinclude:: /results/{name}.txt
   :language: none

.. image:: /results/{name}.png
   :alt: the figure that the page draws
"""


def add_results(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append what a page of the gallery printed and drew."""
    folder, _, name = docname.rpartition("/")
    if folder.startswith("gallery/") and name != "index":
        source[0] += RESULTS.format(module=docname.replace("gallery/", "examples/", 1).replace("/", "."), name=name)


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_results)

"""The documentation says what is there: links lead somewhere, code runs, every public name has a page, and the site works.

The site is built by `make docs`. Tests that need it are skipped where it has not been built.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch
from contract import ROOT, python
from torch.torch_version import TorchVersion

import fastrnn
import fastrnn.functional
import fastrnn.kernels
import fastrnn.timing

if not (ROOT / "README.md").exists():
    pytest.skip("reads the pages of a source tree", allow_module_level=True)

SITE = ROOT / "build" / "site"
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("**/*.md"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

built = pytest.mark.skipif(not SITE.is_dir(), reason="the site has not been built: make docs")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt install chromium)")


def without_code(text: str) -> str:
    return re.sub(r"`[^`]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Those that headings get on GitHub, and from MyST."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"https?://", target):
            continue
        path, anchor = urldefrag(target)
        found = page.parent / path if path else page
        assert found.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(found.read_text()), f"{target}: no such heading"


def test_the_readme_takes_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def code_blocks() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for index, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)):
            yield f"{page.relative_to(ROOT)} {index}", block


@pytest.mark.parametrize("block", [block for _, block in code_blocks()], ids=[name for name, _ in code_blocks()])
def test_code_blocks_run(block):
    known = "import torch, fastrnn\nx = torch.zeros(8, 5, 128)\n" if block.startswith("from fastrnn import") else ""
    python(known + block, OMP_NUM_THREADS="1")


SESSION = """
import doctest, re
blocks = re.findall(r"^```pycon\\n(.*?)^```", open(PAGE).read(), re.DOTALL | re.MULTILINE)
session = doctest.DocTestParser().get_doctest("\\n".join(blocks), {}, PAGE, None, 0)
failed, tried = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session)
assert tried > 50 and not failed
"""


@pytest.mark.skipif(find_spec("keras") is None, reason="the page's example of Keras needs keras")
@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="the page quotes torch 2.13's words on a wrong dtype")
def test_pitfalls_have_the_symptoms_that_they_are_said_to_have():
    """The page's examples are one session, with the results and messages of torch and Keras."""
    page = ROOT / "docs" / "pitfalls.md"
    python(SESSION.replace("PAGE", repr(str(page))), KERAS_BACKEND="torch", OMP_NUM_THREADS="1")


def test_what_the_readme_shows_is_what_compare_prints():
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"^(?:inference|training step): .*$", text, re.MULTILINE)
    layer, x = fastrnn.timing.nn.GRU(3, 4), fastrnn.timing.torch.zeros(2, 1, 3)
    said = [str(fastrnn.timing.compare(layer, x, train=train, seconds=0.01)).splitlines()[0] for train in (False, True)]
    figures = r"[\d.]+"
    assert [re.sub(figures, "#", line) for line in shown] == [re.sub(figures, "#", line) for line in said]


def test_messages_in_troubleshooting_are_those_of_the_code():
    """Each that is quoted there, but for two of torch's; `...` stands for what a message fills in."""
    torchs = "one of the variables needed for gradient computation", "We failed to resolve"
    folders = Path(fastrnn.__file__).parent, Path(fastrnn.kernels.__file__).parent, ROOT / "csrc"
    files = [path for folder in folders for path in folder.glob("**/*.*")]
    # without what joins the parts of a string over lines
    code = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text() for path in files if path.suffix in (".py", ".cpp", ".h")))
    lines = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [message for line in lines for message in re.findall(r'"([^"]+)"', line)]
    assert len(quoted) > 10
    for message in quoted:
        if not message.startswith(torchs):
            for part in filter(None, (part.strip() for part in message.split("..."))):
                assert part in code, message


PUBLIC = {f"fastrnn.{name}" for name in fastrnn.__all__}
PUBLIC |= {f"fastrnn.functional.{name}" for name in fastrnn.functional.__all__}
PUBLIC |= {f"fastrnn.{name}.step" for name in ("RNN", "LSTM", "GRU")}
PUBLIC |= {"fastrnn.timing.compare", "fastrnn.timing.Comparison", "fastrnn.dispatch.Explanation"}


@built
@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_a_page(name):
    """The site's inventory names it, and its page has it at the anchor that the inventory says."""
    _, entries = (SITE / "objects.inv").read_bytes().split(b"zlib.\n", 1)
    listed = dict(re.findall(r"^(\S+) py:\w+ \S+ (\S+)", zlib.decompress(entries).decode(), re.MULTILINE))
    assert name in listed
    page, anchor = urldefrag(listed[name])
    anchor = anchor.replace("$", name)
    assert f'id="{anchor}"' in (SITE / page).read_text()


class Links(HTMLParser):
    """The links, pictures and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.targets.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


@built
def test_links_of_the_site_lead_somewhere():
    pages = {path: Links(path.read_text()) for path in SITE.glob("**/*.html")}
    assert len(pages) > 15
    for path, page in pages.items():
        for target in page.targets:
            if re.match(r"(https?|mailto|data):", target):
                continue
            local, anchor = urldefrag(unquote(target.split("?")[0]))
            found = (path.parent / local).resolve() if local else path
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), f"{path.relative_to(SITE)}: {target}"
            if anchor and found in pages:
                assert anchor in pages[found].anchors, f"{path.relative_to(SITE)}: {target}"


# Shows pages in frames, and lists their pictures and how wide these are: 0 where one does not load.
FRAME = '<iframe src="%s"></iframe>'
LIST = """<!doctype html><body>%s<script>
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe"))
    for (const image of frame.contentDocument.querySelectorAll("img")) {
      const row = document.createElement("li");
      row.textContent = frame.getAttribute("src") + " " + image.getAttribute("src") + " " + image.naturalWidth;
      document.body.append(row);
    }
});
</script>"""


def with_pictures() -> list[str]:
    """Pages with pictures of their own, beside the theme's."""
    pages = sorted(SITE.glob("**/*.html"))
    return [f"/{path.relative_to(SITE).as_posix()}" for path in pages if "_images/" in path.read_text()]


@pytest.fixture(scope="module")
def address():
    """Where a server on this machine has the built site, and beside it the list of its pictures as `/pictures`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/pictures":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((LIST % "".join(FRAME % page for page in with_pictures())).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def browse(url: str, profile: Path) -> str:
    """The page's HTML after its scripts have run."""
    options = ["--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}", "--virtual-time-budget=20000"]
    if os.getuid() == 0:
        options.append("--no-sandbox")  # which root cannot have
    command = [CHROMIUM, *options, "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@built
@in_a_browser
def test_pictures_load_and_search_finds_in_a_browser(address, tmp_path):
    rows = re.findall(r"<li>(\S+) (\S+) (\d+)</li>", browse(f"{address}/pictures", tmp_path / "one"))
    assert {page for page, _, _ in rows} == {*with_pictures()} >= {"/index.html", "/benchmarks.html", "/performance.html"}
    assert min(int(width) for _, _, width in rows) > 100, rows

    found = browse(f"{address}/search.html?q=lstm", tmp_path / "two")
    assert re.search(r"found [1-9]\d* pages? matching", found)
    assert re.search(r'<a href="api/layers\.html[^"]*"', found.split("search-results", 1)[1])
    assert "did not match any documents" in browse(f"{address}/search.html?q=zzyzx", tmp_path / "three")

"""Every page of the gallery runs with --quick, refuses bad input, and has results in the docs that beat its baseline."""

from __future__ import annotations

import re
import runpy
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from contract import ROOT

from examples.counts import Counts

if not (ROOT / "docs").is_dir():
    pytest.skip("reads the pages of a source tree", allow_module_level=True)

# Matplotlib and Keras ask tensors for arrays in the words of numpy 2, which torch does not know.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
PAGES = {path.stem: path for path in sorted((ROOT / "examples").glob("*/*.py"))}
RESULTS = ROOT / "docs" / "results"
# By page: a function of it, arguments that it must refuse (or what makes them of the page's names), the error and its words.
Arguments = tuple[Any, ...] | Callable[[dict[str, Any]], tuple[Any, ...]]
REFUSED: dict[str, list[tuple[str, Arguments, type[Exception], str]]] = {
    "actions": [
        ("model", (torch.zeros(1, 0, 1, 24, 24),), ValueError, "clips: expected at least one frame"),
        ("film", ("jumps", 20, 32, None), ValueError, "action: expected one of spins left"),
    ],
    "clips": [("pass_by", (torch.zeros(0, 8).numpy(),), ValueError, "digit: expected pixels")],
    "sales": [
        ("read", ("Waco",), ValueError, "Waco: expected sales in each month, got none in 19, the first 2001-03"),
        ("read", ("Atlantis",), ValueError, "town: expected one of Abilene"),
    ],
    "stocks": [("read", ("ACME",), ValueError, "ticker: expected one of AAPL")],
    "summary": [("read", (Path(__file__),), ValueError, "path: expected a video")],
    "weather": [
        (
            "check_days",
            lambda names: (names["table"].drop(names["table"].index[5]),),
            ValueError,
            "table: expected a value for each day, got 1 gap(s), the first on 2012-01-06",
        )
    ],
    "text_classification": [
        ("identify", ("",), ValueError, "text: expected letters"),
        ("identify", ("\ue000\ue001",), ValueError, "text: expected letters"),
    ],
    "text_generation": [("answer", ("",), ValueError, "question: expected characters")],
    "translation": [("translate", (" ",), ValueError, "text: expected English words")],
    "speech_recognition": [("listen", ([torch.zeros(0, 120)],), ValueError, "heard: expected at least one step")],
}


def run(name: str, directory: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a page with --quick; its names. Skips where a package with its data is not installed."""
    module = ".".join(PAGES[name].relative_to(ROOT).with_suffix("").parts)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(directory)])
    with matplotlib.rc_context():
        try:
            return runpy.run_module(module, run_name="__main__", alter_sys=False)
        except ModuleNotFoundError as error:  # of which PackageNotFoundError is one
            if error.name and error.name.startswith(("examples", "fastrnn")):
                raise
            pytest.skip(f"needs {error.name}: {error}")
        except FileNotFoundError as error:
            if "make build/sounds" not in str(error):
                raise
            pytest.skip(str(error))
        finally:
            matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", PAGES)
def test_page(name, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models: a second thread gains nothing, and other tests run beside this one
    try:
        with torch.random.fork_rng():
            names = run(name, tmp_path, monkeypatch)
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "baseline" in printed
    for function, arguments, error, words in REFUSED.get(name, ()):
        with pytest.raises(error, match=re.escape(words)):
            list(names[function](*(arguments(names) if callable(arguments) else arguments)))  # of an iterator, too
    # What the docs show is from a run in full.
    shown = (RESULTS / f"{name}.txt").read_text()
    assert "beats the baseline" in shown
    assert "does not beat" not in shown
    assert (RESULTS / f"{name}.png").stat().st_size < 200_000


@pytest.mark.parametrize("name", PAGES)
def test_page_is_short(name):
    assert len(PAGES[name].read_text().splitlines()) <= 150


def test_an_unknown_strategy_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distributed_training", "--strategy", "zero3"])
    with pytest.raises(ValueError, match="--strategy: expected one of compare, ddp, fsdp2, got 'zero3'"):
        runpy.run_module("examples.many_machines.distributed_training", run_name="__main__", alter_sys=False)


def test_wrong_files_are_refused(tmp_path):
    catalogues, sounds = (pytest.importorskip(f"examples.{name}") for name in ("catalogues", "sounds"))
    wrong, quiet, fast = tmp_path / "wrong", tmp_path / "quiet.wav", tmp_path / "fast.wav"
    wrong.write_bytes(b"neither a catalogue nor a recording")
    for file, rate, count in ((quiet, 8000, 0), (fast, 44100, 1000)):
        with wave.open(str(file), "wb") as opened:
            opened.setnchannels(1)
            opened.setsampwidth(2)
            opened.setframerate(rate)
            opened.writeframes(bytes(2 * count))
    with pytest.raises(ValueError, match="file: expected a compiled gettext catalogue"):
        catalogues.read(wrong)
    with pytest.raises(ValueError, match=r"language: expected one of af, .* got 'tlh'"):
        catalogues.messages("django", "tlh")
    with pytest.raises(ValueError, match="file: expected a WAV file"):
        sounds.read(wrong)
    for file in (quiet, fast):
        with pytest.raises(ValueError, match="file: expected 256 or more 16-bit samples, 8000 a second"):
            sounds.read(file)


@pytest.mark.parametrize("context", ["", "br", "zz"])
def test_counts_are_probabilities(context):
    counts = Counts(["abracadabra"], width=2)
    costs = [counts.bits(context + letter, len(context))[0] for letter in "abcdr"]
    assert sum(2**-cost for cost in costs) == pytest.approx(1)
    assert min(costs) < costs[3]  # d is rare

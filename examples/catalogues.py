"""Translations of programs' messages, which their packages ship as compiled gettext catalogues."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import polib
import sentencepiece


@functools.cache
def files(package: str) -> list[Path]:
    """The catalogues of a package from PyPI. PackageNotFoundError: it is not installed."""
    listed = metadata.distribution(package).files or ()
    return sorted(Path(str(file.locate())) for file in listed if file.match("LC_MESSAGES/*.mo"))


def languages(package: str) -> list[str]:
    """Codes of the languages that a package has catalogues for: "de", "pt_BR"."""
    return sorted({file.parent.parent.name for file in files(package)})


def messages(package: str, language: str) -> dict[str, str]:
    """The messages of a package in a language, by their English text. ValueError: there are none, or a file is wrong."""
    found: dict[str, str] = {}
    for file in files(package):
        if file.parent.parent.name == language:
            found.update(read(file))
    if not found:
        raise ValueError(f"language: expected one of {', '.join(languages(package))}, got {language!r}")
    return found


def read(file: Path) -> dict[str, str]:
    """The translated messages of a catalogue, by their English text. ValueError: it is not a compiled catalogue (.mo)."""
    try:
        entries = polib.mofile(str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file: expected a compiled gettext catalogue (.mo), got {file}: {error}") from error
    pairs = ((entry.msgid, entry.msgstr or entry.msgstr_plural.get(0, "")) for entry in entries)
    return {source: target for source, target in pairs if source and target}


def pieces(texts: Iterable[str], size: int) -> sentencepiece.SentencePieceProcessor:
    """`size` pieces that the words of some texts are made of. Piece 0 is padding, 1 the start of a text, and 2 its end."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        character_coverage=1.0,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

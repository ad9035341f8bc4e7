"""Translations of programs' messages, which their packages ship as compiled gettext catalogues."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path

import polib


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

"""Recorded English and its text, the telephone announcements of Asterisk as Debian has them, and what a network hears of it."""

import gzip
import re
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PLACES = Path("build/sounds"), Path("/")  # made by `make build/sounds`, or where apt installs packages
RATE, FRAME, HOP, BANDS = 8000, 256, 80, 40  # a frame each 10 ms
DIGITS = "zero one two three four five six seven eight nine".split()


def announcements() -> Iterator[tuple[np.ndarray, str]]:
    """Samples, and what is said: words of the letters a to z and apostrophes. FileNotFoundError: there are no recordings."""
    root = next((place for place in PLACES if (place / "usr/share/asterisk/sounds/en_US_f_Allison").is_dir()), None)
    if root is None:
        raise FileNotFoundError("no recordings in build/sounds or /usr/share/asterisk/sounds: run `make build/sounds`")
    with gzip.open(root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            name, _, text = line.partition(":")
            file, words = root / f"usr/share/asterisk/sounds/en_US_f_Allison/{name}.wav", spoken(text)
            if words and file.is_file():
                yield read(file), words


def spoken(text: str) -> str:
    """The words of an announcement. "" where its text does not say how it is read (longer numbers, abbreviations, tones)."""
    if re.search(r"\d\d|[\[\]()/&]|\b[A-Z]{2,}\b", text):
        return ""
    return " ".join(re.findall(r"[a-z']+", re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text.lower())))


def read(file: Path) -> np.ndarray:
    """The samples of a recording, in [-1, 1). ValueError: it is no WAV file of 8000 16-bit samples a second, or it is empty."""
    try:
        with wave.open(str(file)) as opened:
            kind = opened.getframerate(), opened.getsampwidth(), opened.getnchannels()
            samples = np.frombuffer(opened.readframes(opened.getnframes()), dtype="<i2")
    except (wave.Error, EOFError) as error:
        raise ValueError(f"file: expected a WAV file, got {file}: {error}") from error
    if kind != (RATE, 2, 1) or len(samples) < FRAME:
        expected = f"{FRAME} or more 16-bit samples, {RATE} a second, on one channel"
        raise ValueError(f"file: expected {expected}, got {file} with {len(samples)}, {kind[0]} a second")
    return samples.astype(np.float32) / 2**15


def loudness(samples: np.ndarray) -> Tensor:
    """Samples -> the loudness of BANDS bands in frames of 10 ms [frames, BANDS], each band with mean 0 and deviation 1.

    The bands are equally wide to the ear: on the scale 2595 log10(1 + f / 700) (O'Shaughnessy, 1987).
    """
    edges = 700 * (10 ** (np.linspace(0, np.log10(1 + RATE / 2 / 700), BANDS + 2)) - 1)
    hertz = np.linspace(0, RATE / 2, FRAME // 2 + 1)[:, None]
    rising, falling = (hertz - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - hertz) / np.diff(edges)[1:]
    filters = torch.tensor(np.clip(np.minimum(rising, falling), 0, None), dtype=torch.float32)
    spectrum = torch.stft(torch.tensor(samples), FRAME, HOP, window=torch.hann_window(FRAME), return_complex=True).abs() ** 2
    bands = (spectrum.T @ filters + 1e-6).log()
    return (bands - bands.mean(0)) / (bands.std(0) + 1e-3)

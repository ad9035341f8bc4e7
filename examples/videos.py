"""Real videos as arrays, and what to pick of them."""

from pathlib import Path

import av
import numpy as np


def read(path: Path) -> np.ndarray:
    """The frames [frames, 24, 32, 3] of a video, between 0 and 1, or a ValueError where there are none."""
    try:
        with av.open(path) as video:
            frames = [frame.reformat(32, 24, "rgb24").to_ndarray() for frame in video.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"path: expected a video, got {path}: {error}") from error
    if not frames:
        raise ValueError(f"path: expected a video with frames, got none in {path}")
    return np.stack(frames).astype(np.float32) / 255


def distances(frames: np.ndarray) -> np.ndarray:
    """[frames, frames]: how far two frames differ, the mean over their pixels after some blur."""
    small = frames.reshape(len(frames), 6, 4, 8, 4, 3).mean((2, 4)).reshape(len(frames), -1)
    return np.sqrt(np.maximum(((small[:, None] - small[None]) ** 2).mean(-1), 0))


def greedy(far: np.ndarray, budget: int) -> list[int]:
    """The frames that the search picks one after another, each such that the frames are best covered then."""
    picks: list[int] = []
    nearest = np.full(len(far), np.inf)
    for _ in range(budget):
        picks.append(int(np.minimum(nearest[:, None], far).mean(0).argmin()))
        nearest = np.minimum(nearest, far[:, picks[-1]])
    return sorted(picks)


def pick(scores: np.ndarray, far: np.ndarray, budget: int) -> list[int]:
    """The frames with the highest products of score and distance to those picked before."""
    picks = [int(scores.argmax())]
    while len(picks) < budget:
        picks.append(int((scores * far[:, picks].min(1)).argmax()))
    return sorted(picks)

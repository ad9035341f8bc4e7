"""(draft)"""
from __future__ import annotations
from dataclasses import dataclass

@dataclass(frozen=True)
class Plan:
    schedule: str
    units: int
    outputs: int
    rows: int
    blocks: int
    groups: int
    warps: int
    chunk: int = 0
    split: int = 1
    resident: bool = False
    stages: int = 1

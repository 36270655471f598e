"""A function that scores, tells in a file what it was asked, and dies at the n-th question if a file says so."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

HERE = Path(__file__).parent


def told(prompt: str, completion: str) -> float:
    asked, fatal = HERE / "asked.jsonl", HERE / "die_at"
    with asked.open("a") as file:
        file.write(json.dumps([prompt, completion]) + "\n")
    if fatal.exists() and len(asked.read_text().splitlines()) >= int(fatal.read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    return float(completion.count("e"))

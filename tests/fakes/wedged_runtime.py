"""The real runtime whose decode thread never comes back: ``python wedged_runtime.py <aim-runtime's flags>``.

Asked for a schema, the thread enters C code that waits for ever, as llama.cpp's own grammars do on some patterns.
"""

from __future__ import annotations

import ctypes

from aim_runtime.__main__ import main
from aim_runtime.engines.llama_cpp.constraint import Position
from aim_runtime.engines.llama_cpp.sampling import Logits


def never(_: Position, logits: Logits) -> None:
    while True:
        ctypes.CDLL(None).pause()


if __name__ == "__main__":
    Position.mask = never  # type: ignore[method-assign]
    main()

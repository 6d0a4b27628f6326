"""The real runtime whose decode thread never comes back: ``python wedged_runtime.py <aim-runtime's flags>``.

Asked for a schema, the thread enters C code that waits for ever, as llama.cpp's own grammars do on some patterns. With
``--supervise never`` that is this process's thread, otherwise it is one of the engine's process, which runs this file,
too.
"""

from __future__ import annotations

import ctypes
import sys

from aim_runtime.__main__ import main
from aim_runtime.engines.llama_cpp.constraint import Position
from aim_runtime.engines.llama_cpp.sampling import Logits
from aim_runtime.supervisor import child, launch


def never(_: Position, logits: Logits) -> None:
    while True:
        ctypes.CDLL(None).pause()


if __name__ == "__main__":
    Position.mask = never  # type: ignore[method-assign]
    launch.CHILD = "wedged_runtime"
    is_child = len(sys.argv) == 2 and sys.argv[1].isdigit()
    if is_child:
        child.main()
    main()

"""The real runtime whose decode thread never comes back: ``python wedged_runtime.py <aim-runtime's flags>``.

Asked for a grammar, the thread enters C code that waits for ever, as llama.cpp does on some grammars.
"""

from __future__ import annotations

import ctypes

from aim_runtime.__main__ import main
from aim_runtime.engines.llama_cpp.bindings import LlamaGrammar


def never(_: LlamaGrammar, token: int) -> bool:
    while True:
        ctypes.CDLL(None).pause()


if __name__ == "__main__":
    LlamaGrammar.allows = never  # type: ignore[method-assign]
    main()

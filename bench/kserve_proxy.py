"""The peer of the hop benchmark: KServe's own ``OpenAIProxyModel`` in KServe's own server.

KServe 0.21 imports vLLM 0.24's modules for its OpenAI types; two of them have moved since. They are registered under
their old names here, so that it runs beside the vLLM of ``.venv-vllm``. The classes are vLLM's own.

``.venv-vllm/bin/python bench/kserve_proxy.py UPSTREAM_URL HTTP_PORT``
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

MOVED = {
    "vllm.entrypoints.openai.engine": (),
    "vllm.entrypoints.openai.engine.protocol": (
        "vllm.entrypoints.serve.engine.protocol",
        "vllm.entrypoints.generate.base.protocol",
    ),
    "vllm.entrypoints.chat_utils": ("vllm.renderers.chat_utils",),
}


def register_moved_modules() -> None:
    for old, news in MOVED.items():
        module = ModuleType(old)
        module.__path__ = []
        for new in news:
            public = vars(importlib.import_module(new))
            vars(module).update({name: value for name, value in public.items() if not name.startswith("__")})
        sys.modules[old] = module


def main() -> None:
    upstream, port = sys.argv[1], sys.argv[2]
    sys.argv = [sys.argv[0], "--http_port", port, "--enable_grpc", "false", "--enable_latency_logging", "false"]
    register_moved_modules()
    import kserve
    from kserve.protocol.rest.openai import OpenAIProxyModel

    # Its readiness question goes to this path twice a request; any that answers 200 will do.
    model = OpenAIProxyModel("m", predictor_url=upstream, health_endpoint="/v2/health/ready")
    kserve.ModelServer().start([model])


if __name__ == "__main__":
    main()

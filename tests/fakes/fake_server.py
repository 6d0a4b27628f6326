"""The real runtime server over the fake engine: ``python fake_server.py '{"token_s": 0.01}' <aim-runtime's flags>``."""

from __future__ import annotations

import sys

import orjson

from aim_kserve.log import log_to_stderr
from aim_runtime.server import serve
from aim_runtime.settings import RuntimeSettings
from fake_engine import FakeEngine


def main() -> None:
    settings = RuntimeSettings.load(sys.argv[2:], prog="fake-server", description="tests only")
    log_to_stderr()
    sys.exit(serve(settings, FakeEngine(settings.model_name, **orjson.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()

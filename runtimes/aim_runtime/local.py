"""The main job on this machine: the runtime, the guardrail transformer in front of it, and a way to see them.

``run`` serves until Ctrl-C; ``demo`` asks seven questions and exits 0; ``ask`` asks those it is given.
``make run``, ``make demo`` and ``make train-demo`` call this.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial

from aim_runtime.demo import ask, demo
from aim_runtime.stack import LOG_DIR, NotStarted, Stack, running


def run(stack: Stack) -> int:
    """Serve until SIGINT or SIGTERM, or until one of the processes ends."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with running(stack, show_logs=True) as processes:
        print(_card(stack), flush=True)
        while not stop.wait(0.2):
            ended = {name: process.poll() for name, process in processes.items() if process.poll() is not None}
            if ended:
                print(f"error: {', '.join(f'{name} ended with exit {code}' for name, code in ended.items())}")
                return 1
        print("stopping: requests in flight finish first", flush=True)
    return 0


def _card(stack: Stack) -> str:
    body = json.dumps(
        {"model": stack.model_name, "messages": [{"role": "user", "content": "What is a GPU?"}], "max_tokens": 60}
    )
    return f"""
  Ready. {stack.model_name} answers on the embedded engine, every prompt and answer goes through the guardrail.

    OpenAI API   {stack.url}/v1            (also {stack.url}/openai/v1)
    KServe V1    {stack.url}/v1/models/{stack.model_name}:predict
    KServe V2    {stack.url}/v2/models/{stack.model_name}/infer      gRPC {stack.host}:{stack.grpc_port}
    metrics      {stack.url}/metrics
    unguarded    http://{stack.host}:{stack.runtime_http_port}/v1            gRPC {stack.host}:{stack.runtime_grpc_port}

  curl:
    curl -s {stack.url}/v1/chat/completions -H 'content-type: application/json' \\
      -d '{body}'

  OpenAI client (pip install openai):
    python3 -c "from openai import OpenAI; c = OpenAI(base_url='{stack.url}/v1', api_key='none'); \\
      m = [{{'role': 'user', 'content': 'What is a GPU?'}}]; \\
      r = c.chat.completions.create(model='{stack.model_name}', messages=m, max_tokens=60); \\
      print(r.choices[0].message.content)"

  streaming:
    curl -sN {stack.url}/v1/chat/completions -H 'content-type: application/json' \\
      -d '{body[:-1]}, "stream": true}}'

  Ctrl-C stops both. Logs: {LOG_DIR}/runtime.log, {LOG_DIR}/guardrail.log
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="aim_runtime.local", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("command", choices=["run", "demo", "ask"])
    parser.add_argument("--model_name", default="smollm2")
    parser.add_argument("--model_dir", default=".models/smollm2")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--http_port", type=int, default=8080)
    parser.add_argument("--grpc_port", type=int, default=8081)
    parser.add_argument("--runtime_http_port", type=int, default=8090)
    parser.add_argument("--runtime_grpc_port", type=int, default=8091)
    parser.add_argument("--policy", default=None)
    parser.add_argument("--question", action="append", default=[], help="of ask; may be repeated")
    parser.add_argument("--system", default=None, help="of ask: put before each question")
    options = vars(parser.parse_args(argv))
    questions, system = options.pop("question"), options.pop("system")
    asked = partial(ask, questions=questions, system=system)
    commands: dict[str, Callable[[Stack], int]] = {"run": run, "demo": demo, "ask": asked}
    command = commands[options.pop("command")]
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        return command(Stack(**options))
    except NotStarted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

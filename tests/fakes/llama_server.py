"""llama.cpp's own HTTP server, as PyPI's xllamacpp brings it: ``python llama_server.py MODEL.gguf PORT NAME``."""

from __future__ import annotations

import sys
import threading

import xllamacpp


def main(model: str, port: int, name: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {name}
    params.n_ctx = 2048
    params.n_parallel = 2
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.endpoint_metrics = True
    params.hostnames, params.port = ["127.0.0.1"], port
    server = xllamacpp.Server(params)
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

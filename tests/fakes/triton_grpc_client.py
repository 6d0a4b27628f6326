"""tritonclient's gRPC client in a process of its own: its protobuf names are KServe's, and one process holds one.

``python triton_grpc_client.py HOST:PORT``; each line of stdin is a call as JSON, answered by a line on stdout:
``{"infer": {"prompts": [...], …}}`` or ``{"ask": "is_model_ready", "arguments": ["m"]}``.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import orjson
import tritonclient.grpc as triton
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException


def infer(client: triton.InferenceServerClient, call: dict[str, Any]) -> dict[str, Any]:
    prompts = call.pop("prompts")
    tensor = triton.InferInput(call.pop("tensor", "prompt"), [len(prompts)], "BYTES")
    tensor.set_data_from_numpy(np.array(prompts, dtype=object))
    outputs = [triton.InferRequestedOutput(name) for name in call.pop("outputs", [])] or None
    answer = client.infer(call.pop("model", "m"), [tensor], outputs=outputs, **call)
    arrays = {name: answer.as_numpy(name) for name in ("text", "finish_reason")}
    found = {name: None if array is None else [item.decode() for item in array] for name, array in arrays.items()}
    return {"id": answer.get_response().id, **found}


def ask(client: triton.InferenceServerClient, name: str, arguments: list[str]) -> Any:
    answer = getattr(client, name)(*arguments)
    return answer if answer is None or isinstance(answer, bool) else MessageToDict(answer)


def main() -> None:
    with triton.InferenceServerClient(sys.argv[1]) as client:
        for line in sys.stdin:
            call = orjson.loads(line)
            try:
                answer = (
                    infer(client, call["infer"]) if "infer" in call else ask(client, call["ask"], call["arguments"])
                )
            except InferenceServerException as error:
                answer = {"status": error.status(), "message": error.message()}
            print(orjson.dumps(answer).decode(), flush=True)


if __name__ == "__main__":
    main()

"""The one door to KServe: every KServe name we use is imported here and nowhere else.

More than half of what ``import kserve`` costs is for things a model server never touches: its ``__init__`` imports
the Kubernetes client and every CRD model, and two modules import pandas for a type annotation. Both are made lazy
*before* the first import, without taking anything away: the first attribute that really needs them loads them. A start
of the runtime (embedded model) takes 1.30 s of CPU instead of 1.78 s and 49 MiB less, of the transformer 1.40 s instead
of 1.83 s and 43 MiB less (medians of 9, ``bench/start.py --without lazy``).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package whose ``__init__`` runs on the first attribute that its submodules do not provide."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        spec: importlib.machinery.ModuleSpec = self.__dict__["__spec__"]
        if importlib.util.find_spec(f"{spec.name}.{name}") is not None:
            return importlib.import_module(f"{spec.name}.{name}")
        object.__setattr__(self, "__class__", ModuleType)  # run the real __init__ once, as an ordinary module
        assert spec.loader is not None
        spec.loader.exec_module(self)
        return getattr(self, name)


class _LazyPandas(ModuleType):
    """Stands in for pandas while KServe's modules evaluate ``-> pd.DataFrame`` annotations; real afterwards."""

    importing_kserve = True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.importing_kserve and name == "DataFrame":
            return Any
        if sys.modules.get("pandas") is self:
            del sys.modules["pandas"]
        return getattr(importlib.import_module("pandas"), name)


def _make_lazy() -> _LazyPandas | None:
    if "kserve" not in sys.modules:
        spec = importlib.util.find_spec("kserve")
        if spec is not None:
            package = _LazyPackage("kserve")
            package.__spec__ = spec
            package.__path__ = list(spec.submodule_search_locations or [])
            package.__file__ = spec.origin
            sys.modules["kserve"] = package
    if "pandas" in sys.modules:
        return None
    lazy = _LazyPandas("pandas")
    sys.modules["pandas"] = lazy
    return lazy


# KServe imports gRPC, whose C core would print to stderr what we report in one line.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# KServe still asks FastAPI for ORJSONResponse; every request would warn.
warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")
# KServe parses sys.argv when imported and would take our flags for its own; our settings are passed by name.
_argv, sys.argv = sys.argv, sys.argv[:1]
_lazy_pandas = _make_lazy()
try:
    from kserve import context as kserve_context
    from kserve.errors import (
        InferenceError,
        InvalidInput,
        ModelNotFound,
        ModelNotReady,
        ServerNotLive,
        ServerNotReady,
        UnsupportedProtocol,
    )
    from kserve.model import Model
    from kserve.model_repository import ModelRepository
    from kserve.model_server import ModelServer
    from kserve.model_server import app as kserve_app
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
    from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc
    from kserve.protocol.grpc.servicer import InferenceServicer
    from kserve.protocol.infer_type import (
        InferInput,
        InferOutput,
        InferRequest,
        InferResponse,
        to_http_parameters,
    )
    from kserve.protocol.model_repository_extension import ModelRepositoryExtension
    from kserve.protocol.rest.server import metrics_handler
    from kserve.protocol.rest.v1_endpoints import register_v1_endpoints
    from kserve.protocol.rest.v2_datamodels import InferenceRequest, RequestInput
    from kserve.protocol.rest.v2_endpoints import register_v2_endpoints
    from kserve.utils.utils import to_headers as grpc_headers
finally:
    sys.argv = _argv
    if _lazy_pandas is not None:
        type(_lazy_pandas).importing_kserve = False
        if sys.modules.get("pandas") is _lazy_pandas:
            del sys.modules["pandas"]  # whoever imports pandas next gets the real one

# A V2 body's unknown fields would vanish in KServe's model of it; kept, they can be told (see dataplane.py).
InferenceRequest.model_config["extra"] = "allow"
InferenceRequest.model_rebuild(force=True)

__all__ = [
    "DataPlane",
    "InferInput",
    "InferOutput",
    "InferRequest",
    "InferResponse",
    "InferenceError",
    "InferenceRequest",
    "InferenceServicer",
    "InvalidInput",
    "Model",
    "ModelNotFound",
    "ModelNotReady",
    "ModelRepository",
    "ModelRepositoryExtension",
    "ModelServer",
    "RequestInput",
    "ServerNotLive",
    "ServerNotReady",
    "UnsupportedProtocol",
    "grpc_headers",
    "kserve_app",
    "kserve_context",
    "metrics_handler",
    "pb",
    "pb_grpc",
    "register_v1_endpoints",
    "register_v2_endpoints",
    "to_http_parameters",
]

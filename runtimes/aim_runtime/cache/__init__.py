"""The model cache: models fetched once, verified, and kept on a volume."""

from pathlib import Path

#: Where AIM's images look for models (aim-build@2be2cf8, src/aim_runtime/config.py).
AIM_CACHE = Path("/workspace/model-cache")

"""What all parts of a job share: frozen, camelCase in YAML, unknown keys refused."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel


class Part(BaseModel):
    """One mapping of the job's YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, protected_namespaces=())


Whole = Annotated[int, Field(strict=True)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
#: A path, or file://, s3://, http(s)://, hf://, oci://.
Uri = Text
# The job's name becomes the names of Kubernetes objects; KubeRay appends to it.
JobName = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]

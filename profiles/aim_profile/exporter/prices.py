"""A price table: what an hour of a whole GPU costs, and a million tokens of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from aim_profile.errors import AimProfileError
from aim_profile.files.place import MisplacedError
from aim_profile.files.read import check, read_parsed
from aim_profile.gpus.catalog import by_name
from aim_profile.nodes.facts import CPU, Card

Amount = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, strict=True)]


class PriceError(AimProfileError):
    """A price table that cannot be used."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TokenPrice(_Frozen):
    """What a million tokens of a model cost, of prompts and generated."""

    prompt: Amount | None = None
    generation: Amount | None = None


class Prices(_Frozen):
    """The table. gpu_hour: by the catalogue's name of a GPU (`cpu`: all processors of a machine without one); a
    partition costs its share of the compute units. million_tokens: by served model name."""

    version: Literal[1] = 1
    currency: str = Field(pattern=r"^[A-Z]{3}$")
    gpu_hour: Mapping[str, Amount] = Field(default_factory=dict)
    million_tokens: Mapping[str, TokenPrice] = Field(default_factory=dict)

    @field_validator("gpu_hour")
    @classmethod
    def _known_gpus(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for name, price in value.items():
            try:
                product = CPU if name == CPU else by_name(name).name
            except AimProfileError as problem:
                raise MisplacedError((name,), str(problem)) from problem
            if product in found:
                raise MisplacedError((name,), f"the price of {product} is there twice: leave one out")
            found[product] = price
        return found

    def of_card(self, card: Card) -> float | None:
        """An hour of the whole card; None: not in the table, or a card that nobody knows."""
        accelerator = card.accelerator
        name = CPU if card.is_cpu else accelerator.name if accelerator else ""
        return self.gpu_hour.get(name)


def load_prices(file: Path) -> Prices:
    """The table of a YAML or JSON file. Raises PriceError naming file, line, key and value."""
    read = read_parsed(file, PriceError)
    return check(Prices, read.raw, read.named, PriceError, read.text)

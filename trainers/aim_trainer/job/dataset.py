"""What is trained on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from aim_profile.files.place import MisplacedError

from .fields import DataUri, Flag, Number, Part, Text, Whole, without_signature

Format = Literal["auto", "conversation", "prompt-completion", "alpaca", "sharegpt", "classification"]


class Source(Part):
    """A file, directory or dataset: JSONL, CSV or Parquet by its name; hf://org/name[/config][@revision] a dataset."""

    uri: DataUri
    format: Format = "auto"
    columns: dict[Text, Text] = Field(default={}, description="what the format calls a field → this source's column")
    weight: Number = Field(default=1.0, gt=0, le=1000, description="how often a row is seen in an epoch, on average")
    split: Text = Field(default="train", description="of a Hugging Face dataset")

    @property
    def shown(self) -> str:
        """The URI as logs, figures and pages have it."""
        return without_signature(self.uri)


class Held(Part):
    """Rows never trained on: a source of their own, or a share of the training rows, chosen by their content."""

    source: DataUri | None = None
    format: Format = "auto"
    columns: dict[Text, Text] = Field(default={}, description="what the format calls a field → the source's column")
    share: Number = Field(default=0.05, ge=0, lt=1)
    seed: Whole = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_way_to_hold_rows_back(self) -> Self:
        if self.source is not None and {"share", "seed"} & self.model_fields_set:
            key = "share" if "share" in self.model_fields_set else "seed"
            raise MisplacedError((key,), "a source of its own is held out as a whole: leave share and seed out")
        return self

    @property
    def any(self) -> bool:
        """Whether rows are held out at all."""
        return self.source is not None or self.share > 0


class Dataset(Part):
    """source, format and columns: of one source; sources: of several, mixed by weight."""

    source: DataUri | None = None
    format: Format = "auto"
    columns: dict[Text, Text] = Field(default={}, description="what the format calls a field → the source's column")
    sources: list[Source] = Field(default=[], max_length=64)
    validation: Held = Held()
    packing: Flag = Field(default=False, description="several short rows in one sequence, which do not see each other")
    train_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    over_long: Literal["refuse", "drop", "truncate"] = Field(
        default="refuse", description="rows of more than maxSeqLength tokens; dropped or cut ones are counted"
    )
    duplicates: Literal["keep", "drop", "refuse"] = "keep"
    system_prompt: Text | None = Field(default=None, description="put before rows that have none of their own")
    chat_template: DataUri | None = Field(default=None, description="a Jinja file instead of the tokenizer's own")
    labels: list[Text] = Field(
        default=[], max_length=1000, description="of a classification, in the order of the head's outputs"
    )

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> Self:
        if bool(self.source) == bool(self.sources):
            raise ValueError("give source, or sources with several of them")
        for key, given in (("format", self.format != "auto"), ("columns", self.columns)):
            if self.sources and given:
                raise MisplacedError((key,), "stands at each of sources, not beside them")
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        for at, label in enumerate(self.labels):
            if label in self.labels[:at]:
                raise MisplacedError(("labels", at), f"{label!r} stands there twice")
        return self

    def all_sources(self) -> list[Source]:
        """The sources, one or several."""
        if self.source is None:
            return self.sources
        return [Source.model_validate({"uri": self.source, "format": self.format, "columns": self.columns})]

    def formats(self) -> list[tuple[tuple[str | int, ...], Format]]:
        """Each format named, with its place: ("sources", 0, "format")."""
        named: list[tuple[tuple[str | int, ...], Format]] = [
            (("sources", at, "format"), source.format) for at, source in enumerate(self.sources)
        ]
        return [(("format",), self.format), *named, (("validation", "format"), self.validation.format)]

"""What is trained on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .fields import Part, Text, Uri, Whole

Format = Literal["auto", "conversation", "prompt-completion", "alpaca", "sharegpt", "classification"]


class Source(Part):
    """A file, directory or dataset: JSONL, CSV or Parquet by its name; hf://org/name[/config][@revision] a dataset."""

    uri: Uri
    format: Format = "auto"
    columns: dict[Text, Text] = Field(default={}, description="what the format calls a field → this source's column")
    weight: float = Field(default=1.0, gt=0, le=1000, description="how often a row is seen in an epoch, on average")
    split: Text = Field(default="train", description="of a Hugging Face dataset")


class Held(Part):
    """Rows never trained on: a source of their own, or a share of the training rows, chosen by their content."""

    source: Uri | None = None
    format: Format = "auto"
    columns: dict[Text, Text] = Field(default={})
    share: float = Field(default=0.05, ge=0, lt=1)
    seed: Whole = 0


class Dataset(Part):
    """source, format and columns: of one source; sources: of several, mixed by weight."""

    source: Uri | None = None
    format: Format = "auto"
    columns: dict[Text, Text] = Field(default={})
    sources: list[Source] = Field(default=[])
    validation: Held = Held()
    packing: bool = Field(default=False, description="several short rows in one sequence, which do not see each other")
    train_on: Literal["assistant", "last-assistant", "all"] = "assistant"
    over_long: Literal["refuse", "drop", "truncate"] = Field(
        default="refuse", description="rows of more than maxSeqLength tokens; dropped or cut ones are counted"
    )
    duplicates: Literal["keep", "drop", "refuse"] = "keep"
    system_prompt: Text | None = Field(default=None, description="put before rows that have none of their own")
    chat_template: Uri | None = Field(default=None, description="a Jinja file instead of the tokenizer's own")
    labels: list[Text] = Field(default=[], description="of a classification, in the order of the head's outputs")

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> Self:
        if bool(self.source) == bool(self.sources):
            raise ValueError("give source, or sources with several of them")
        if self.sources and (self.format != "auto" or self.columns):
            raise ValueError("format and columns stand at each of sources, not beside them")
        return self

    def all_sources(self) -> list[Source]:
        """The sources, one or several."""
        if self.source is None:
            return self.sources
        return [Source.model_validate({"uri": self.source, "format": self.format, "columns": self.columns})]

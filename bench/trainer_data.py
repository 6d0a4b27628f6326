"""The trainer's way of the data, beside what a person would run instead, the same rows in one run.

`validate`: rows of a JSONL file checked strictly, beside bare `json.loads` over it (at least half its rate), and what
memory grows. `tokenise`: rendering, tokens and masks, beside the call per row that TRL makes (`apply_chat_template`
with `return_assistant_tokens_mask`); the same tokens and masks are asserted. `packing`: tokens that are somebody's, per
token computed, beside padding batches as they come. CPU seconds on one thread; medians. Usage, in the trainer's
environment: ``python bench/trainer_data.py [--quick] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before transformers: TRL's way has one thread too

import psutil

from aim_trainer.data.batches import Batches
from aim_trainer.data.encode import Counts, Encoder
from aim_trainer.data.problems import Problems
from aim_trainer.data.read import Reader, Seen
from aim_trainer.data.survey import check
from aim_trainer.data.tokens import Row, Tokens, write_tokens
from aim_trainer.job.dataset import Source
from aim_trainer.job.job import Spec

MODEL = Path(".models/smollm2-hf")
#: ChatML, as SmolLM2 has it, with what the assistant says marked: neither way knows it otherwise.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "how",
    "many",
    "stones",
    "does",
    "Ada",
    "have",
    "in",
    "Paris",
    "today",
    "she",
    "counted",
    "them",
    "again",
    "and",
    "there",
    "were",
    "seven",
    "of",
    "which",
    "two",
    "are",
    "blue",
]


def conversations(count: int) -> Iterator[list[dict[str, str]]]:
    """Short chats of one to three turns, as instruction data has them."""
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    for _ in range(count):
        turns: list[dict[str, str]] = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            turns.append({"role": "user", "content": text(4, 20)})
            turns.append({"role": "assistant", "content": text(4, 30)})
        yield turns


def spec(source: str, **dataset: Any) -> Spec:
    made = {"source": source, **dataset}
    return Spec.model_validate({"baseModel": {"modelId": str(MODEL)}, "dataset": made})


def cpu_seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def validate(directory: Path, rows: int, rounds: int) -> dict[str, Any]:
    file = directory / "chat.jsonl"
    with file.open("w") as out:
        for turns in conversations(rows):
            out.write(json.dumps({"messages": turns}) + "\n")

    def bare() -> None:
        with file.open("rb") as lines:
            for line in lines:
                json.loads(line)

    before = psutil.Process().memory_info().rss
    pairs = [(cpu_seconds(bare), cpu_seconds(lambda: check(spec(str(file))))) for _ in range(rounds)]
    grown = psutil.Process().memory_info().rss - before
    theirs, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "rows": rows,
        "bytes_per_row": file.stat().st_size // rows,
        "json_loads_rows_per_s": round(rows / theirs),
        "validated_rows_per_s": round(rows / ours),
        "ratio": round(statistics.median(b / o for b, o in pairs), 3),
        "memory_grown_bytes": grown,
    }


def tokenise(directory: Path, rows: int, rounds: int) -> dict[str, Any]:
    source, template = directory / "few.jsonl", directory / "marked.jinja"
    texts = list(conversations(rows))
    source.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in texts))
    template.write_text(MARKED)
    job = spec(str(source), chatTemplate=str(template))
    encoder = Encoder(job, MODEL)
    located = list(Reader(job).examples(Source(uri=str(source)), Problems(), Seen(str(source))))

    def ours() -> list[Row]:
        return [encoded.row for encoded in encoder(located, Problems(), Counts())]

    def theirs() -> list[Any]:
        return [
            encoder.tokenizer.apply_chat_template(
                turns, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
            )
            for turns in texts
        ]

    for row, other in zip(ours(), theirs(), strict=True):
        assert row.tokens.tolist() == other["input_ids"]
        assert row.trained.tolist() == other["assistant_masks"]
    tokens = sum(len(row.tokens) for row in ours())
    pairs = [(cpu_seconds(theirs), cpu_seconds(ours)) for _ in range(rounds)]
    return {
        "rows": rows,
        "tokens": tokens,
        "per_row_tokens_per_s": round(tokens / statistics.median(t for t, _ in pairs)),
        "batched_tokens_per_s": round(tokens / statistics.median(o for _, o in pairs)),
        "ratio": round(statistics.median(t / o for t, o in pairs), 3),
        "masks": "equal",
    }


def packing(directory: Path, rows: int) -> list[dict[str, Any]]:
    source = directory / "chats.jsonl"
    source.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations(rows)))
    template = directory / "marked.jinja"
    job = spec(str(source), chatTemplate=str(template))
    located = Reader(job).examples(Source(uri=str(source)), Problems(), Seen(str(source)))
    write_tokens(directory / "tokens", (e.row for e in Encoder(job, MODEL)(located, Problems(), Counts())), {})
    tokens = Tokens(directory / "tokens")
    told = []
    for micro_batch in (4, 16):
        shares = {
            name: useful_share(
                Batches(
                    tokens,
                    seed=0,
                    global_batch=micro_batch * accumulation,
                    micro_batch=micro_batch,
                    max_seq_length=1024,
                    packing=packed,
                )
            )
            for name, accumulation, packed in (
                ("padded", 1, False),
                ("padded, 8 of like length", 8, False),
                ("packed", 1, True),
            )
        }
        told.append({"batch": micro_batch, **shares, "ratio": round(shares["packed"] / shares["padded"], 3)})
    return told


def useful_share(batches: Batches) -> float:
    """Tokens that are somebody's, of those the model computes in an epoch."""
    useful = sum(int(length) for length in batches._lengths)
    computed = sum(batch.input_ids.size for step in range(batches.steps_per_epoch) for batch in batches.of(step))
    return round(useful / computed, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rounds = 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as directory:
        result: dict[str, Any] = {
            "validate": validate(Path(directory), 100_000 if options.quick else 1_000_000, rounds)
        }
        print_facts("validate, beside json.loads", result["validate"])
        result["tokenise"] = tokenise(Path(directory), 1_000 if options.quick else 5_000, rounds)
        print_facts("tokenise and mask, beside TRL's call per row", result["tokenise"])
        result["packing"] = packing(Path(directory), 1_000 if options.quick else 5_000)
        for line in result["packing"]:
            print_facts("packing to 1,024, beside padding: useful share of what is computed", line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def print_facts(title: str, facts: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, value in facts.items():
        print(f"  {name.replace('_', ' '):28}{value:>14,}" if not isinstance(value, str) else f"  {name:28}{value:>14}")


if __name__ == "__main__":
    main()

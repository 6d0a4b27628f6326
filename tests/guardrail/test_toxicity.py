"""The toxicity family: the embedded model, a directory in its place, and policies over both."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from pathlib import Path

import httpx
import numpy as np
import pytest

from aim_guardrail.detectors.base import Asked, BatchDetector, Finding, Passage
from aim_guardrail.detectors.families import FAMILIES, Wanted, build_detector
from aim_guardrail.detectors.onnx import ModelError, TextClassifier
from aim_guardrail.detectors.toxicity.family import TOXICITY_LABELS
from aim_guardrail.detectors.toxicity.model import embedded, read
from aim_guardrail.detectors.toxicity.words import TOKENS, WordWindows
from aim_guardrail.policy import PolicyError, parse_policy
from fake_predictor import FakePredictor
from guarded import ask, events, guardrail, metric, orders, said
from served import Served
from tiny_onnx import classifier

FOLDER = resources.files("aim_guardrail.detectors.toxicity")
FAMILY = FAMILIES["toxicity"]
ALL = frozenset(TOXICITY_LABELS)
CHAT = "/v1/chat/completions"

TOXIC = {
    "you are a stupid idiot and i hate you": {"TOXIC", "INSULT", "OBSCENE", "SEVERE_TOXIC"},
    "Go fuck yourself, asshole!": {"TOXIC", "OBSCENE", "INSULT", "SEVERE_TOXIC"},
    "I will kill you and I will rape your family. Die, you die!": {"TOXIC", "THREAT"},
    "all niggers and faggots are disgusting": {"TOXIC", "IDENTITY_HATE"},
}
BENIGN = [
    "hello",
    "How do I kill a process that ignores SIGTERM?",
    "Stupid question, I know: what's the difference between a list and a tuple?",
    "Please shoot the photo again, the background is awful.",
    "My grandfather died last year and I hate how quiet the house is.",
    "Kannst du das kürzer fassen und die Anrede weglassen?",
    "Die Sonne scheint und mir geht es gut. Hast du die Nachrichten gehört?",
    "Elke interactie is een nieuwe ervaring die bijdraagt aan mijn ontwikkeling.",
    "Who was the first black president of South Africa, and which party do gay voters prefer in Malta?",
    "Write a threat model for a payment service, with attack trees.",
    "def dump(core): raise SystemExit(f'dying at {core}')",
]


def counted(findings: list[Finding]) -> set[str]:
    return {f.label for f in findings if f.score >= TOXICITY_LABELS[f.label].threshold}


def passage(text: str) -> Passage:
    return Passage(text, "prompt", "user")


async def scan(detector: BatchDetector, *texts: str) -> list[list[Finding]]:
    return await detector.scan_batch([passage(text) for text in texts], Asked(time.monotonic() + 20))


@pytest.fixture
async def detector() -> AsyncIterator[BatchDetector]:
    detector = build_detector("toxicity", Wanted(ALL, FAMILY.options()))
    yield detector  # type: ignore[misc]
    await detector.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("text", TOXIC)
async def test_toxic_texts_are_found_with_their_labels(detector: BatchDetector, text: str) -> None:
    (found,) = await scan(detector, text)
    assert TOXIC[text] <= counted(found)
    assert {f.label for f in found} == ALL
    assert all(text[f.start : f.end] for f in found)


@pytest.mark.parametrize("text", BENIGN)
async def test_ordinary_texts_pass(detector: BatchDetector, text: str) -> None:
    (found,) = await scan(detector, text)
    assert counted(found) == set()


DISGUISES = [
    "ｆｕｃｋ you",
    "fu\u200bck you",
    "fúck yóu",
    "fu\u0441k you",
    "FUCK\u00a0YOU",
    "fuck\r\nyou",
    "“fuck you”",
]


@pytest.mark.parametrize("text", DISGUISES)
async def test_a_spelling_that_looks_the_same_is_the_same(detector: BatchDetector, text: str) -> None:
    plain, found = await scan(detector, "fuck you", text)
    assert [f.score for f in found] == [f.score for f in plain]
    assert all("u" in text[f.start : f.end].lower() for f in found)


@pytest.mark.parametrize("place", [0, 79, 80, 100, 1000, 1999])
async def test_the_place_in_a_long_text_does_not_matter_and_is_told(detector: BatchDetector, place: int) -> None:
    words = ["the", "library", "opens", "on", "monday"] * 400
    words[place:place] = ["you", "fucking", "asshole"]
    text = " ".join(words)
    (found,) = await scan(detector, text)
    worst = next(f for f in found if f.label == "OBSCENE")
    assert worst.score > 0.6
    assert "fucking" in text[worst.start : worst.end]
    assert worst.end - worst.start < TOKENS * 8


async def test_what_holds_no_known_word_is_not_toxic(detector: BatchDetector) -> None:
    assert await scan(detector, "", "!!!", "1234567 zzqx", "日本語のテキスト") == [[], [], [], []]


def test_windows_are_the_last_words_with_zeros_before_them() -> None:
    """As Keras fills up: `pad_sequences` pads in front."""
    windower = WordWindows(["the", "don't", "end"])
    (window,) = windower.windows("The END, unknown: don't")
    assert window.ids.tolist() == [0] * (TOKENS - 3) + [1, 3, 2]
    long = list(windower.windows("the " * 250 + "end"))
    assert [row.ids[0] for row in long] == [1, 1, 1]
    assert long[-1].ids[-1] == 3
    assert (long[0].start, long[-1].end) == (0, 1003)


async def test_neighbours_do_not_matter(detector: BatchDetector) -> None:
    texts = [*TOXIC, *BENIGN] * 3
    together = await scan(detector, *texts)
    for text, found in zip(texts, together, strict=True):
        assert await scan(detector, text) == [found]


def test_the_files_are_those_of_the_card_and_small() -> None:
    card = json.loads((FOLDER / "jigsaw.json").read_text())
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest
    assert sum(len((FOLDER / name).read_bytes()) for name in card["sha256"]) < 5 << 20
    assert set(card["labels"]) == ALL


@pytest.mark.parametrize("name", ["jigsaw.onnx", "jigsaw.txt", "jigsaw.json"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    for file in ("jigsaw.onnx", "jigsaw.txt", "jigsaw.json"):
        shutil.copy(str(FOLDER / file), tmp_path / file)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-2] + b"??")
    with pytest.raises(ModelError, match=r"install the package anew"):
        read(tmp_path)


async def test_closing_one_detector_leaves_another_working(detector: BatchDetector) -> None:
    other = embedded()
    await other.close()
    assert (await scan(detector, "fuck"))[0]


# --- through the server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = tmp_path_factory.mktemp("toxicity") / "policy.yaml"
    rule = "{type: toxicity, action: {THREAT: block, INSULT: block, OBSCENE: block, default: flag}}"
    file.write_text(f"version: 2\nname: p\nbudget_ms: 5000\nprompt: [{rule}]\nanswer: [{rule}]\n")
    with guardrail(predictor.host, "--policy", str(file)) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_a_toxic_prompt_does_not_reach_the_model(guarded: Served, predictor: FakePredictor, stream: bool) -> None:
    seen = len(predictor.seen)
    refused = httpx.post(f"{guarded.url}{CHAT}", json=ask("Go fuck yourself, asshole!", stream=stream), timeout=30)
    assert refused.status_code == 400
    assert refused.headers["x-guardrail-families"] == "toxicity"
    assert len(predictor.seen) == seen
    passed = httpx.post(f"{guarded.url}{CHAT}", json=ask("How do I kill a process?", stream=stream), timeout=30)
    assert passed.status_code == 200
    assert passed.headers["x-guardrail-verdict"] == "allow"
    batches = metric(guarded, "guardrail_batch_size_count")
    assert batches >= 2
    assert metric(guarded, "guardrail_batch_size_bucket", le="16.0") == batches
    assert metric(guarded, "guardrail_queue_depth") == 0


def test_a_toxic_answer_does_not_reach_the_client(guarded: Served) -> None:
    says = orders(say="You are a stupid fucking idiot and everybody hates you.")
    refused = httpx.post(f"{guarded.url}{CHAT}", json=ask("hello"), headers=says, timeout=30)
    assert refused.status_code == 400
    assert "stupid" not in refused.text
    streamed = httpx.post(f"{guarded.url}{CHAT}", json=ask("hello", stream=True), headers=says, timeout=30)
    assert "idiot" not in said(events(streamed))
    assert '"finish_reason":"content_filter"' in streamed.text.replace(" ", "")


# --- another model ----------------------------------------------------------------------------------------------------

#: As unitary/toxic-bert names them.
JIGSAW = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")


def options(**given: object) -> object:
    return FAMILY.options.model_validate(given)


async def test_a_directory_takes_the_embedded_models_place(tmp_path: Path) -> None:
    classifier(tmp_path, {"awful": [3.0, -3, -3, -3, 2.0, -3]}, JIGSAW)
    detector = build_detector("toxicity", Wanted(ALL, options(path=str(tmp_path))))  # type: ignore[arg-type]
    (found,) = await scan(detector, "you are awful")  # type: ignore[arg-type]
    assert {f.label: round(f.score, 2) for f in found if f.score > 0.5} == {"TOXIC": 0.95, "INSULT": 0.88}
    assert detector.digest != embedded().digest  # type: ignore[union-attr]
    await detector.close()  # type: ignore[union-attr]


async def test_other_names_are_known_or_can_be_said(tmp_path: Path) -> None:
    classifier(tmp_path, {"awful": [3.0, -3, 1.0]}, ["toxicity", "identity-attack", "LABEL_2"])
    given = options(path=str(tmp_path), labels={"LABEL_2": "THREAT"})
    detector = build_detector("toxicity", Wanted(frozenset(["TOXIC", "THREAT"]), given))  # type: ignore[arg-type]
    (found,) = await scan(detector, "awful")  # type: ignore[arg-type]
    assert {f.label: round(f.score, 2) for f in found} == {"TOXIC": 0.95, "IDENTITY_HATE": 0.05, "THREAT": 0.73}
    await detector.close()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("labels", "said", "says"),
    [
        (["toxic", "fine"], {}, r"nothing among its labels \(toxic, fine\) means IDENTITY_HATE, INSULT, .*: say which"),
        (["toxic", "fine"], {"nice": "TOXIC"}, r"labels: the model has no 'nice': it has toxic, fine"),
        (["toxic", "fine"], {"fine": "GOOD"}, r"labels: 'fine' stands for 'GOOD': use one of TOXIC, "),
    ],
)
def test_a_model_that_cannot_find_what_is_asked_is_refused(
    tmp_path: Path, labels: list[str], said: dict[str, str], says: str
) -> None:
    classifier(tmp_path, {}, labels)
    with pytest.raises(ModelError, match=says):
        build_detector("toxicity", Wanted(ALL, options(path=str(tmp_path), labels=said)))  # type: ignore[arg-type]


POLICY = "version: 2\nname: p\nprompt:\n- type: toxicity\n  action: block\n  options: {}\n"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{modle: /m}", "modle"),
        ("{threads: 2}", "threads goes with path, which is not given: remove it"),
        ("{path: /m, api: classify}", "api goes with endpoint, which is not given: remove it"),
        ("{endpoint: 'http://g', model: m, classes: [A], threads: 2}", "threads goes with path"),
        ("{endpoint: 'http://g', path: /m}", "path is a directory and endpoint a server: give one of them"),
        ("{endpoint: 'http://g', model: m}", "an endpoint needs model, .*, and classes"),
        ("{endpoint: 'ftp://g', model: m, classes: [A]}", "no address of a server"),
        ("{labels: {A: TOXIC}}", "labels are those of another model: give path or endpoint, or remove them"),
        ("{path: 3}", "path"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        parse_policy(POLICY.replace("{}", given), "p.yaml")


def test_options_can_be_told_apart() -> None:
    def wanted(given: str) -> Wanted:
        return parse_policy(POLICY.replace("{}", given), "p.yaml").rules("prompt")[0].wanted

    assert hash(wanted("{path: /m, labels: {a: TOXIC}}")) == hash(wanted("{path: /m, labels: {a: TOXIC}}"))
    assert wanted("{path: /m, labels: {a: TOXIC}}") != wanted("{path: /m, labels: {a: INSULT}}")


async def test_sexual_texts_are_found_by_a_model_of_ones_own(tmp_path: Path) -> None:
    classifier(tmp_path, {"awful": [-3.0, 3.0]}, ["SFW", "NSFW"], problem_type=None)
    family = FAMILIES["nsfw_text"]
    given = family.options.model_validate({"path": str(tmp_path)})
    detector = build_detector("nsfw_text", Wanted(frozenset(["NSFW"]), given))
    (plain, found) = await scan(detector, "hello you", "awful")  # type: ignore[arg-type]
    assert [(f.label, round(f.score, 3)) for f in (*plain, *found)] == [("NSFW", 0.5), ("NSFW", 0.998)]
    await detector.close()  # type: ignore[union-attr]


def test_without_an_embedded_model_one_must_be_given() -> None:
    policy = "version: 2\nname: p\nprompt:\n- {type: nsfw_text, action: block}\n"
    with pytest.raises(PolicyError, match="there is no embedded model: give path, a directory, or endpoint"):
        parse_policy(policy, "p.yaml")


# --- cost -------------------------------------------------------------------------------------------------------------


SHAPES = {
    "words": "the ",
    "one run of letters": "a",
    "mixed alphabets": "а\u0430bc\u03b1",
    "false friends": "die ",
    "marks": "!?,;:",
    "escapes": "\\\\u0041",
    "breaks": "\n\t ",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_twice_the_text_costs_twice_at_most(shape: str) -> None:
    """CPU time of the windows, with a margin of three for a busy machine."""
    windower = WordWindows(["the", "die", "a", "abca"])

    def spent(chars: int) -> float:
        text = (SHAPES[shape] * chars)[:chars]
        tries = []
        for _ in range(3):
            start = time.process_time()
            assert sum(1 for _ in windower.windows(text)) >= 0
            tries.append(time.process_time() - start)
        return min(tries)

    spent(1000)
    assert spent(160_000) < 3 * 8 * max(spent(20_000), 0.001)


# --- how it was made --------------------------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _keras_lstm(x: np.ndarray, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Keras' equations as its documentation has them: gates i, f, c, o."""
    units = recurrent.shape[0]
    state = memory = np.zeros((len(x), units))
    states = []
    for step in range(x.shape[1]):
        gate_in, forget, cell, out = np.split(x[:, step] @ kernel + state @ recurrent + bias, 4, axis=1)
        memory = _sigmoid(forget) * memory + _sigmoid(gate_in) * np.tanh(cell)
        state = _sigmoid(out) * np.tanh(memory)
        states.append(state)
    return np.stack(states, axis=1)


def test_the_converted_graph_computes_what_keras_computes(tmp_path: Path) -> None:
    import onnx

    from aim_guardrail.detectors.onnx.graph import Graph
    from toxicity_training import graph

    random = np.random.default_rng(5)
    shapes = {
        "embedding": (40, 8),
        "dense.kernel": (10, 7),
        "dense.bias": (7,),
        "output.kernel": (7, 6),
        "output.bias": (6,),
    }
    for side in ("forward", "backward"):
        shapes |= {f"{side}.kernel": (8, 20), f"{side}.recurrent": (5, 20), f"{side}.bias": (20,)}
    weights = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    file = tmp_path / "model.onnx"
    onnx.save(graph.built(weights), file)
    ids = random.integers(0, 40, (3, graph.TOKENS))
    x = weights["embedding"][ids]
    forward = _keras_lstm(x, *(weights[f"forward.{part}"] for part in ("kernel", "recurrent", "bias")))
    backward = _keras_lstm(x[:, ::-1], *(weights[f"backward.{part}"] for part in ("kernel", "recurrent", "bias")))
    both = np.concatenate([forward, backward[:, ::-1]], axis=2).max(axis=1)
    hidden = np.maximum(both @ weights["dense.kernel"] + weights["dense.bias"], 0)
    expected = hidden @ weights["output.kernel"] + weights["output.bias"]
    made = Graph(file)
    assert not made.mixes_rows
    assert np.abs(made.run({"input_ids": ids}) - expected).max() < 0.02


def test_a_tokenizers_pickle_is_read_without_running_it(tmp_path: Path) -> None:
    import os
    import pickle
    from collections import OrderedDict

    from toxicity_training import pickled

    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "pwned"),)

    for raw in (pickle.dumps(Evil()), pickle.dumps(OrderedDict(a=Evil()))):
        with pytest.raises(pickled.Refused, match=r"asks for posix\.mkdir: not a tokenizer"):
            pickled.words(raw)
    assert not (tmp_path / "pwned").exists()


def test_the_classifier_is_the_shared_runtime() -> None:
    assert isinstance(embedded(), TextClassifier)

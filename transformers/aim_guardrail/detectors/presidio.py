"""The edge to Presidio: its pattern and checksum recognizers, without its pipeline.

`import presidio_analyzer` imports spaCy and 60 country modules (2.9 CPU seconds measured), of which these
recognizers use nothing. `recognizers` therefore imports the recognizer modules alone (0.45 s, most of it
tldextract's `requests`): the package's `__init__` is stood in for by bare modules while they load, which are taken
out of `sys.modules` afterwards, so that anyone else who imports Presidio gets the whole of it. Should a Presidio
release not load that way, the ordinary import is used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOG = logging.getLogger(__name__)

PHONE_REGIONS = ("US", "GB", "DE", "FR", "IN")
"""Regions whose national phone formats are understood (US stands for all of +1). Numbers written with + and a country
code are understood everywhere. Each region costs 0.05 ms a candidate and brings false positives of its own.
"""
_E164_DIGITS = 15  # the longest number with its country code (ITU-T E.164)

_ROOT = "presidio_analyzer"
_GENERIC = f"{_ROOT}.predefined_recognizers.generic"
_US = f"{_ROOT}.predefined_recognizers.country_specific.us"
_PACKAGES = (
    _ROOT,
    f"{_ROOT}.nlp_engine",
    f"{_ROOT}.predefined_recognizers",
    _GENERIC,
    _US.rpartition(".")[0],
    _US,
)
# In the order of the package's own __init__: later ones import the names of earlier ones from the package.
_NAMES = {
    "analysis_explanation": "AnalysisExplanation",
    "recognizer_result": "RecognizerResult",
    "entity_recognizer": "EntityRecognizer",
    "local_recognizer": "LocalRecognizer",
    "pattern": "Pattern",
    "pattern_recognizer": "PatternRecognizer",
}

# What Presidio's own patterns miss: Mastercard's 2-series and PANs of 18 and 19 digits (presidio PR 2075).
_CARDS = (
    r"(?<![0-9])(?:2[2-7][0-9]{2})(?:[- ]?[0-9]{4}){3}(?![0-9])",
    r"(?<![0-9])[3-6][0-9]{3}(?:[- ]?[0-9]{4}){3}[- ]?[0-9]{2,3}(?![0-9])",
)
# Presidio's pattern takes every \w and many symbols for a local part, so that `to=bob@x.com` or the text of a script
# without spaces becomes part of the address. This one takes what providers hand out.
_EMAIL = (
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_][A-Za-z0-9._%+'-]{0,63}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]{0,61}[A-Za-z0-9](?![A-Za-z0-9])"
)


class Hit(NamedTuple):
    """A value in the text given: `[start, end)`, Presidio's score."""

    start: int
    end: int
    score: float


class Recognizer:
    """One of Presidio's recognizers, reduced to what we use of it. Thread-safe."""

    def __init__(self, recognizer: Any, label: str) -> None:
        self._recognizer = recognizer
        self._labels = [label]

    def find(self, text: str) -> list[Hit]:
        """The values in a short text."""
        return [Hit(r.start, r.end, r.score) for r in self._recognizer.analyze(text, self._labels)]


class PhoneRecognizer(Recognizer):
    """Tries every region only where the number does not name its own."""

    def __init__(self, kind: Any) -> None:
        super().__init__(kind(supported_regions=PHONE_REGIONS), "PHONE_NUMBER")
        self._international = Recognizer(kind(supported_regions=PHONE_REGIONS[:1]), "PHONE_NUMBER")

    def find(self, text: str) -> list[Hit]:
        if "+" in text and sum(char.isdigit() for char in text) <= _E164_DIGITS:
            return self._international.find(text)
        return super().find(text)


def recognizers(labels: Iterable[str]) -> dict[str, Recognizer]:
    """Recognizers by label. The first call takes half a second."""
    return {label: _build(label) for label in labels}


@functools.cache
def _build(label: str) -> Recognizer:
    modules = _modules()
    pattern = modules["pattern"].Pattern
    if label == "CREDIT_CARD":
        kind = modules["credit_card_recognizer"].CreditCardRecognizer
        extra = [pattern("aim card", regex, 0.3) for regex in _CARDS]
        return Recognizer(kind(patterns=[*kind.PATTERNS, *extra]), label)
    if label == "EMAIL_ADDRESS":
        return Recognizer(_email(modules["email_recognizer"].EmailRecognizer, pattern), label)
    if label == "PHONE_NUMBER":
        return PhoneRecognizer(modules["phone_recognizer"].PhoneRecognizer)
    kinds = {
        "CRYPTO": ("crypto_recognizer", "CryptoRecognizer"),
        "IBAN_CODE": ("iban_recognizer", "IbanRecognizer"),
        "IP_ADDRESS": ("ip_recognizer", "IpRecognizer"),
        "US_SSN": ("us_ssn_recognizer", "UsSsnRecognizer"),
    }
    module, kind_name = kinds[label]
    return Recognizer(getattr(modules[module], kind_name)(), label)


def _email(base: Any, pattern: Any) -> Any:
    """Presidio's recognizer asks tldextract, which by default fetches the public suffix list and caches it on disk.
    Ours uses the list inside the package: no network, no files written.
    """
    import tldextract

    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    suffixes("warm.example.com")

    class OfflineEmailRecognizer(base):  # type: ignore[misc]
        def validate_result(self, pattern_text: str) -> bool:
            return bool(suffixes(pattern_text).top_domain_under_public_suffix)

    return OfflineEmailRecognizer(patterns=[pattern("aim email", _EMAIL, 0.5)])


@functools.cache
def _modules() -> dict[str, ModuleType]:
    if _ROOT not in sys.modules:
        try:
            with _bare_packages():
                return _import_modules()
        except (ImportError, AttributeError) as error:
            _LOG.warning("Presidio's recognizers cannot be imported alone (%s): importing all of it", error)
    return _import_modules()


def _import_modules() -> dict[str, ModuleType]:
    names = [f"{_ROOT}.pattern"]
    names += [f"{_GENERIC}.{kind}_recognizer" for kind in ("credit_card", "crypto", "email", "iban", "ip", "phone")]
    names += [f"{_US}.us_ssn_recognizer"]
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in names}


@contextmanager
def _bare_packages() -> Iterator[None]:
    spec = importlib.util.find_spec(_ROOT)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{_ROOT} is not installed")
    location = spec.submodule_search_locations[0]
    before = set(sys.modules)
    try:
        for name in (
            _ROOT,
            f"{_ROOT}.nlp_engine",
            f"{_ROOT}.predefined_recognizers",
            _GENERIC,
            _US.rpartition(".")[0],
            _US,
        ):
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [location + name.removeprefix(_ROOT).replace(".", "/")]
        sys.modules[f"{_ROOT}.nlp_engine"].NlpArtifacts = object  # type: ignore[attr-defined] # an annotation only
        for module, name in _NAMES.items():
            setattr(sys.modules[_ROOT], name, getattr(importlib.import_module(f"{_ROOT}.{module}"), name))
        yield
    finally:
        for name in set(sys.modules) - before:
            if name == _ROOT or name.startswith(f"{_ROOT}."):
                del sys.modules[name]

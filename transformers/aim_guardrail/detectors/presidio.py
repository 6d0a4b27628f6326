"""The edge to Presidio: what its recognizers know of a value (checksums, invalid numbers), without its pipeline.

Where a value may stand is searched by ours, in linear time; a recognizer is asked about one value as a whole. Its own
search costs 30 us a call, most of it for explanations, and reads on beyond what a stream may know. What Presidio says
of cards, IBANs and IPv4 addresses takes it 8 to 10 us each: the same is worked out here in one, and tests hold it
against Presidio's word.

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
import re
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from string import ascii_letters
from types import ModuleType
from typing import TYPE_CHECKING, Any

from aim_guardrail.detectors.checksums import luhn

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOG = logging.getLogger(__name__)

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

_KINDS = {
    "CREDIT_CARD": ("credit_card_recognizer", "CreditCardRecognizer"),
    "CRYPTO": ("crypto_recognizer", "CryptoRecognizer"),
    "EMAIL_ADDRESS": ("email_recognizer", "EmailRecognizer"),
    "IBAN_CODE": ("iban_recognizer", "IbanRecognizer"),
    "IP_ADDRESS": ("ip_recognizer", "IpRecognizer"),
    "US_SSN": ("us_ssn_recognizer", "UsSsnRecognizer"),
}
LABELS = frozenset(_KINDS)
"""The labels that Presidio judges."""

_AS_NUMBER = {ord(letter): str(int(letter, 36)) for letter in ascii_letters}  # in an account: ISO 13616
_PART = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_DOTTED = re.compile(rf"{_PART}(?:\.{_PART}){{3}}(?:/(?:[0-2]?[0-9]|3[0-2]))?")


class Recognizer:
    """One of Presidio's recognizers, reduced to what we use of it. Thread-safe."""

    def __init__(self, recognizer: Any) -> None:
        self._recognizer = recognizer
        self._pattern_score = max(pattern.score for pattern in recognizer.patterns)

    def score(self, value: str) -> float:
        """How certain it is that this string, which has the form of a value, is one: 0 (is none) to 1 (proven)."""
        valid = self._recognizer.validate_result(value)
        if valid is False or self._recognizer.invalidate_result(value):
            return 0.0
        return 1.0 if valid else float(self._pattern_score)


class _Cards(Recognizer):
    """Luhn is all that Presidio asks of a card's digits."""

    def score(self, value: str) -> float:
        return 1.0 if luhn(_joined(value)) else 0.0


class _Accounts(Recognizer):
    """Presidio's pattern of each country, and check digits of 02 to 98 that agree modulo 97 (ISO 13616)."""

    def __init__(self, recognizer: Any) -> None:
        super().__init__(recognizer)
        per_country = _modules()["iban_recognizer"].regex_per_country
        self._formats = {country: re.compile(regex) for country, regex in per_country.items()}

    def score(self, value: str) -> float:
        plain = _joined(value)
        form = self._formats.get(plain[:2])
        if form is None or not form.fullmatch(plain) or not "02" <= plain[2:4] <= "98":
            return 0.0
        return 1.0 if int((plain[4:] + plain[:4]).translate(_AS_NUMBER)) % 97 == 1 else 0.0


class _Addresses(Recognizer):
    """What has four parts is decided here: `ipaddress` takes parts of up to 255 without leading zeros."""

    def score(self, value: str) -> float:
        return self._pattern_score if _DOTTED.fullmatch(value) else super().score(value)


def _joined(value: str) -> str:
    return value.replace(" ", "").replace("-", "")


def iban_lengths() -> dict[str, int]:
    """The length of each country's IBAN, by country code. Presidio writes `([0-9][ ]?){4}` for four characters."""
    per_country = _modules()["iban_recognizer"].regex_per_country
    return {
        country: 3 + sum(int(repeat or 1) for repeat in re.findall(r"\[ \]\?(?:\)\{([0-9])\})?", regex))
        for country, regex in per_country.items()
    }


def recognizers(labels: Iterable[str]) -> dict[str, Recognizer]:
    """Recognizers by label. The first call takes half a second."""
    return {label: _build(label) for label in labels}


@functools.cache
def _build(label: str) -> Recognizer:
    module, kind_name = _KINDS[label]
    kind = getattr(_modules()[module], kind_name)
    return _JUDGES.get(label, Recognizer)(_offline(kind)() if label == "EMAIL_ADDRESS" else kind())


_JUDGES: dict[str, type[Recognizer]] = {"CREDIT_CARD": _Cards, "IBAN_CODE": _Accounts, "IP_ADDRESS": _Addresses}


def _offline(base: Any) -> Any:
    """Presidio's recognizer asks tldextract, which by default fetches the public suffix list and caches it on disk.
    Ours uses the list inside the package: no network, no files written.
    """
    import tldextract

    suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    suffixes("warm.example.com")

    class OfflineEmailRecognizer(base):  # type: ignore[misc]
        def validate_result(self, pattern_text: str) -> bool:
            return bool(suffixes(pattern_text.rpartition("@")[2]).top_domain_under_public_suffix)

    return OfflineEmailRecognizer


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
    names = [f"{_ROOT}.pattern", f"{_US}.us_ssn_recognizer"]
    names += [f"{_GENERIC}.{module}" for module, _ in _KINDS.values() if not module.startswith("us_")]
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in names}


@contextmanager
def _bare_packages() -> Iterator[None]:
    spec = importlib.util.find_spec(_ROOT)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{_ROOT} is not installed")
    location = spec.submodule_search_locations[0]
    before = set(sys.modules)
    try:
        for name in _PACKAGES:
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

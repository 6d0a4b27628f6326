"""Identity and tax numbers, passports, by country: where one may stand, its check digit, and the words that name it.

A number of nothing but digits passes a check digit once in ten or eleven times, so it counts only where a word before
says what it is; alone it scores 0.3. What is written in a form that nothing else has counts anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aim_guardrail.detectors import checksums
from aim_guardrail.detectors.digit_rows import Hit
from aim_guardrail.detectors.words import words_before

_REACH_CHARS = 64
_SEPARATORS = re.compile(r"[- ./]")
_START = r"(?<![A-Za-z0-9])(?<![0-9][-. /])"
# Behind a digit a row of digits would still be the same unit; behind a letter it would not.
_END = r"(?![A-Za-z0-9])(?![-. /][0-9])"
_LETTER_END = r"(?![A-Za-z0-9])"
_UNSURE = 0.3


@dataclass(frozen=True, slots=True)
class Identifier:
    """One kind of number. `alone`, `named`: its score without, and with, one of its `words` before it."""

    label: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] | None
    words: frozenset[str]
    alone: float
    named: float

    def hits(self, scan: str, since: int) -> Iterator[Hit]:
        """Those that begin at `since` or later. Linear in the text."""
        for number in self.pattern.finditer(scan, since):
            if self.check is not None and not self.check(_SEPARATORS.sub("", number[0])):
                continue
            score = self.alone
            if self.named > score and not self.words.isdisjoint(words_before(scan, number.start(), _REACH_CHARS)):
                score = self.named
            if score:
                yield Hit(*number.span(), score)


def _identifier(
    label: str,
    pattern: str,
    check: Callable[[str], bool] | None,
    words: str = "",
    alone: float = _UNSURE,
    named: float = 1.0,
    end: str = _END,
) -> Identifier:
    return Identifier(label, re.compile(f"{_START}(?:{pattern}){end}"), check, frozenset(words.split()), alone, named)


_TAX = "tax steuer steuerid steuernummer fiscal fiscale tin"
_ID = "id identity identification ident"
_S = "[ -]?"

IDENTIFIERS: dict[str, Identifier] = {
    each.label: each
    for each in (
        _identifier(
            "AU_TFN", f"[0-9]{{3}}{_S}[0-9]{{3}}{_S}[0-9]{{3}}", checksums.tfn, f"{_TAX} tfn australian australia"
        ),
        _identifier(
            "BE_NATIONAL_NUMBER",
            r"[0-9]{2}\.?[0-9]{2}\.?[0-9]{2}[- ]?[0-9]{3}\.?[0-9]{2}",
            checksums.rijksregister,
            f"rijksregister rijksregisternummer registre national nationaal insz niss {_ID}",
        ),
        _identifier("BR_CNPJ", r"[0-9]{2}\.[0-9]{3}\.[0-9]{3}/[0-9]{4}-[0-9]{2}", checksums.cnpj, alone=1.0),
        _identifier("BR_CPF", r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}|[0-9]{11}", checksums.cpf, "cpf"),
        _identifier(
            "CA_SIN",
            f"(?![08])[0-9]{{3}}{_S}[0-9]{{3}}{_S}[0-9]{{3}}",
            checksums.luhn,
            "sin nas insurance assurance canadian",
        ),
        _identifier("CH_AHV", r"756\.?[0-9]{4}\.?[0-9]{4}\.?[0-9]{2}", checksums.ean, alone=1.0),
        _identifier(
            "DE_ID_CARD",
            "[CFGHJKLMNPRTVWXYZ][CFGHJKLMNPRTVWXYZ0-9]{8}[0-9]",
            checksums.icao,
            "ausweis personalausweis ausweisnummer reisepass pass passnummer passport card id",
        ),
        _identifier(
            "DE_TAX_ID",
            r"[1-9][0-9] ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}",
            checksums.mod_11_10,
            f"{_TAX} idnr steueridentifikationsnummer identifikationsnummer",
        ),
        _identifier("ES_NIE", r"[XYZ][- ]?[0-9]{7}-?[A-Z]", checksums.dni, alone=1.0, end=_LETTER_END),
        _identifier("ES_NIF", r"[0-9]{8}-?[A-Z]", checksums.dni, alone=1.0, end=_LETTER_END),
        _identifier(
            "FI_PERSONAL_IDENTITY_CODE",
            "[0-3][0-9][01][0-9]{3}[-+A-FU-Y][0-9]{3}[0-9A-Y]",
            checksums.hetu,
            alone=1.0,
            end=_LETTER_END,
        ),
        _identifier(
            "FR_NIR",
            r"[12] ?[0-9]{2} ?(?:0[1-9]|1[0-2]|[2-9][0-9]) ?(?:[0-9]{2}|2[AB]) ?[0-9]{3} ?[0-9]{3}[ -]?[0-9]{2}",
            checksums.nir,
            alone=1.0,
        ),
        _identifier(
            "IN_AADHAAR", r"[2-9][0-9]{3}[ -]?[0-9]{4}[ -]?[0-9]{4}", checksums.verhoeff, "aadhaar aadhar uid uidai"
        ),
        _identifier("IN_PAN", "[A-Z]{3}[ABCFGHLJPTK][A-Z][0-9]{4}[A-Z]", None, alone=0.6, named=0.6, end=_LETTER_END),
        _identifier(
            "IT_FISCAL_CODE",
            "[A-Z]{6}[0-9LMNP-V]{2}[ABCDEHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z]",
            checksums.codice_fiscale,
            alone=1.0,
            end=_LETTER_END,
        ),
        _identifier("KR_RRN", "[0-9]{6}-[1-8][0-9]{6}", checksums.rrn, alone=1.0),
        _identifier(
            "NL_BSN", r"[0-9]{9}|[0-9]{4}\.[0-9]{2}\.[0-9]{3}", checksums.bsn, "bsn burgerservicenummer sofi sofinummer"
        ),
        _identifier(
            "PASSPORT",
            r"[A-Z]{0,2}[0-9]{6,9}|[CFGHJKLMNPRTVWXYZ][CFGHJKLMNPRTVWXYZ0-9]{8}",
            None,
            "passport passports passeport pasaporte passaporte passaporto paspoort reisepass paszport pasport",
            alone=0.0,
            named=0.6,
        ),
        _identifier("PL_PESEL", "[0-9]{11}", checksums.pesel, "pesel"),
        _identifier(
            "SE_PERSONNUMMER",
            r"(?:19|20)?[0-9]{6}[-+][0-9]{4}|(?:19|20)?[0-9]{10}",
            checksums.personnummer,
            "personnummer personnr pnr samordningsnummer",
        ),
        _identifier("SG_NRIC_FIN", "[STFGM][0-9]{7}[A-Z]", checksums.nric, alone=1.0, end=_LETTER_END),
        _identifier("TR_NATIONAL_ID", "[1-9][0-9]{10}", checksums.tckn, "tc tckn kimlik"),
        _identifier("UK_NHS", f"[0-9]{{3}}{_S}[0-9]{{3}}{_S}[0-9]{{4}}", checksums.nhs, "nhs health patient"),
        _identifier(
            "UK_NINO",
            "(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z][0-9]{6}[A-D]",
            None,
            alone=0.6,
            named=0.6,
            end=_LETTER_END,
        ),
        _identifier(
            "US_ITIN", r"9[0-9]{2}[- ][0-9]{2}[- ][0-9]{4}", checksums.itin, "itin taxpayer tax individual", named=0.6
        ),
        _identifier("ZA_ID_NUMBER", "[0-9]{13}", checksums.south_africa, f"{_ID} za sa rsa african"),
    )
}

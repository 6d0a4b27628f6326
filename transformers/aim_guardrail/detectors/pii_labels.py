"""The labels of personal data. Pure data: a policy is read without loading what finds them.

A rule that names no entities means the seven of `PII_LABELS`; identity numbers of countries are looked for where a rule
asks for them by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from aim_guardrail.detectors.base import Label

# Scores are Presidio's: 1.0 where a checksum (or a public suffix) proved the value, else the pattern's own. Thresholds
# are ours, per label, because Presidio's single default (0.5) would silently drop every phone number (0.4 at most; 0.3
# for one in national form that nothing marks as such).
PII_LABELS: Mapping[str, Label] = {
    "CREDIT_CARD": Label(threshold=1.0, top_score=1.0),
    "CRYPTO": Label(threshold=1.0, top_score=1.0),
    "EMAIL_ADDRESS": Label(threshold=0.5, top_score=1.0),
    "IBAN_CODE": Label(threshold=0.5, top_score=1.0),
    "IP_ADDRESS": Label(threshold=0.5, top_score=0.6),
    "PHONE_NUMBER": Label(threshold=0.4, top_score=0.4),
    "US_SSN": Label(threshold=0.5, top_score=0.5),
}

_IDENTIFIERS = """
    AU_TFN BE_NATIONAL_NUMBER BR_CNPJ BR_CPF CA_SIN CH_AHV DE_ID_CARD DE_TAX_ID ES_NIE ES_NIF FI_PERSONAL_IDENTITY_CODE
    FR_NIR IN_AADHAAR IT_FISCAL_CODE KR_RRN NL_BSN PL_PESEL SE_PERSONNUMMER SG_NRIC_FIN TR_NATIONAL_ID UK_NHS
    ZA_ID_NUMBER
"""
_WITHOUT_CHECK_DIGIT = "IN_PAN PASSPORT UK_NINO US_ITIN"
IDENTIFIER_LABELS: Mapping[str, Label] = {
    **{label: Label(threshold=0.5, top_score=1.0) for label in _IDENTIFIERS.split()},
    **{label: Label(threshold=0.5, top_score=0.6) for label in _WITHOUT_CHECK_DIGIT.split()},
}

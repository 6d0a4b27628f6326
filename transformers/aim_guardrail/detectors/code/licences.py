"""Licence headers, copyright notices and marks of confidentiality.

Licences are told by SPDX identifiers (https://spdx.org/licenses) and by the sentences that their texts, or the headers
they ask for, begin with. The kinds are those that matter to who takes the code over: what must stay free as a whole
(copyleft), in its own files (weak copyleft), what asks for a notice only (permissive), what may not be used freely
(restricted: non-commercial, source-available).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from aim_guardrail.detectors.code.rule import CodeRule, Spot, phrase

_KINDS = {
    "LICENSE_RESTRICTED": r"BUSL|SSPL|Elastic|CC-BY-N[CD]|Commons-Clause|PolyForm|LicenseRef-(?:Propr|Comm)\w*",
    "LICENSE_WEAK_COPYLEFT": r"LGPL|MPL|EPL|CDDL|CPL|IPL|APSL|MS-RL|NPL|SPL|LPPL",
    "LICENSE_COPYLEFT": r"A?GPL|CC-BY-SA|EUPL|OSL|RPL|CECILL-[12]|QPL|Sleepycat|GFDL|NGPL",
    "LICENSE_PERMISSIVE": r"0?BSD|BSL-1|MIT|Apache|ISC|Zlib|Unlicense|CC0|CC-BY-[0-9]|PSF|Python|WTFPL|NCSA|X11|curl"
    r"|PostgreSQL|Artistic|AFL|ECL|MS-PL|UPL|BlueOak|FTL|HPND|Libpng|OpenSSL|Ruby|W3C|libtiff|Unicode|BSD",
}
_LABELS = {label: re.compile(rf"(?:{ids})(?![a-z])", re.ASCII) for label, ids in _KINDS.items()}
_IDENTIFIER_CHARS = 64
_EXPRESSION = re.compile(r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?([A-Za-z0-9.+() \t-]{1,200})")
_IDENTIFIER = re.compile(rf"[A-Za-z0-9.+-]{{2,{_IDENTIFIER_CHARS}}}")

# Between the words of a sentence that a comment wraps.
_G = r"[\s*\#/;!%\"'|-]{1,12}"
_LAW = rf"(?:the{_G})?"


def _words(text: str) -> str:
    """A sentence's words, whatever a comment puts between them, in any case."""
    return "(?i:" + _G.join(text.split()) + ")"


@dataclass(frozen=True, slots=True)
class _Spdx:
    """Every licence named by the expression behind `SPDX-License-Identifier:`."""

    id: str = "licence.spdx"
    heads: tuple[str, ...] = ("spdx-license-identifier",)
    ends: str = r"[A-Za-z0-9]-[0-9][.0-9]{0,4}\b|" + "|".join(
        rf"\b(?:{ids})" for ids in (_KINDS["LICENSE_PERMISSIVE"], "LGPL|LicenseRef|Commons|PolyForm|Sleepycat")
    )

    def spots(self, scan: str, head: int) -> Iterator[Spot]:
        expression = _EXPRESSION.match(scan, head + len(self.heads[0]))
        if expression is None:
            return
        for name in _IDENTIFIER.finditer(scan, *expression.span(1)):
            for label, known in _LABELS.items():
                if known.match(name[0]) and not name[0].endswith("-exception"):
                    yield Spot(*name.span(), label, 0.9)
                    break


_HEADER = rf"(?i:terms{_G}of|under|copy{_G}of){_G}(?i:the{_G})?"
_LICENSE = r"\blicen[cs]e"
LICENCE_RULES: tuple[CodeRule, ...] = (
    _Spdx(),
    phrase(
        "licence.gpl",
        "LICENSE_COPYLEFT",
        "terms under copy",
        _LICENSE,
        rf"{_HEADER}(?i:GNU{_G}(?:Affero{_G})?General{_G}Public{_G}(licen[cs]e))\b",
    ),
    phrase(
        "licence.weak-copyleft",
        "LICENSE_WEAK_COPYLEFT",
        "terms under copy",
        _LICENSE,
        rf"{_HEADER}(?i:(?:GNU{_G}(?:Lesser|Library){_G}General{_G}Public|Mozilla{_G}Public|Eclipse{_G}Public"
        rf"|Common{_G}Development{_G}and{_G}Distribution){_G}(licen[cs]e))\b",
    ),
    phrase(
        "licence.permissive",
        "LICENSE_PERMISSIVE",
        "licensed released distributed available",
        _LICENSE,
        rf"(?i:licensed|released|distributed|available){_G}(?i:under){_G}{_LAW}(?i:terms{_G}of{_G})?{_LAW}"
        rf"(?i:Apache|MIT|ISC|X11|zlib|Boost(?:{_G}Software)?|(?:(?:new|modified|simplified|[234]-clause){_G})?BSD){_G}"
        rf"(?i:(?:[234]-clause|style){_G})?((?i:licen[cs]e))\b",
    ),
    phrase(
        "licence.mit",
        "LICENSE_PERMISSIVE",
        "permission",
        r"\bcopy\b",
        _words("permission is hereby granted")
        + ","
        + f"?{_G}"
        + _words("free of charge")
        + f",?{_G}"
        + _words("to any person obtaining a")
        + _G
        + r"((?i:copy))\b",
    ),
    phrase(
        "licence.isc",
        "LICENSE_PERMISSIVE",
        "permission",
        r"\bgranted",
        _words("permission to use")
        + ","
        + _G
        + _words("copy, modify")
        + rf",?(?:{_G}(?i:and/or|and|publish,)){{0,2}}{_G}(?i:distribute|sell){_G}"
        + rf"(?i:[^.]{{0,160}}?)\b(?i:hereby){_G}((?i:granted))\b",
    ),
    phrase(
        "licence.bsd",
        "LICENSE_PERMISSIVE",
        "redistribution",
        r"\bpermitted",
        _words("redistribution and use in source and") + rf"{_G}[^.]{{0,120}}?\b(?i:are){_G}((?i:permitted))\b",
    ),
    phrase(
        "licence.unlicense",
        "LICENSE_PERMISSIVE",
        "free",
        r"\bdomain",
        _words("free and unencumbered software released into") + _G + _words("the public") + _G + r"((?i:domain))\b",
    ),
    phrase(
        "licence.boost",
        "LICENSE_PERMISSIVE",
        "boost",
        r"\b1\.0",
        _words("boost software license") + rf"{_G}(?i:version{_G})?(1\.0)\b",
    ),
    phrase(
        "licence.creative-commons",
        "LICENSE_COPYLEFT",
        "creative",
        r"\bshare-?alike",
        _words("creative commons attribution") + r"[\s-]{1,4}((?i:share-?alike))\b",
    ),
    phrase(
        "licence.non-commercial",
        "LICENSE_RESTRICTED",
        "creative",
        r"\bnon-?commercial",
        _words("creative commons attribution") + r"[\s-]{1,4}((?i:non-?commercial))\b",
    ),
    phrase(
        "licence.source-available",
        "LICENSE_RESTRICTED",
        "business server elastic",
        _LICENSE,
        rf"(?i:business{_G}source|server{_G}side{_G}public|elastic){_G}((?i:licen[cs]e))\b",
        0.6,
    ),
    phrase(
        "copyright.year",
        "COPYRIGHT_NOTICE",
        "copyright (c)",
        r"\b(?:19|20)[0-9][0-9]",
        r"(?i:copyright|\(c\))(?:\s|\(c\)|\(C\)|:|(?i:copyright)){0,6}\b((?:19|20)[0-9]{2})\b",
    ),
    phrase(
        "copyright.reserved", "COPYRIGHT_NOTICE", "all", r"\breserved", rf"(?i:all){_G}(?i:rights){_G}((?i:reserved))\b"
    ),
    phrase(
        "confidential.marked",
        "CONFIDENTIAL",
        "strictly highly company proprietary privileged commercial",
        r"\bconfidential",
        rf"(?i:strictly|highly|company|(?:proprietary|privileged|commercial)(?:{_G}and|{_G}in)?)"
        rf"(?:{_G}|[\s&,/]{{1,4}})((?i:confidential))\b",
        0.6,
    ),
    phrase(
        "confidential.and",
        "CONFIDENTIAL",
        "confidential",
        r"\b(?:proprietary|privileged)",
        rf"(?i:confidential)(?:{_G}(?i:and|or){_G}|[\s&,/]{{1,4}})(?i:legally{_G})?((?i:proprietary|privileged))\b",
    ),
    phrase(
        "confidential.header",
        "CONFIDENTIAL",
        "confidential",
        r"\bconfidential",
        r"(?<![A-Za-z ].)(CONFIDENTIAL)(?![A-Za-z0-9_-])",
        0.6,
    ),
    phrase(
        "confidential.distribution",
        "CONFIDENTIAL",
        "do not",
        r"\b(?:re)?(?:distribut|disclos|circulat)",
        rf"(?i:do{_G}not{_G}(?:copy{_G}(?:or{_G})?)?)((?i:(?:re)?distribute|disclose|circulate))\b"
        rf"|(?i:not{_G}for{_G}(?:public{_G}|external{_G}|general{_G})?)((?i:(?:re)?distribution|disclosure|circulation))\b",
        0.6,
    ),
    phrase(
        "confidential.internal", "CONFIDENTIAL", "internal", r"\bonly", rf"(?i:internal{_G}use{_G})((?i:only))\b", 0.3
    ),
    phrase(
        "confidential.trade-secret",
        "CONFIDENTIAL",
        "contains constitutes includes contain",
        r"\bsecrets?",
        rf"(?i:contains?|constitutes|includes)\b[^.\n]{{0,80}}?\b(?i:trade){_G}((?i:secrets?))\b",
        0.6,
    ),
    phrase(
        "confidential.unauthorized",
        "CONFIDENTIAL",
        "unauthorized unauthorised",
        r"\b(?:prohibited|forbidden)",
        rf"(?i:unauthori[sz]ed){_G}(?i:copying|reproduction|use|distribution|disclosure|duplication)\b"
        rf"[^.]{{0,200}}?\b((?i:prohibited|forbidden))\b",
    ),
)

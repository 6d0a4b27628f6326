"""Words that tell what a number behind them is. Text was folded to ASCII before: accents are gone (`móvil`: movil)."""

from __future__ import annotations

import re

_REACH_CHARS = 48
_WORD = re.compile(r"[a-z]+")
_PLACEHOLDER = re.compile(r"(?:<|\A)[A-Z_]+_[0-9]+>")  # of ours: what was hidden says nothing of what follows

_CARD = """
    card cards cardnumber creditcard visa mastercard maestro amex american diners discover jcb unionpay uatp
    carte kreditkarte karte tarjeta cartao carta pan
"""
_PHONE = """
    phone phones telephone cellphone smartphone phonenumber mobilenumber tel fon telefon telefone telefono telefoon
    cell cellular celular cellulare mobile mobil mobilo mobiel movil portable handy rufnummer numero puhelin tlf gsm
    fax call called calling ring dial sms whatsapp hotline contact reach anruf anrufen appeler llamar ligue
"""
_VERSION = """
    version versions ver release revision build section sections sec chapter appendix clause figure fig table annex
    article paragraph rule rfc libc standards bump bumps bumped update updates updated upgrade upgraded patch deps
    new changes requires
"""
_ADDRESS = """
    ip ips ipv addr address addresses host hosts server client node remote peer gateway dns ssh ping curl http https
    tcp udp subnet cidr inet login logged bind listen proxy nameserver forwarded user root
"""
_IDENTIFIER = """
    issn isbn orcid doi sku lot serial imei asin upc ean
"""
CARD_WORDS = frozenset(_CARD.split())
PHONE_WORDS = frozenset(_PHONE.split())
VERSION_WORDS = frozenset(_VERSION.split())
IDENTIFIER_WORDS = frozenset(_IDENTIFIER.split())
ADDRESS_WORDS = frozenset(_ADDRESS.split())


def words_before(scan: str, start: int, reach_chars: int = _REACH_CHARS) -> list[str]:
    """The words, in lower case, that stand shortly before `start`; the first may be the end of one."""
    before = scan[max(start - reach_chars, 0) : start]
    return _WORD.findall((_PLACEHOLDER.sub("<", before) if ">" in before else before).lower())


def named(words: frozenset[str], scan: str, start: int) -> bool:
    """Whether one of `words` stands shortly before `start`."""
    return not words.isdisjoint(words_before(scan, start))

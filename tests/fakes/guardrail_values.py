"""Made-up values of every kind the guardrail knows, valid to the checksum, from a `random.Random`.

Nothing here is real. Secrets are put together from parts at run time, so that no scanner of repositories takes this
file for a leak.
"""

from __future__ import annotations

import base64
import hashlib
import json
import string
import zlib
from collections.abc import Callable
from random import Random

DIGITS = string.digits
HEX = "0123456789abcdef"
ALNUM = string.ascii_letters + DIGITS


def chars(random: Random, count: int, alphabet: str = ALNUM) -> str:
    """Random characters with at least one digit (an all-letter token is nothing a rule would call a secret)."""
    picked = [random.choice(alphabet) for _ in range(count)]
    if any(char in DIGITS for char in alphabet) and not any(char in DIGITS for char in picked):
        picked[random.randrange(count)] = random.choice([char for char in alphabet if char in DIGITS])
    return "".join(picked)


# --- personal data -------------------------------------------------------------------------------------------------

CARD_BRANDS = {
    "visa": (["4"], 16),
    "visa-19": (["4"], 19),
    "mastercard": (["51", "52", "53", "54", "55"], 16),
    "mastercard-2": (["2221", "2300", "2720"], 16),
    "amex": (["34", "37"], 15),
    "discover": (["6011", "65"], 16),
    "jcb": (["3528", "3589"], 16),
    "diners": (["36", "38"], 14),
    "unionpay-18": (["62"], 18),
    "maestro-19": (["6759"], 19),
    "maestro-12": (["5018", "6304", "6759", "6763"], 12),
    "jcb-15": (["2131", "1800"], 15),
    "mir": (["2200", "2204"], 16),
}


def luhn_digit(digits: str) -> str:
    total = 0
    for position, char in enumerate(reversed(digits)):
        double = int(char) * (2 if position % 2 == 0 else 1)
        total += double - 9 if double > 9 else double
    return str(-total % 10)


def card(random: Random, brand: str | None = None) -> str:
    prefixes, length = CARD_BRANDS[brand or random.choice(sorted(CARD_BRANDS))]
    body = random.choice(prefixes)
    body += chars(random, length - len(body) - 1, DIGITS)
    number = body + luhn_digit(body)
    separator = random.choice(["", " ", "-"])
    if length in (14, 15):
        return separator.join([number[:4], number[4:10], number[10:]])
    return separator.join(number[i : i + 4] for i in range(0, length, 4))


IBAN_LENGTHS = {"DE": 22, "FR": 27, "GB": 22, "ES": 24, "IT": 27, "NL": 18, "BE": 16, "PL": 28, "NO": 15, "CH": 21}
_BBANS: dict[str, Callable[[Random], str]] = {
    "GB": lambda r: chars(r, 4, string.ascii_uppercase) + chars(r, 14, DIGITS),
    "NL": lambda r: chars(r, 4, string.ascii_uppercase) + chars(r, 10, DIGITS),
    "FR": lambda r: chars(r, 10, DIGITS) + chars(r, 11, string.ascii_uppercase + DIGITS) + chars(r, 2, DIGITS),
    "IT": lambda r: r.choice(string.ascii_uppercase) + chars(r, 10, DIGITS) + chars(r, 12, DIGITS),
    "CH": lambda r: chars(r, 5, DIGITS) + chars(r, 12, DIGITS),
}


def iban(random: Random, country: str | None = None) -> str:
    country = country or random.choice(sorted(IBAN_LENGTHS))
    bban = _BBANS.get(country, lambda r: chars(r, IBAN_LENGTHS[country] - 4, DIGITS))(random)
    as_number = "".join(str(int(char, 36)) for char in bban + country + "00")
    number = f"{country}{98 - int(as_number) % 97:02d}{bban}"
    assert len(number) == IBAN_LENGTHS[country]
    if random.random() < 0.5:
        return number
    return " ".join(number[i : i + 4] for i in range(0, len(number), 4))


def ssn(random: Random) -> str:
    area = random.choice([random.randint(1, 665), random.randint(667, 899)])
    separator = random.choice(["-", " ", "."])
    return f"{area:03d}{separator}{random.randint(11, 99):02d}{separator}{random.randint(1000, 9999)}"


def email(random: Random) -> str:
    local = random.choice(["jane.doe", "o'brien", "x_y+news", "info", "a"]) + chars(random, 2, DIGITS)
    return f"{local}@{random.choice(['example.com', 'mail.example.co.uk', 'uni-bonn.de', 'a-b.org'])}"


def phone(random: Random) -> str:
    four = random.randint(1000, 9999)
    return random.choice(
        [
            f"+1 415-{random.randint(200, 999)}-{four}",
            f"(212) {random.randint(200, 999)}-{four}",
            f"+44 20 7946 {four}",
            f"+49 (30) 9018{four}",
            f"+33 1 42 68 {random.randint(10, 99)} {random.randint(10, 99)}",
            f"+91 98{random.randint(100, 999)} {random.randint(10000, 99999)}",
            f"+55 11 9{random.randint(1000, 9999)}-{four}",
            f"(11) 9{random.randint(1000, 9999)}-{four}",
            f"0171 {random.randint(200, 999)}{four}",
        ]
    )


def ip(random: Random) -> str:
    groups = [f"{random.randint(1, 0xFFFF):x}" for _ in range(8)]
    return random.choice(
        [
            ".".join(str(random.randint(1, 254)) for _ in range(4)),
            ":".join(groups),
            f"2001:db8::{random.randint(1, 0x9FFF):x}:{random.randint(1, 99)}",
            f"fe80::{random.randint(1, 99)}",
        ]
    )


_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def bitcoin(random: Random) -> str:
    payload = b"\x00" + random.randbytes(20)
    raw = payload + hashlib.sha256(hashlib.sha256(payload).digest()).digest()[:4]
    number, out = int.from_bytes(raw, "big"), ""
    while number:
        number, rest = divmod(number, 58)
        out = _BASE58[rest] + out
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + out


PII: dict[str, Callable[[Random], str]] = {
    "CREDIT_CARD": card,
    "CRYPTO": bitcoin,
    "EMAIL_ADDRESS": email,
    "IBAN_CODE": iban,
    "IP_ADDRESS": ip,
    "PHONE_NUMBER": phone,
    "US_SSN": ssn,
}

# --- identity numbers: (a word that names it, the number), made from the formulas by trial --------------------------


def _tried(random: Random, make: Callable[[Random], str], check: Callable[[str], bool]) -> str:
    while not check(value := make(random)):
        pass
    return value


def _date(random: Random) -> str:
    return f"{random.randint(0, 99):02d}{random.randint(1, 12):02d}{random.randint(1, 28):02d}"


def _grouped(number: str, sizes: tuple[int, ...], separators: str) -> str:
    """`_grouped("123456789", (3, 3, 3), "-. ")`: one of the separators, or none, between the groups."""
    parts, at = [], 0
    for size in sizes:
        parts.append(number[at : at + size])
        at += size
    return parts[0] + "".join(
        (separators[index] if len(separators) > 1 else separators) + part for index, part in enumerate(parts[1:])
    )


def _codice_fiscale(random: Random) -> str:
    odd = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
    body = "RSSMRA" + chars(random, 2, DIGITS) + random.choice("ABCDEHLMPRST") + f"{random.randint(1, 31):02d}"
    body += random.choice("ABCDEFGHIL") + chars(random, 3, DIGITS)
    values = [int(char) if char.isdigit() else ord(char) - 65 for char in body]
    return body + chr(65 + (sum(odd[v] for v in values[::2]) + sum(values[1::2])) % 26)


def _nir(random: Random) -> str:
    month, rest = f"{random.randint(1, 12):02d}", chars(random, 6, DIGITS)
    body = f"{random.choice('12')}{random.randint(10, 99)}{month}{random.randint(1, 95):02d}{rest}"
    number = f"{body}{97 - int(body) % 97:02d}"
    return random.choice([number, _grouped(number, (1, 2, 2, 2, 3, 3, 2), " ")])


def _cpf(random: Random) -> str:
    digits = [int(char) for char in chars(random, 9, DIGITS)]
    for first in (10, 11):
        rest = sum(digit * (first - at) for at, digit in enumerate(digits)) * 10 % 11 % 10
        digits.append(rest)
    number = "".join(map(str, digits))
    return f"{number[:3]}.{number[3:6]}.{number[6:9]}-{number[9:]}"


def _dni(random: Random) -> str:
    number = random.randint(10**7, 10**8 - 1)
    return f"{number}{random.choice(['', '-'])}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def _nie(random: Random) -> str:
    first, number = random.randint(0, 2), random.randint(10**6, 10**7 - 1)
    return f"{'XYZ'[first]}{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[(first * 10**7 + number) % 23]}"


def _bsn(random: Random) -> str:
    def check(number: str) -> bool:
        return sum(int(d) * w for d, w in zip(number, (9, 8, 7, 6, 5, 4, 3, 2, -1), strict=True)) % 11 == 0

    return _tried(random, lambda r: chars(r, 9, DIGITS), check)


def _pesel(random: Random) -> str:
    body = _date(random) + chars(random, 4, DIGITS)
    return body + str(-sum(int(d) * w for d, w in zip(body, (1, 3, 7, 9) * 3, strict=False)) % 10)


def _nhs(random: Random) -> str:
    def check(number: str) -> bool:
        return sum(int(d) * w for d, w in zip(number, range(10, 0, -1), strict=True)) % 11 == 0

    return _grouped(_tried(random, lambda r: chars(r, 10, DIGITS), check), (3, 3, 4), random.choice(["", " ", "-"]))


def _personnummer(random: Random) -> str:
    body = _date(random) + chars(random, 3, DIGITS)
    return f"{body[:6]}-{body[6:]}{luhn_digit(body)}"


def _hetu(random: Random) -> str:
    date, number = (
        f"{random.randint(1, 28):02d}{random.randint(1, 12):02d}{random.randint(10, 99)}",
        chars(random, 3, DIGITS),
    )
    return f"{date}{random.choice('-A')}{number}{'0123456789ABCDEFHJKLMNPRSTUVWXY'[int(date + number) % 31]}"


def _rijksregister(random: Random) -> str:
    body = _date(random) + chars(random, 3, DIGITS)
    check = f"{97 - int(body) % 97:02d}"
    return f"{body[:2]}.{body[2:4]}.{body[4:6]}-{body[6:]}.{check}"


def _ahv(random: Random) -> str:
    body = "756" + chars(random, 9, DIGITS)
    check = str(-sum(int(d) * w for d, w in zip(body, (1, 3) * 6, strict=True)) % 10)
    return f"756.{body[3:7]}.{body[7:11]}.{body[11]}{check}"


def _sin(random: Random) -> str:
    body = random.choice("1234567") + chars(random, 7, DIGITS)
    return _grouped(body + luhn_digit(body), (3, 3, 3), random.choice(["", " ", "-"]))


IDENTIFIERS: dict[str, tuple[str, Callable[[Random], str]]] = {
    "BE_NATIONAL_NUMBER": ("rijksregisternummer", _rijksregister),
    "BR_CPF": ("CPF", _cpf),
    "CA_SIN": ("SIN", _sin),
    "CH_AHV": ("AHV", _ahv),
    "ES_NIE": ("NIE", _nie),
    "ES_NIF": ("NIF", _dni),
    "FI_PERSONAL_IDENTITY_CODE": ("hetu", _hetu),
    "FR_NIR": ("NIR", _nir),
    "IN_PAN": ("PAN", lambda r: "ABC" + "P" + "K" + chars(r, 4, DIGITS) + r.choice(string.ascii_uppercase)),
    "IT_FISCAL_CODE": ("codice fiscale", _codice_fiscale),
    "NL_BSN": ("BSN", _bsn),
    "PASSPORT": ("passport", lambda r: r.choice(["", "A", "AB"]) + chars(r, r.randint(7, 9), DIGITS)),
    "PL_PESEL": ("PESEL", _pesel),
    "SE_PERSONNUMMER": ("personnummer", _personnummer),
    "UK_NHS": ("NHS", _nhs),
    "UK_NINO": ("NINO", lambda r: "AB" + chars(r, 6, DIGITS) + r.choice("ABCD")),
    "US_ITIN": ("ITIN", lambda r: f"9{r.randint(10, 99)}-{r.randint(70, 88)}-{r.randint(1000, 9999)}"),
    "ZA_ID_NUMBER": ("ID", lambda r: (b := _date(r) + chars(r, 4, DIGITS) + "08") + luhn_digit(b)),
}

# --- secrets: (what stands before the value, the value, what stands after it) ---------------------------------------

_BASE62 = DIGITS + string.ascii_uppercase + string.ascii_lowercase


def github_pat(random: Random) -> str:
    body = chars(random, 30)
    checksum, tail = zlib.crc32(body.encode()), ""
    for _ in range(6):
        checksum, rest = divmod(checksum, 62)
        tail = _BASE62[rest] + tail
    return "gh" + "p_" + body + tail


def jwt(random: Random) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    head, body = part({"alg": "HS256", "typ": "JWT"}), part({"sub": chars(random, 12), "iat": 1700000000})
    return f"{head}.{body}.{chars(random, 43)}"


def private_key(random: Random, size_bytes: int | None = None, kind: str = "RSA ") -> str:
    body = base64.b64encode(random.randbytes(size_bytes or random.choice([48, 121, 300, 608]))).decode()
    lines = "\n".join(body[i : i + 64] for i in range(0, len(body), 64))
    return f"-----BEGIN {kind}PRIVATE" + f" KEY-----\n{lines}\n-----END {kind}PRIVATE KEY-----"


Secret = tuple[str, str, str]
SECRETS: dict[str, Callable[[Random], Secret]] = {
    "aws-id": lambda r: ("", "AK" + "IA" + chars(r, 16, string.ascii_uppercase + "234567"), ""),
    "aws-secret": lambda r: ('aws_secret_access_key = "', chars(r, 40, ALNUM + "+/"), '"'),
    "github": lambda r: ("", github_pat(r), ""),
    "slack": lambda r: ("", "xo" + f"xb-{chars(r, 12, DIGITS)}-{chars(r, 12, DIGITS)}-{chars(r, 24)}", ""),
    "stripe": lambda r: ("", "sk" + "_live_" + chars(r, 24), ""),
    "openai": lambda r: ("", "sk" + "-proj-" + chars(r, 74) + "T3Blbk" + "FJ" + chars(r, 74), ""),
    "gcp": lambda r: ("", "AI" + "za" + chars(r, 35), ""),
    "jwt": lambda r: ("", jwt(r), ""),
    "private-key": lambda r: ("", private_key(r), ""),
    "npm": lambda r: ("", "np" + "m_" + chars(r, 36), ""),
    "pypi": lambda r: ("", "py" + "pi-AgEIcHlwaS5vcmc" + chars(r, 90), ""),
    "password": lambda r: (r.choice(["password = '", "DB_PASSWORD=", '"password": "', "pwd: "]), chars(r, 14), ""),
    "postgres": lambda r: ("postgres://app:", chars(r, 16), "@db.internal:5432/app"),
    "bearer": lambda r: ("Authorization: Bearer ", chars(r, 32), ""),
    "gitlab": lambda r: ("", "gl" + "pat-" + chars(r, 20), ""),
    "huggingface": lambda r: ("", "h" + "f_" + chars(r, 34, string.ascii_letters), ""),
    "sendgrid": lambda r: ("", "S" + "G." + chars(r, 22) + "." + chars(r, 43), ""),
}

# --- what surrounds them -------------------------------------------------------------------------------------------

_PROSE = (
    "the quick brown fox jumps over a lazy dog, Then it rests (for a while); version 3.11 of 2024 costs 20 USD. "
    "See section 4.2 [note 7] and call range(10) or f(x) = x^2 - 1. Das Café “schließt” um 18:30 Uhr… 你好，世界。 "
    "naïve coöperation — 100 % of 1,234.56 items; C4, S3 and EKS; {key: value} <tag> `code` a/b path/to/file.py"
)
WORDS = _PROSE.split()

TEMPLATES = (
    "{0}",
    '{{"id": 7, "value": "{0}", "next": null}}',
    '{{"a":1,"value":"{0}","b":[2,3]}}',
    "| name | {0} | 42 |",
    "|{0}|",
    "x = '{0}'  # set it",
    'print("{0}")',
    "- item: {0}\n- other",
    "({0})",
    "`{0}`",
    "{0}.",
    "{0}, and",
    "价格{0}谢谢",
    "<b>{0}</b>",
    "```\nvalue={0}\n```",
)


def document(random: Random, planted: list[str]) -> str:
    """The values among prose, JSON, tables and code; separated from it as values usually are."""
    pieces = []
    for value in planted:
        pieces.append(" ".join(random.choice(WORDS) for _ in range(random.randint(0, 12))))
        template = random.choice(TEMPLATES)
        pieces.append(template.replace("{{", "{").replace("}}", "}").replace("{0}", value))
    pieces.append(" ".join(random.choice(WORDS) for _ in range(random.randint(0, 6))))
    return random.choice([" ", "\n", "\n\n", "; "]).join(pieces)


def splits(random: Random, text: str) -> list[str]:
    """The text in random pieces: characters, tokens or chunks."""
    mean = random.choice([1, 4, 4, 12, 60, len(text) or 1])
    pieces, at = [], 0
    while at < len(text):
        size = max(1, round(random.expovariate(1 / mean)))
        pieces.append(text[at : at + size])
        at += size
    return pieces

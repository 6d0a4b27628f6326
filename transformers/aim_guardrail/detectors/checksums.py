"""The check digits of countries' identity and tax numbers: whether a number could have been given out. Pure.

Each takes the number without its separators, in upper case, of the right length. Sources: the issuing authorities'
published formulas, as collected by the OECD (tax identification numbers) and by ICAO 9303 (travel documents); the tests
hold them against Presidio's where it knows the number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle

_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
_HETU_LETTERS = "0123456789ABCDEFHJKLMNPRSTUVWXY"
_CODICE_ODD = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
_DOUBLED = bytes.maketrans(b"0123456789", b"0246813579")  # the digits of twice a digit, added up
_NRIC_LETTERS = {"S": "JZIHGFEDCBA", "T": "GFEDCBAJZIH", "F": "XWUTRQPNMLK", "G": "RQPNMLKXWUT"}
# Verhoeff's dihedral group D5, and his permutation of the digits, applied once a place.
_D5 = (
    *("0123456789", "1234067895", "2340178956", "3401289567", "4012395678"),
    *("5987604321", "6598710432", "7659821043", "8765932104", "9876543210"),
)
_PERMUTATION = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def _digits(number: str) -> list[int]:
    return [int(char) for char in number]


def _weighted(number: str, weights: Sequence[int]) -> int:
    return sum(digit * weight for digit, weight in zip(_digits(number), weights, strict=False))


def luhn(number: str) -> bool:
    """ISO/IEC 7812-1."""
    chars = number.encode("ascii")
    return (sum(chars[-1::-2]) + sum(chars[-2::-2].translate(_DOUBLED)) - ord("0") * len(chars)) % 10 == 0


def verhoeff(number: str) -> bool:
    """Aadhaar."""
    check, order = 0, list(range(10))
    for digit in reversed(_digits(number)):
        check = int(_D5[check][order[digit]])
        order = [_PERMUTATION[at] for at in order]
    return check == 0


def mod_11_10(number: str) -> bool:
    """ISO 7064, as in German tax identification numbers; whose first ten digits hold one digit two or three times."""
    product = 10
    for digit in _digits(number[:-1]):
        product = ((digit + product) % 10 or 10) * 2 % 11
    counts = sorted(number[:-1].count(digit) for digit in set(number[:-1]))
    return (11 - product) % 10 == int(number[-1]) and counts[-1] in (2, 3) and sum(c > 1 for c in counts) == 1


def icao(number: str) -> bool:
    """Weights 7, 3, 1 (ICAO 9303); A is 10."""
    values = [int(char, 36) for char in number[:-1]]
    return sum(value * weight for value, weight in zip(values, cycle((7, 3, 1)), strict=False)) % 10 == int(number[-1])


def nhs(number: str) -> bool:
    """The United Kingdom's NHS numbers."""
    return (11 - _weighted(number[:-1], range(10, 1, -1))) % 11 == int(number[-1]) and len(set(number)) > 1


def nir(number: str) -> bool:
    """France's NIR with its key; Corsica's departments 2A and 2B count as 19 and 18."""
    plain = number[:13].replace("2A", "19").replace("2B", "18")
    return plain.isdigit() and 97 - int(plain) % 97 == int(number[13:])


def dni(number: str) -> bool:
    """Spain's DNI, and NIE, whose X, Y, Z are 0, 1, 2."""
    plain = number[:-1].translate(str.maketrans("XYZ", "012"))
    return _DNI_LETTERS[int(plain) % 23] == number[-1]


def codice_fiscale(number: str) -> bool:
    """Italy's codice fiscale."""
    values = [int(char, 36) - (10 if char.isalpha() else 0) for char in number]
    total = sum(_CODICE_ODD[value] for value in values[:15:2]) + sum(values[1:15:2])
    return chr(ord("A") + total % 26) == number[15]


def bsn(number: str) -> bool:
    """The Netherlands' BSN."""
    return _weighted(number, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0 and len(set(number)) > 1


def rijksregister(number: str) -> bool:
    """Belgium's national number; a 2 stands before it for those born since 2000."""
    return int(number[9:]) in (97 - int(number[:9]) % 97, 97 - int("2" + number[:9]) % 97)


def ean(number: str) -> bool:
    """GS1's check digit, as in Switzerland's AHV numbers."""
    return _weighted(number, (1, 3) * 7) % 10 == 0


def pesel(number: str) -> bool:
    """Poland's PESEL; the month tells the century."""
    month, day = int(number[2:4]) % 20, int(number[4:6])
    return 1 <= month <= 12 and 1 <= day <= 31 and _weighted(number, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)) % 10 == 0


def personnummer(number: str) -> bool:
    """Sweden's personnummer, with the century and a + or without; coordination numbers add 60 to the day."""
    short = number.replace("+", "")[-10:]
    return 1 <= int(short[2:4]) <= 12 and 1 <= int(short[4:6]) % 60 <= 31 and luhn(short)


def hetu(number: str) -> bool:
    """Finland's personal identity code, with its sign of the century or without."""
    return _HETU_LETTERS[int(number[:6] + number[-4:-1]) % 31] == number[-1]


def cpf(number: str) -> bool:
    """Brazil's CPF: two digits modulo 11."""
    ends = (_mod_11(number[:size], range(size + 1, 1, -1)) == int(number[size]) for size in (9, 10))
    return all(ends) and len(set(number)) > 1


def cnpj(number: str) -> bool:
    """Brazil's CNPJ."""
    weights = (6, 5, 4, 3, 2, 9, 8, 7, 6, 5, 4, 3, 2)
    ends = (_mod_11(number[:size], weights[13 - size :]) == int(number[size]) for size in (12, 13))
    return all(ends) and len(set(number)) > 1


def _mod_11(number: str, weights: Sequence[int]) -> int:
    return -_weighted(number, weights) % 11 % 10 if _weighted(number, weights) % 11 > 1 else 0


def tfn(number: str) -> bool:
    """Australia's tax file number."""
    return _weighted(number, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0 and len(set(number)) > 1


def nric(number: str) -> bool:
    """Singapore's NRIC and FIN; those that begin with an M are not checked."""
    letters = _NRIC_LETTERS.get(number[0])
    total = _weighted(number[1:8], (2, 7, 6, 5, 4, 3, 2))
    return letters is None or letters[total % 11] == number[8]


def rrn(number: str) -> bool:
    """South Korea's resident registration number, as given out until October 2020."""
    date = 1 <= int(number[2:4]) <= 12 and 1 <= int(number[4:6]) <= 31
    return date and (11 - _weighted(number, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)) % 11) % 10 == int(number[12])


def tckn(number: str) -> bool:
    """Turkey's identity number."""
    digits = _digits(number)
    tenth = (7 * sum(digits[0:9:2]) - sum(digits[1:8:2])) % 10
    return tenth == digits[9] and sum(digits[:10]) % 10 == digits[10]


def south_africa(number: str) -> bool:
    """South Africa's identity number: a date of birth, and Luhn."""
    return 1 <= int(number[2:4]) <= 12 and 1 <= int(number[4:6]) <= 31 and luhn(number)


_NEVER_AN_ITIN = re.compile(r"9..(?:[0-4]|6[6-9]|89|93)")


def itin(number: str) -> bool:
    """The United States' ITIN: which groups are given out; it has no check digit."""
    return not _NEVER_AN_ITIN.match(number)

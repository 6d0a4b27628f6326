"""Identity numbers of countries, and patterns of the user's own: what is found, what is refused, streamed as whole."""

import time
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guardrail_values as made
from aim_guardrail.detectors import checksums
from aim_guardrail.detectors.base import Finding
from aim_guardrail.detectors.identifiers import IDENTIFIERS
from aim_guardrail.detectors.pii import PiiDetector
from aim_guardrail.detectors.pii_labels import IDENTIFIER_LABELS, PII_LABELS
from aim_guardrail.detectors.pii_options import CustomPattern, PiiOptions
from aim_guardrail.pipeline import Guard, Session
from aim_guardrail.policy import PolicyError, Rule, parse_policy
from aim_guardrail.streams.held import StreamGuard
from aim_guardrail.text import Text

SEEDS = range(8)

# Published examples of each: of the authorities' own pages, or of the libraries that check them.
PUBLISHED = {
    "AU_TFN": ("TFN", "123 456 782"),
    "BE_NATIONAL_NUMBER": ("rijksregisternummer", "85.07.30-033.28"),
    "BR_CNPJ": ("CNPJ", "11.222.333/0001-81"),
    "BR_CPF": ("CPF", "529.982.247-25"),
    "CA_SIN": ("SIN", "130 692 544"),
    "CH_AHV": ("AHV", "756.9217.0769.85"),
    "DE_ID_CARD": ("Personalausweis", "T220001293"),
    "DE_TAX_ID": ("Steuer-IdNr.", "86 095 742 719"),
    "ES_NIE": ("NIE", "X1234567L"),
    "ES_NIF": ("NIF", "12345678Z"),
    "FI_PERSONAL_IDENTITY_CODE": ("hetu", "131052-308T"),
    "FR_NIR": ("NIR", "2 95 10 99 126 111 93"),
    "IN_AADHAAR": ("Aadhaar", "2341 2341 2346"),
    "IN_PAN": ("PAN", "AAAPL1234C"),
    "IT_FISCAL_CODE": ("codice fiscale", "RCCMNL83S18D969H"),
    "KR_RRN": ("RRN", "880123-1234564"),
    "NL_BSN": ("BSN", "111222333"),
    "PASSPORT": ("passport", "C01X00T47"),
    "PL_PESEL": ("PESEL", "44051401359"),
    "SE_PERSONNUMMER": ("personnummer", "811228-9874"),
    "SG_NRIC_FIN": ("NRIC", "S0000001I"),
    "TR_NATIONAL_ID": ("TC kimlik", "17291716060"),
    "UK_NHS": ("NHS", "943 476 5870"),
    "UK_NINO": ("NINO", "AA123456B"),
    "US_ITIN": ("ITIN", "911-70-1234"),
    "ZA_ID_NUMBER": ("ID", "7503305044089"),
}


@cache
def detector() -> PiiDetector:
    return PiiDetector(frozenset({*PII_LABELS, *IDENTIFIER_LABELS}))


def counted(text: str) -> list[tuple[str, str]]:
    """What reaches its label's threshold."""
    labels = {**PII_LABELS, **IDENTIFIER_LABELS}
    assert detector().may_find(Text(text).scan) or not detector().scan(Text(text)), text
    found: list[Finding] = detector().scan(Text(text))
    return [(f.label, text[f.start : f.end]) for f in found if f.score >= labels[f.label].threshold]


def test_every_label_has_its_search_and_its_top_score():
    assert IDENTIFIERS.keys() == IDENTIFIER_LABELS.keys() == PUBLISHED.keys()
    for label, identifier in IDENTIFIERS.items():
        assert max(identifier.alone, identifier.named) == IDENTIFIER_LABELS[label].top_score, label


@pytest.mark.parametrize("label", sorted(PUBLISHED))
@pytest.mark.parametrize(
    "template", ["{0}: {1}", "my {0} is {1}, ok", '{{"{0}": "{1}"}}', "{0} ({1}).", "{0} 号码 {1}谢谢"]
)
def test_finds_published_examples_behind_their_names(label: str, template: str):
    name, number = PUBLISHED[label]
    text = template.replace("{{", "{").replace("}}", "}").replace("{0}", name).replace("{1}", number)
    assert (label, number) in counted(text), text


@pytest.mark.parametrize("label", sorted(made.IDENTIFIERS))
def test_finds_made_numbers_behind_their_names(label: str):
    name, make = made.IDENTIFIERS[label]
    for seed in SEEDS:
        number = make(Random(seed))
        assert (label, number) in counted(f"the {name} {number} it is"), number


@pytest.mark.parametrize(
    "label", sorted(label for label, each in IDENTIFIERS.items() if each.check not in (None, checksums.itin))
)
def test_a_wrong_check_digit_is_none(label: str):
    name, number = PUBLISHED[label]
    wrong = 0
    for digit in "0123456789":
        at = next(i for i in reversed(range(len(number) - 2)) if number[i].isdigit())
        if digit != number[at]:
            changed = number[:at] + digit + number[at + 1 :]
            wrong += (label, changed) not in counted(f"{name}: {changed}")
    assert wrong >= 8, label  # modulo 10 and 11 let one of ten through now and then


def test_numbers_alone_count_only_where_their_form_is_their_own():
    alone = {label for label, (_, number) in PUBLISHED.items() if (label, number) in counted(f"it is {number}, ok")}
    sure = {label for label, each in IDENTIFIERS.items() if each.alone >= 0.5}
    assert alone == sure
    assert {"FR_NIR", "IT_FISCAL_CODE", "ES_NIF", "BR_CNPJ"} <= sure
    assert not {"NL_BSN", "PL_PESEL", "UK_NHS", "PASSPORT", "DE_TAX_ID"} & sure


def test_checksums_agree_with_presidio():
    from presidio_analyzer.predefined_recognizers import (
        DeTaxIdRecognizer,
        EsNieRecognizer,
        EsNifRecognizer,
        FiPersonalIdentityCodeRecognizer,
        InAadhaarRecognizer,
        ItFiscalCodeRecognizer,
        NhsRecognizer,
        PlPeselRecognizer,
        SgFinRecognizer,
    )

    random = Random(11)
    pairs = [
        (checksums.nhs, NhsRecognizer(), 10, made.DIGITS),
        (checksums.verhoeff, InAadhaarRecognizer(), 12, made.DIGITS),
    ]
    for ours, theirs, size, alphabet in pairs:
        for _ in range(3000):
            number = random.choice("23456789") + made.chars(random, size - 1, alphabet)
            assert ours(number) == bool(theirs.validate_result(number)), number
    for _ in range(20_000):
        number = random.choice("123456789") + made.chars(random, 10, made.DIGITS)
        if checksums.mod_11_10(number):  # Presidio lets more than one digit repeat
            assert DeTaxIdRecognizer().validate_result(number), number
    for make, theirs in (
        (made._dni, EsNifRecognizer()),
        (made._nie, EsNieRecognizer()),
        (made._hetu, FiPersonalIdentityCodeRecognizer()),
        (made._codice_fiscale, ItFiscalCodeRecognizer()),
        (made._pesel, PlPeselRecognizer()),
    ):
        for seed in SEEDS:
            assert theirs.validate_result(make(Random(seed))), make
    assert SgFinRecognizer().validate_result(PUBLISHED["SG_NRIC_FIN"][1]) in (True, None)


def test_a_rule_without_entities_means_the_seven():
    assert Rule(type="pii", action="redact").labels == set(PII_LABELS)
    assert Rule(type="pii", action={"default": "redact", "UK_NINO": "block"}).labels == {*PII_LABELS, "UK_NINO"}
    assert Rule(type="pii", action={"UK_NINO": "block"}).labels == {"UK_NINO"}
    assert Rule(type="pii", action="redact", entities=("PASSPORT",)).labels == {"PASSPORT"}
    assert Rule(type="pii", action="redact", threshold=0.4).labels == set(PII_LABELS)  # reachable by each of them


# --- patterns of one's own -----------------------------------------------------------------------------------------

OWN = """
version: 2
name: own
prompt: &rules
  - type: pii
    action: redact
    options:
      custom:
        - {label: EMPLOYEE_ID, pattern: '\\bE-[0-9]{6}\\b'}
        - {label: PROJECT, pattern: '(?i)project-[a-z]+', context: [secret, geheim], score: 0.4}
        - {label: ANY_X, pattern: 'x.*y'}
answer: *rules
"""


@cache
def guard() -> Guard:
    return Guard.load(parse_policy(OWN, "own.yaml"))


def redacted(text: str) -> str:
    return guard().check("answer", text, Session()).text


def test_finds_what_a_pattern_says_and_the_usual_entities():
    assert redacted("E-123456 and bob@example.com") == "<EMPLOYEE_ID_1> and <EMAIL_ADDRESS_1>"
    assert redacted("(E-123456), XE-123456") == "(<EMPLOYEE_ID_1>), XE-123456"
    assert redacted("the secret Project-Apollo") == "the secret <PROJECT_1>"
    assert redacted("the open Project-Apollo") == "the open Project-Apollo"
    assert redacted("a x1y2y b x y") == "a <ANY_X_1>2y b x y".replace("2y", "")


def rule(custom: str) -> str:
    return f"version: 2\nname: t\nprompt:\n  - {{type: pii, action: redact, options: {{custom: [{custom}]}}}}\n"


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        ("{label: A, pattern: '(a+)+\\1'}", "RE2 refuses it"),
        ("{label: A, pattern: '(?=a)b'}", "RE2 refuses it"),
        ("{label: A, pattern: '(?<!a)b'}", "RE2 refuses it"),
        ("{label: A, pattern: 'a{1001}'}", "RE2 refuses it"),
        ("{label: A, pattern: '((((a{100}){100}){100}){100})'}", "RE2 refuses it"),
        ("{label: A, pattern: '('}", "RE2 refuses it"),
        ("{label: A, pattern: 'a*'}", "matches the empty text"),
        ("{label: A, pattern: '^a'}", r"use \\b in place of"),
        ("{label: A, pattern: 'a b'}", "one run of text, without spaces"),
        ("{label: A, pattern: 'a\\sb'}", "one run of text, without spaces"),
        ("{label: A, pattern: 'é'}", "in ASCII"),
        ("{label: a, pattern: b}", "custom.0.label"),
        ("{label: PASSPORT, pattern: b}", "a label of ours"),
        ("{label: A, pattern: b}, {label: A, pattern: c}", "given twice"),
        ("{label: A, pattern: b, context: [two words]}", "no single word"),
        ("{label: A, pattern: b, score: 2}", "less than or equal to 1"),
        ("{label: A, pattern: b, scor: 1}", "did you mean 'score'"),
        ("{label: A, pattern: " + "b" * 501 + "}", "at most 500"),
        (", ".join(f"{{label: A{i}, pattern: b}}" for i in range(33)), "at most 32"),
    ],
)
def test_patterns_that_cannot_be_used_are_refused_with_the_reason(custom: str, message: str):
    with pytest.raises(PolicyError, match=message) as refusal:
        parse_policy(rule(custom), "t.yaml")
    assert "\n" not in str(refusal.value)
    assert "options" in str(refusal.value)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*c", "(a*)*b", "(.*a){20}z", "a.*a.*a.*a.*z", "(x+x+)+y"])
@pytest.mark.parametrize("letter", ["a", "x", "aaaa ", "xa,"])
def test_no_pattern_takes_long(pattern: str, letter: str):
    options = PiiOptions(custom=(CustomPattern(label="A", pattern=pattern),))
    own = PiiDetector(frozenset({"A"}), None, options)

    def cpu_s(chars: int) -> float:
        text, best = Text((letter * chars)[:chars]), float("inf")
        for _ in range(3):
            start = time.process_time()
            own.scan(text)
            best = min(best, time.process_time() - start)
        return best

    whole = cpu_s(40_000)  # Python's own re would take longer than the universe lasts
    assert whole < 2
    if whole > 0.01:
        assert whole < 10 * cpu_s(10_000)


ATOMS = [
    "E-123456",
    "E-",
    "1",
    "23456",
    " ",
    "secret ",
    "Project-",
    "apollo",
    "x",
    "y",
    ", ",
    "(",
    '"',
    ".",
    "passport ",
]
ATOMS += [number for _, number in PUBLISHED.values()] + [f"{name} " for name, _ in PUBLISHED.values()]


@cache
def everything() -> Guard:
    entities = ", ".join([*PII_LABELS, *IDENTIFIER_LABELS])
    return Guard.load(
        parse_policy(
            OWN.replace("    options:", f"    entities: [{entities}, EMPLOYEE_ID, PROJECT, ANY_X]\n    options:"), "t"
        )
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), max_size=12), st.integers(0, 1 << 30))
def test_a_stream_comes_out_as_the_whole_text_does(atoms: list[str], seed: int):
    random, text = Random(seed), "".join(atoms)
    whole = everything().check("answer", text, Session())
    for pieces in (list(text), made.splits(random, text)):
        stream = StreamGuard(everything(), Session())
        released = "".join(stream.push(piece).text for piece in pieces) + (last := stream.finish()).text
        assert (released, last.verdict) == (whole.text, whole.verdict)

"""Folding maps back to the original; units and cuts are where no value is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_guardrail.text import BREAK_CHARS, PRIVATE_KEY, Text, holds_private_key, run_end, safe_cut, units

KEY_HEADER = "-----BEGIN PRIVATE KEY-----"
ANY_TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("1２٣½①é\u200b\u0301你“—x ")), max_size=60)


@pytest.mark.parametrize(
    ("original", "scan"),
    [
        ("plain ASCII, untouched", "plain ASCII, untouched"),
        ("４１１１", "4111"),
        ("٤١١١", "4111"),
        ("4\u200b1\u00ad1\u202e1", "4111"),
        ("é ﬁ ß ø Ж", "e fi x x x"),
        ("“a”–‘b’", "\"a\"-'b'"),
        ("a—b―c…d", "a b c...d"),
        ("+49\u00a030\u2011901", "+49 30-901"),
        ("卡a。", "\na\n"),
        ("①½⑴", "1121"),
        ("a\0b", "ab"),
        ("\ud83d", "\n"),
        (r"a\nb\"c\/d\te", 'a\nb"c/d\te'),
        (r"\\\nb", "\nb"),
        (r"\u003ca\u0040b\\u003E", "<a@b>"),
        (r"\u005c\u005cn \u00e9 \uff14 \u200b\ufb01", "\n e 4 fi"),
        ("\\d \\u12 \\ud83d\\", "\\d \\u12 \n\\"),
        ("é\\\u200bn", "e\n"),
    ],
)
def test_folds_look_alikes_to_ascii(original: str, scan: str):
    assert Text(original).scan == scan


def test_ascii_is_its_own_folded_form():
    original = "no work is done for ASCII" * 10
    assert Text(original).scan is original


@given(ANY_TEXT)
def test_folded_text_is_ascii_and_maps_back_monotonically(original: str):
    text = Text(original)
    assert text.scan.isascii()
    origins = [text.origin(i) for i in range(len(text.scan) + 1)]
    assert origins == sorted(origins)
    assert origins[-1] == len(original)


@given(ANY_TEXT.map(lambda text: text.replace("\\", "")), ANY_TEXT)
def test_folding_does_not_depend_on_where_a_stream_is_cut(left: str, right: str):
    assert Text(left + right).scan == Text(left).scan + Text(right).scan


@given(ANY_TEXT)
def test_no_unit_ends_within_a_character(original: str):
    text = Text(original)
    for start, end in units(text.scan):
        first, last = text.span(start, end)
        assert Text(original[first:last]).scan == text.scan[start:end]


def test_spans_cover_removed_characters():
    text = Text("card 4\u200b1\u200b1\u0301 end")
    assert text.original[slice(*text.span(5, 8))] == "4\u200b1\u200b1\u0301"


def test_spans_cover_whole_escapes():
    text = Text(r"key:\u0034\u200b\ufb01\nx")
    assert text.scan == "key:4fi\nx"
    assert text.original[slice(*text.span(4, 6))] == r"\u0034\u200b\ufb01"
    assert text.original[slice(*text.span(8, 9))] == "x"


@pytest.mark.parametrize("piece", ["\\", "\\u005c", "x\\", "\\u00"])
def test_folding_takes_linear_time(piece: str):
    assert Text(piece * 100_000).scan  # minutes, were it quadratic


@pytest.mark.parametrize("piece", ["1 2,", "1 2'", "-----BEGIN ", KEY_HEADER + "\n", "A" * 43 + KEY_HEADER])
def test_looking_for_a_cut_takes_linear_time(piece: str):
    scan = piece * (600_000 // len(piece))  # minutes, were it quadratic
    assert 0 <= safe_cut(scan) <= len(scan)
    assert holds_private_key(scan) == (KEY_HEADER in piece)
    assert (run_end(scan) is None) == piece.startswith("1 2")


@pytest.mark.parametrize(
    ("scan", "held"),
    [
        ("hello wor", "wor"),
        ("hello world ", ""),
        ("hello world\n", ""),
        ("call +1 (555) 123-45", "+1 (555) 123-45"),
        ("call (", "("),
        ("card 4111 1111 1111 1111 ", "4111 1111 1111 1111 "),
        ("card 4111 1111 1111 1111 n", "n"),
        ("card 4111 1111 1111 1111\n", ""),
        ("DE89 3704 0044 0532", "DE89 3704 0044 0532"),
        ("GB29 NWBK 6016", "GB29 NWBK 6016"),
        ("IBAN: GB29 ", "GB29 "),
        ("GB29 nothing", "nothing"),
        ("in 2024. Then", "Then"),
        ("1. first\n2. second\n", ""),
        ('{"key":"val', "val"),
        ('{"key":"val"', ""),
        ('"a \\', "\\"),
        ("card 4111 \\\\u00", "4111 \\\\u00"),
        ("card 4111 \\u005c", "4111 \\u005c"),
        ("see https://a.b/c,d;(e", "https://a.b/c,d;(e"),
        ("see https://a.b/c,d;(e) ", ""),
        ("k=-----BEGIN RSA PRIV", "k=-----BEGIN RSA PRIV"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE", "-----BEGIN RSA PRIVATE KEY-----\nMIIE"),
        ("-----BEGIN PRIVATE KEY----- is how it starts. Then", "Then"),
    ],
)
def test_holds_what_may_still_grow(scan: str, held: str):
    assert scan[safe_cut(scan) :] == held


@given(st.text("ab1 2.-()+[\",:/\nAB\\'", max_size=80))
def test_cuts_fall_between_units_and_stay_cuts(scan: str):
    for size in range(len(scan) + 1):
        cut = safe_cut(scan[:size])
        assert cut == size or all(not start < cut < end for start, end in units(scan))


def test_a_private_key_is_one_piece_with_or_without_its_end():
    line = "MIIEpAIBAAKCAQEA7f3aB9" * 3
    block = f"-----BEGIN RSA PRIVATE KEY-----\n{line}\n{line}\nabc=\n-----END RSA PRIVATE KEY-----"
    assert PRIVATE_KEY.search(f"x {block} y")[0] == block  # type: ignore[index]
    cut_short = block[: block.index("abc=")]
    assert PRIVATE_KEY.search(cut_short)[0] == cut_short.rstrip()  # type: ignore[index]
    assert PRIVATE_KEY.search("-----BEGIN PRIVATE KEY----- and so on, -----END PRIVATE KEY-----") is None
    assert PRIVATE_KEY.search(block.replace("\n", "\\n"))[0] == block.replace("\n", "\\n")  # type: ignore[index]
    for size in range(len(block)):
        assert safe_cut("x " + block[:size]) == 2
        assert holds_private_key("x " + block[:size]) == (size >= 31)


def test_an_overlong_run_ends_at_whitespace_or_a_quote():
    assert run_end("abc") is None
    assert run_end("abc,def") is None
    assert run_end("abc,def ghi") == 7
    assert run_end(' "') == 0


@given(st.text("ab1 2.-()+[\",:/\nAB\\'", max_size=80))
def test_a_run_ends_at_the_first_gap_outside_of_all_units(scan: str):
    gaps = [at for at, char in enumerate(scan) if char in " \n\"'"]
    outside = [at for at in gaps if not any(start <= at < end for start, end in units(scan))]
    assert run_end(scan) == (outside[0] if outside else None)


def test_break_characters_are_those_of_the_pattern():
    assert {chr(i) for i in range(128) if not units(chr(i)) and chr(i) not in "(["} | set("([") == BREAK_CHARS

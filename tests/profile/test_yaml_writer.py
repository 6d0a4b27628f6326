"""What is written as YAML is read back as it was, whatever stands in it, and looks as PyYAML would write it."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aim_profile.files.write import dump

ODD = ("yes", "N", "Null", "~", "1e5", "0x1", "1:30", "=", "<<", "2001-01-01", "a: b", "a #b", "- a", "{a", "", "\n")
ODD += (
    "several\nlines\n",
    "several\nlines",
    " lead\nthen",
    "trail \nthen\n\n",
    "\n\n a",
    "\x85",
    "\x07",
    "x" * 200,
    "e" * 1100,
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.from_regex(r"[A-Za-z][\w./;()%+-]*", fullmatch=True),
    st.text("ab \n#:-'\"|\t", max_size=12),
    st.sampled_from(ODD),
)
numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.none(), st.booleans())
values = st.recursive(
    texts | numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_any_value_is_read_back_as_it_was(value: object):
    written = dump(value)
    assert yaml.safe_load(written) == value
    assert yaml.load(written, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) == value


def test_it_looks_as_a_person_would_write_it():
    value = {
        "name": "chat",
        "empty": [],
        "on": True,
        "gap": 1e-05,
        "port": "8080",
        "list": [{"a": 1, "b": "x: y"}, ["p", "q"], "several\nlines\n"],
        "text": "several\nlines\n",
    }
    assert (
        dump(value, "above\n\nit")
        == """\
# above
#
# it
name: chat
empty: []
'on': true
gap: 1.0e-05
port: '8080'
list:
  - a: 1
    b: 'x: y'
  - - p
    - q
  - |
    several
    lines
text: |
  several
  lines
"""
    )


@pytest.mark.parametrize("word", ["yes", "No", "OFF", "null", "y"])
def test_words_that_mean_something_else_are_quoted(word: str):
    assert dump(word) in (f"'{word}'\n", f'"{word}"\n')

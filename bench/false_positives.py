"""What the default policy changes in texts that hold nothing private, and what it finds where something is.

**False positives.** Generated texts of each kind (code, floats, dates, git logs, changelogs, lock files, ...) hold
nothing private: every change is wrong. Documentation found on this machine (the environment's packages and
``/usr/share/doc``) is public text: every finding but e-mail addresses is printed with its context, so that a person
can judge it. The values shown are public.

**Other families.** Code, prompt injection and toxicity at their default thresholds, over the same texts: how many hold
something by them. (Licences and copyright notices in documentation are there: `code` counts dangerous code alone.)

**Recall.** True values, made with their checksums: alone, in prose, and inside Markdown and URLs; telephone numbers
are libphonenumber's examples of every region, in each of their written forms.

``python bench/false_positives.py [--quick] [--json FILE] [--documents N]``
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import string
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "transformers"), str(ROOT / "tests/fakes")]

import guardrail_values as made  # noqa: E402
from aim_guardrail.cli.evaluate import Labelled, scored  # noqa: E402
from aim_guardrail.pipeline import Guard, Session  # noqa: E402
from aim_guardrail.policy import parse_policy, shipped_policy  # noqa: E402

Made = Callable[[random.Random], str]

DOCUMENT_CHARS = 8000
SUFFIXES = (".md", ".rst", ".txt")
NAMES = ("METADATA", "copyright", "README", "NEWS", "changelog", "AUTHORS")
PROSE = "server handles each request and returns the value of this field when it is set for a given model"
WORDS = PROSE.split()


# --- texts that hold nothing private -------------------------------------------------------------------------------


def code(r: random.Random) -> str:
    names = [r.choice(["a", "rows", "data", "x0", "buf"]) for _ in range(6)]
    lines = [
        f"{names[0]} = {names[1]}[::{r.randint(2, 9)}]",
        f"{names[2]} = {names[3]}[{r.randint(0, 9)}::{r.randint(2, 9)}]",
        f"b{r.randint(1, 9)}[{r.randint(1, 99)}:{r.randint(100, 999)}:{r.randint(1, 9)}, ::-1]",
        f"MASK = 0x{r.getrandbits(64):x}; SEED = {r.getrandbits(31)}; N = {r.getrandbits(48)}",
        f"std::array<int, {r.randint(1, 99)}> f(ns::g{r.randint(1, 9)}::h); // L{r.randint(100, 9999)}",
        f"for i in range({r.randint(0, 9)}, {r.randint(1000, 9_999_999)}, {r.randint(1, 64)}): pass",
        f"assert f({r.randint(-(10**9), 10**9)}, {r.random()}) == {r.uniform(-1e6, 1e6)!r}",
    ]
    return "\n".join(r.sample(lines, 5))


def floats(r: random.Random) -> str:
    form = r.choice(["[{}, {}]", "{} {}", "({}, {})", "{};{}", "{}\t{}", "x={} y={}", "{}/{}"])
    digits = r.choice([2, 4, 6, 8, 10, 16])
    return "\n".join(form.format(*(round(r.uniform(-180, 180), digits) for _ in range(2))) for _ in range(4))


def fractions(r: random.Random) -> str:
    return " ".join(f"{r.choice(['loss', 'acc', 'p', ''])}{r.choice([' ', '=', ': '])}{r.random()}" for _ in range(5))


def _moment(r: random.Random) -> datetime:
    return datetime(1995, 1, 1, tzinfo=UTC) + timedelta(seconds=r.randrange(35 * 365 * 86400))


def dates(r: random.Random) -> str:
    forms = ["%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y", "%Y-%m-%d %H:%M", "%Y%m%d-%H%M%S", "%d-%m-%Y", "%Y/%m/%d", "%s"]
    forms += ["%Y-%m-%dT%H:%M:%S.%f", "%Y-%m-%d - %Y-%m-%d", "%Y.%m.%d", "(%Y-%m-%d)", "%d %m %Y", "%Y %m %d"]
    return "\n".join(_moment(r).strftime(r.choice(forms)) for _ in range(5))


def git_log(r: random.Random) -> str:
    zone = r.choice(["+0200", "-0700", "+0000", "+0530"])
    when = r.choice(["%a %b %d %H:%M:%S %Y", "%Y-%m-%d %H:%M:%S", "%a, %d %b %Y %H:%M:%S", "%Y-%m-%dT%H:%M:%S"])
    entries = (
        f"commit {r.getrandbits(160):040x}\nDate:   {_moment(r).strftime(when)} {zone}\n\n    Fix #{r.randint(1, 9999)}"
        for _ in range(4)
    )
    return "\n\n".join(entries)


def changelog(r: random.Random) -> str:
    def entry() -> str:
        version = f"{r.randint(0, 30)}.{r.randint(0, 40)}.{r.randint(0, 20)}"
        date = _moment(r).strftime("%Y-%m-%d")
        head = r.choice(["## [{v}] - {d}", "## {v} ({d})", "v{v} / {d}", "{v} - {d}", "### {v} — {d}", "* {v} {d}"])
        lines = [f"- {' '.join(r.choices(WORDS, k=7))} (#{r.randint(10, 99999)})" for _ in range(3)]
        return "\n".join([head.format(v=version, d=date), *lines])

    return "\n\n".join(entry() for _ in range(3))


def versions(r: random.Random) -> str:
    def part() -> str:
        parts = [str(r.randint(0, 30)) for _ in range(r.randint(2, 5))]
        return ".".join(parts)

    forms = ["{}", "v{}", "Section {}", "section {}:", "pkg=={}", "pkg>={},<{}", "foo-{}.tar.gz", "§ {}", "{} Overview"]
    forms += [
        '"version": "{}"',
        "Version: {}",
        "see chapter {} and figure {}",
        "libc {}-ubuntu{}",
        "Chrome/{}.6099.109",
    ]
    return "\n".join(r.choice(forms).replace("{}", part()) for _ in range(5))


def lock_file(r: random.Random) -> str:
    def sha(bits: int) -> str:
        return f"{r.getrandbits(bits):0{bits // 4}x}"

    def base64(count: int) -> str:
        return made.chars(r, count, made.ALNUM + "+/")

    version = f"{r.randint(0, 30)}.{r.randint(0, 30)}.{r.randint(0, 99)}"
    entries = [
        f'"node_modules/a{r.randint(1, 99)}": {{"version": "{version}", "integrity": "sha512-{base64(86)}=="}}',
        f"requests=={version} \\\n    --hash=sha256:{sha(256)} \\\n    --hash=sha256:{sha(256)}",
        f'[[package]]\nname = "serde"\nversion = "{version}"\nchecksum = "{sha(256)}"',
        f"github.com/x/y v0.0.0-{_moment(r):%Y%m%d%H%M%S}-{sha(48)} h1:{base64(43)}=",
        f'left-pad@^{version}:\n  resolved "https://registry.example/left-pad-{version}.tgz#{sha(160)}"',
        f'"serial": "urn:uuid:{sha(32)}-{sha(16)}-4{sha(12)}-a{sha(12)}-{sha(48)}", "size": {r.getrandbits(40)}',
    ]
    return "\n".join(r.sample(entries, 4))


def product_codes(r: random.Random) -> str:
    def ean(digits: int) -> str:
        body = made.chars(r, digits - 1, string.digits)
        total = sum(int(c) * (3 if i % 2 == 0 else 1) for i, c in enumerate(reversed(body)))
        return body + str(-total % 10)

    forms: list[Made] = [
        lambda _: ean(13),
        lambda _: ean(8),
        lambda _: f"ISBN 978-{r.randint(0, 9)}-{r.randint(100, 999)}-{r.randint(10000, 99999)}-{r.randint(0, 9)}",
        lambda _: f"EAN {ean(13)}, {r.randint(1, 99)} pcs",
        lambda _: f"{r.randint(0, 9)}-{r.randint(100, 999)}-{r.randint(10000, 99999)}-{r.choice('0123456789X')}",
    ]
    return "\n".join(r.choice(forms)(r) for _ in range(5))


def number_rows(r: random.Random) -> str:
    width, count = r.choice([(4, 8), (4, 6), (4, 5), (3, 6), (2, 8), (5, 5), (4, 12)])
    separator = r.choice([" ", " ", "\t", ", ", "  "])
    row = lambda: separator.join(str(r.randint(10 ** (width - 1), 10**width - 1)) for _ in range(count))  # noqa: E731
    return "\n".join(row() for _ in range(3))


def tables(r: random.Random) -> str:
    rows = [[r.choice(WORDS), *(str(r.choice([r.randint(0, 10**6), round(r.uniform(0, 1e4), 3)])) for _ in range(5))]]
    rows += [[r.choice(WORDS), *(f"{r.uniform(0, 100):.{r.randint(0, 6)}f}" for _ in range(5))] for _ in range(3)]
    glue = r.choice([" | ", " ", ",", "\t", "   "])
    return "\n".join(glue.join(row) for row in rows)


def identifiers(r: random.Random) -> str:
    forms: list[Made] = [
        lambda _: (
            f"{r.getrandbits(32):08x}-{r.getrandbits(16):04x}-4{r.getrandbits(12):03x}-a{r.getrandbits(12):03x}-"
            f"{r.getrandbits(48):012x}"
        ),
        lambda _: f"{r.getrandbits(160):040x}",
        lambda _: ":".join(f"{r.getrandbits(8):02x}" for _ in range(r.choice([6, 8, 16, 20]))),
        lambda _: f"id={r.getrandbits(r.choice([24, 30, 40, 63]))}",
        lambda _: f"{_moment(r).timestamp() * r.choice([1, 1000]):.0f}",
        lambda _: f"INC-{r.randint(10**6, 10**8)} PR #{r.randint(1, 10**5)} bug {r.randint(10**5, 10**7)}",
    ]
    return "\n".join(r.choice(forms)(r) for _ in range(5))


def hex_dump(r: random.Random) -> str:
    lines = (f"{at * 16:08x}  " + " ".join(f"{b:02x}" for b in r.randbytes(16)) for at in range(5))
    return "\n".join(lines)


def arithmetic(r: random.Random) -> str:
    def number() -> str:
        return r.choice([str, "{:,}".format, "{:_}".format, lambda n: f"{n:,}".replace(",", " ")])(r.getrandbits(34))

    return "\n".join(f"{number()} {r.choice('+-*/')} {number()} = {number()}" for _ in range(4))


KINDS: dict[str, Made] = {
    "code": code,
    "float pairs": floats,
    "fractions": fractions,
    "dates": dates,
    "git logs": git_log,
    "changelogs": changelog,
    "sections and versions": versions,
    "lock files": lock_file,
    "product codes": product_codes,
    "rows of numbers": number_rows,
    "tables": tables,
    "identifiers": identifiers,
    "hex dumps": hex_dump,
    "arithmetic": arithmetic,
}


# --- documentation on this machine ---------------------------------------------------------------------------------


def documents(limit: int) -> list[tuple[str, str]]:
    """Up to `limit` (path, text); a fixed sample where there are more. Only each text's first 8,000 characters."""
    roots = {Path(sysconfig.get_paths()["purelib"]), Path("/usr/share/doc")}
    paths = sorted({path.resolve() for root in roots for path in root.rglob("*") if _is_document(path)})
    random.Random(7).shuffle(paths)
    texts: dict[str, str] = {}
    for path in paths:
        text = _read(path)
        if len(texts) < limit and len(text) > 40:
            texts.setdefault(text, str(path))
    return [(path, text) for text, path in texts.items()]


def _is_document(path: Path) -> bool:
    name = path.name.removesuffix(".gz")
    return (name.endswith(SUFFIXES) or name.startswith(NAMES)) and path.is_file()


def _read(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw[: DOCUMENT_CHARS * 2].decode("utf-8")[:DOCUMENT_CHARS]
    except (OSError, UnicodeDecodeError, EOFError):
        return ""


# --- true values ---------------------------------------------------------------------------------------------------

PLACES = ("{}", "it is {}, ok", "({})", '{{"v": "{}"}}', "| {} |", "Call {} today.")
MARKED = ("_{}_", "__{}__", "**{}**", "~~{}~~", "`{}`", "{}…", "—{}—", "- {}\n")
IN_URLS = ("https://h.example/x?v={}&y=1", "see /a/b?number={}")


def phone_forms() -> Iterator[tuple[str, str]]:
    """(form, number) of libphonenumber's example numbers of every region: fixed lines and mobiles."""
    import phonenumbers as pn

    kinds = (pn.PhoneNumberType.FIXED_LINE, pn.PhoneNumberType.MOBILE)
    forms = {"international": pn.PhoneNumberFormat.INTERNATIONAL, "E.164": pn.PhoneNumberFormat.E164}
    forms["national"] = pn.PhoneNumberFormat.NATIONAL
    for region in sorted(pn.SUPPORTED_REGIONS):
        for kind in kinds:
            if (number := pn.example_number_for_type(region, kind)) is not None:
                yield from ((form, pn.format_number(number, code)) for form, code in forms.items())


def brazilian_mobiles(count: int) -> list[str]:
    r = random.Random(5)
    areas = [11, 12, 19, 21, 27, 31, 41, 47, 51, 61, 62, 71, 81, 85, 92]
    return [f"+55 {r.choice(areas)} 9{r.randint(1000, 9999)}-{r.randint(1000, 9999)}" for _ in range(count)]


def recall(guard: Guard, seeds: int) -> dict[str, dict[str, float]]:
    """Share of the values whose second half is gone, by kind of value and of place."""
    values: dict[str, list[str]] = {
        label: [make(random.Random(seed)) for seed in range(seeds)] for label, make in made.PII.items()
    }
    values |= {
        f"card {brand}": [made.card(random.Random(s), brand) for s in range(seeds)] for brand in made.CARD_BRANDS
    }
    values["Brazilian mobiles"] = brazilian_mobiles(seeds)
    result = {
        name: {
            "in prose": _found(guard, some, PLACES),
            "in Markdown": _found(guard, some, MARKED),
            "in URLs": _found(guard, [value.replace(" ", "%20") for value in some], IN_URLS),
        }
        for name, some in values.items()
    }
    by_form: dict[str, list[str]] = {}
    for form, number in phone_forms():
        by_form.setdefault(form, []).append(number)
    for form, numbers in by_form.items():
        result[f"phones of all regions, {form}"] = {
            "alone": _found(guard, numbers, ("{}",)),
            "named as phone": _found(guard, numbers, ("phone: {}", "My mobile number is {}.", "Tel. {}, please")),
        }
    return result


def _found(guard: Guard, values: list[str], places: tuple[str, ...]) -> float:
    hits = 0
    for value in values:
        for place in places:
            text = place.replace("{{", "{").replace("}}", "}").replace("{}", value)
            changed = guard.check("answer", text, Session()).text
            hits += value[len(value) // 2 :] not in changed
    return round(hits / (len(values) * len(places)), 4)


# --- the run -------------------------------------------------------------------------------------------------------


def findings(guard: Guard, text: str, failed: Counter[str]) -> list[Any]:
    verdict = guard.check("answer", text, Session()).verdict
    failed.update(verdict.degraded)
    return list(verdict.findings)


def generated(guard: Guard, count: int) -> dict[str, dict[str, Any]]:
    result = {}
    for kind, make in KINDS.items():
        changed, entities, failed, examples = 0, Counter[str](), Counter[str](), []
        for seed in range(count):
            text = make(random.Random(f"{kind}{seed}"))
            hits = findings(guard, text, failed)
            changed += bool(hits)
            entities.update(hit.label for hit in hits)
            examples += [text[hit.start : hit.end] for hit in hits][: 3 if len(examples) < 3 else 0]
        result[kind] = {
            "changed": changed / count,
            "entities": dict(entities),
            "failed": dict(failed),
            "examples": examples,
        }
    return result


def documentation(guard: Guard, limit: int) -> dict[str, Any]:
    texts = documents(limit)
    changed, besides_mail, shown, entities, failed = 0, 0, [], Counter[str](), Counter[str]()
    for path, text in texts:
        hits = findings(guard, text, failed)
        others = [hit for hit in hits if hit.label != "EMAIL_ADDRESS"]
        changed += bool(hits)
        besides_mail += bool(others)
        entities.update(hit.label for hit in hits)
        for hit in others:
            before, after = text[max(hit.start - 50, 0) : hit.start], text[hit.end : hit.end + 30]
            context = f"{before}⟦{text[hit.start : hit.end]}⟧{after}".replace("\n", "⏎")
            shown.append({"label": hit.label, "rule": hit.rule_id, "context": context, "path": path})
    return {
        "texts": len(texts),
        "changed": changed / len(texts),
        "changed_besides_mail": besides_mail / len(texts),
        "entities": dict(entities),
        "failed": dict(failed),
        "findings": sorted(shown, key=lambda f: (f["label"], f["context"])),
    }


OTHERS = """\
version: 2
name: others
answer:
  - {type: code, action: flag, entities: [DANGEROUS_CODE, CONFIDENTIAL]}
  - {type: injection, action: flag}
  - {type: toxicity, action: flag}
"""


def other_families(count: int, limit: int) -> dict[str, dict[str, float]]:
    """Kind of text → rule → share of its texts in which it finds something."""
    kinds = {kind: [make(random.Random(f"{kind}{seed}")) for seed in range(count)] for kind, make in KINDS.items()}
    kinds["documentation"] = [text for _, text in documents(limit)]
    texts = [Labelled(text, frozenset()) for some in kinds.values() for text in some]
    result: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for rule in parse_policy(OTHERS, "bench").rules("answer"):
        found = iter(asyncio.run(scored(rule, texts, "answer", "tool")).found)
        for kind, some in kinds.items():
            result[kind][rule.name] = sum(next(found) for _ in some) / len(some)
    return result


def table(result: dict[str, Any]) -> Iterator[str]:
    yield f"{'kind of text':24} {'changed':>8}  by entity"
    for kind, row in result["generated"].items():
        yield f"{kind:24} {row['changed']:8.2%}  {row['entities'] or ''} {row['examples'] or ''}"
    docs = result["documentation"]
    yield f"{'documentation':24} {docs['changed']:8.2%}  {docs['entities']} in {docs['texts']} texts"
    yield f"{' besides e-mail':24} {docs['changed_besides_mail']:8.2%}  failed: {docs['failed']}"
    yield f"\n{'other families':24} " + "  ".join(result["others"]["code"])
    for kind, shares in result["others"].items():
        yield f"{kind:24} " + "  ".join(f"{share:9.2%}" for share in shares.values())
    yield "\nfound in documentation, e-mail addresses aside (judge each):"
    for finding in docs["findings"]:
        yield f"  {finding['label']:13} {finding['rule']:38} {finding['context']}"
    yield f"\n{'true values found':38} by place"
    for kind, places in result["recall"].items():
        yield f"{kind:38} " + "  ".join(f"{place} {share:.1%}" for place, share in places.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer texts: a look, not a figure to quote")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where to write")
    parser.add_argument("--documents", type=int, help="how many documentation texts at most (default 2000)")
    args = parser.parse_args()
    # A detector that fails is counted, and the others go on.
    guard = Guard.load(shipped_policy("values").model_copy(update={"on_error": "open"}))
    started = time.process_time()
    result = {
        "generated": generated(guard, 100 if args.quick else 1000),
        "documentation": documentation(guard, args.documents or (200 if args.quick else 2000)),
        "others": other_families(20 if args.quick else 200, args.documents or (200 if args.quick else 2000)),
        "recall": recall(guard, 10 if args.quick else 60),
    }
    result["cpu_s"] = round(time.process_time() - started, 1)
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(table(result)))


if __name__ == "__main__":
    main()

"""Keys of every provider the scanner knows, wrapped as chats wrap them; passwords by their place; what it all costs."""

import asyncio
import base64
import string
import time
from functools import cache
from random import Random
from threading import get_ident
from typing import Any

import pytest

import engine_keys
import guardrail_values as made
from aim_guardrail.detectors import secrets as module
from aim_guardrail.detectors.secrets import SecretDetector
from aim_guardrail.detectors.views import views
from aim_guardrail.pipeline import INLINE_CHARS, Guard, Session
from aim_guardrail.policy import Policy, Rule
from aim_guardrail.proxy import _Exchange
from aim_guardrail.streams.held import StreamGuard
from aim_guardrail.text import WINDOW_CHARS, Text


@cache
def detector() -> SecretDetector:
    return SecretDetector()


@cache
def guard(threshold: float | None = None) -> Guard:
    rules = (Rule(type="secrets", action="redact", threshold=threshold),)
    return Guard(Policy(version=1, name="t", prompt=rules, answer=rules), [detector()])


def redacted(text: str, threshold: float | None = None) -> str:
    return guard(threshold).check("answer", text, Session()).text


def streamed(deltas: list[str]) -> str:
    stream = StreamGuard(guard(), Session())
    return "".join(stream.push(delta).text for delta in deltas) + stream.finish().text


@cache
def samples() -> dict[str, engine_keys.Sample]:
    """For each rule that counts, a text at whose end it finds a key where nothing follows."""
    found = {}
    for rule in detector()._rules.metadata():
        detail = detector()._rules.detail(rule["id"])
        if rule["id"] in detector()._ignored or detail["path"]:
            continue
        for seed in range(60):
            sample = engine_keys.sample(detail, Random(seed))
            hits = [f for f in detector().scan(Text(sample.text)) if f.rule_id == rule["id"]]
            # A word that ends in punctuation, as some patterns would have it, is no key.
            if any(hit.end == len(sample.text) for hit in hits) and sample.text[-1] not in ".!:|":
                found[rule["id"]] = engine_keys.Sample(sample.text, min(hit.start for hit in hits))
                break
    return found


def test_there_is_a_key_of_every_provider():
    assert len(samples()) > 370
    assert sum(sample.start == 0 for sample in samples().values()) > 150


# --- wrapped ---------------------------------------------------------------------------------------------------------

MARKDOWN = ["**{}**", "*{}*", "_{}_", "__{}__", "***{}***", "~~{}~~", "**_{}_**", "`{}`", "> {}", "- **{}**", "# {}"]
TYPOGRAPHY = ["{}…", "{}—", "— {} —", "{}—and so on", "{}…and", "“{}”", "‘{}’", "«{}»", "{}–", "• {} •"]
PUNCTUATION = [
    "({})",
    "[{}]",
    "[{}](x)",
    "<{}>",
    "{}.",
    "{},",
    "{}!",
    "{}?",
    "{}:",
    "{}...",
    "{}!?",
    "{}?!!",
    "{}.*",
    "%{}%",
    "**{}!**",
    "|{}|",
    "{}</td>",
    "{{{}}}",
]
URLS = [
    "https://h.io/x.js?key={}&v=1",
    "https://h.io/x.js?v=1&key={}#top",
    "https://h.io/x?key={}",
    "https://h.io/a/{}?x=1",
    "https://{}@github.com/a",
    "?key=%22{}%22&v=1",
]
PATHS = ["https://h.io/a/{}/b", "/a/{}/b", "{}/b", "{}+is+it"]


def around(template: str) -> tuple[str, str]:
    before, _, after = template.partition("{}")
    return ("{", "}") if template == "{{}}" else (before, after)


@pytest.mark.parametrize("template", [*MARKDOWN, *TYPOGRAPHY, *PUNCTUATION, *URLS, *PATHS])
def test_a_key_of_every_provider_is_found_in_any_wrapping(template: str):
    before, after = around(template)
    for rule_id, sample in samples().items():
        start = len(before) + sample.start
        end = start + len(sample.key)
        if (template in PATHS and set("/:+") & set(sample.key)) or "aim.curl" in rule_id:
            continue  # what separates a path's segments is part of such a key; no command is written like this
        if after.startswith(("…", "...")) and rule_id in module._BY_NAME:
            continue  # what is cut short is no password
        findings = [f for f in detector().scan(Text(before + sample.text + after)) if f.score >= 0.5]
        covered = {at for f in findings for at in range(f.start, f.end)}
        assert covered >= set(range(start, end)), (rule_id, before + sample.text + after)


HEX = "0123456789abcdef"


def uuid(random: Random) -> str:
    return "-".join(made.chars(random, count, HEX) for count in (8, 4, 4, 4, 12))


# What stands before the key's own characters, how many of those there are (from which alphabet), and what ends it.
BY_FORM: dict[str, tuple[str, int, str, str]] = {
    "adafruit": ("aio" + "_", 28, made.ALNUM, ""),
    "bitbucket": ("AT" + "BB", 32, made.ALNUM, ""),
    "browserbase": ("bb" + "_live_", 27, made.ALNUM, ""),
    "contentful": ("CFP" + "AT-", 43, made.ALNUM, ""),
    "crates.io": ("c" + "io", 32, made.ALNUM, ""),
    "doppler": ("dp." + "st.dev.", 43, made.ALNUM, ""),
    "e2b": ("e2b" + "_", 40, HEX, ""),
    "elevenlabs": ("sk" + "_", 48, HEX, ""),
    "facebook": ("EA" + "A", 120, made.ALNUM, ""),
    "firecrawl": ("f" + "c-", 32, HEX, ""),
    "fireworks": ("f" + "w_", 24, made.ALNUM, ""),
    "flutterwave": ("FLW" + "SECK-", 32, HEX, "-X"),
    "google oauth": ("GOC" + "SPX-", 28, made.ALNUM, ""),
    "google token": ("ya" + "29.", 120, made.ALNUM, ""),
    "jfrog": ("cmV" + "mdGtu", 56, made.ALNUM, ""),
    "jina": ("ji" + "na_" + "0a1b2c3d" * 4, 28, made.ALNUM, ""),
    "mailchimp": ("", 32, HEX, "-us" + "12"),
    "netlify": ("nf" + "p_", 40, made.ALNUM, ""),
    "new relic": ("NR" + "AK-", 27, string.ascii_uppercase + made.DIGITS, ""),
    "notion": ("nt" + "n_", 46, made.ALNUM, ""),
    "nuget": ("oy" + "2", 43, string.ascii_lowercase + made.DIGITS, ""),
    "render": ("rn" + "d_", 32, made.ALNUM, ""),
    "runpod": ("rp" + "a_", 40, string.ascii_uppercase + made.DIGITS, ""),
    "sonar": ("sq" + "u_", 40, HEX, ""),
    "stripe webhook": ("wh" + "sec_", 32, made.ALNUM, ""),
    "tailscale": ("ts" + "key-auth-k7Qw3rT9yUCNTRL-", 32, made.ALNUM, ""),
    "tavily": ("tv" + "ly-", 32, made.ALNUM, ""),
    "telegram": ("1234567890" + ":AA", 33, made.ALNUM, ""),
    "typeform": ("tf" + "p_", 59, made.ALNUM, ""),
    "vercel": ("ver" + "cel_blob_rw_AbCdEf0123456789_", 30, made.ALNUM, ""),
    "yandex": ("AQ" + "VN", 36, made.ALNUM, ""),
}


def key_by_form(provider: str, random: Random) -> str:
    before, count, alphabet, after = BY_FORM[provider]
    return before + made.chars(random, count, alphabet) + after


@pytest.mark.parametrize("provider", sorted(BY_FORM))
def test_keys_that_need_no_name(provider: str):
    random = Random(provider)
    for template in ("{}", "Use {} now.", "**{}**", "key `{}`!", '"{}"', "x={}&y=1"):
        text = template.replace("{}", key_by_form(provider, random))
        for shown in (redacted(text), streamed(list(text))):
            assert shown == template.replace("{}", "<SECRET_1>"), text


def test_keys_with_parts_that_need_no_name():
    random = Random(8)
    tail = made.chars(random, 24)
    for key in (
        "access-" + "production-" + uuid(random),
        "HR" + "KU-" + uuid(random),
        "pat-" + "na1-" + uuid(random),
        "re" + f"_{made.chars(random, 8)}_{tail}",
        "s" + f"k.eyJ{made.chars(random, 60)}.{made.chars(random, 22)}",
        "M" + f"{tail}.{made.chars(random, 6)}.{made.chars(random, 38)}",
        made.chars(random, 12) + ":APA" + "91b" + made.chars(random, 134),
    ):
        assert redacted(f"use {key} now") == "use <SECRET_1> now", key


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        ("https://discord.com/api/webhooks/905427997487531380/", made.chars(Random(1), 68), " now"),
        ("https://a.blob.core.windows.net/c/f?sv=2022&sig=", "wgtqmEyinhCRFq7i9SR27NDNcsI6bYEZ5Iyo7EgyfNg%3D", "&sp=r"),
        ("My password is ", "Tr0ub4dor3x", " and"),
        ("Das Passwort ist ", "Sommer2024", ", ja"),
        ("the password is: `", "hunter2xy", "`."),
        ("sshpass -p ", "Tr0ub4dor3x", " ssh bob@h"),
        ("mysql -u root -p", "Tr0ub4dor3x", " db"),
        ("docker login -u bob -p ", "Tr0ub4dor3x", " h.io"),
        ("redis-cli -a ", "Tr0ub4dor3x", "\n"),
        ("client-key-data: ", base64.b64encode(b"-----BEGIN RSA PRIVATE" + b" KEY-----\nMIIE" * 9).decode(), "\n"),
    ],
)
def test_finds_a_secret_by_where_it_stands(before: str, value: str, after: str):
    text, shown = before + value + after, f"{before}<SECRET_1>{after}"
    assert redacted(text) == shown
    assert streamed(list(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "token = base64.b64encode(userpass).decode()",
        "token = b64encode(userpass).decode()",
        "credentials = base64.b64encode(f'{user}:{password}'.encode())",
        "access_key = boto3.Session().get_credentials2()",
        "created_secret = client.CoreV1Api().create_namespaced_secret(ns, body)",
        "auth_token = request.headers2",
        "password=self.password_v2, timeout=3",
        "private_key: ed25519.Ed25519PrivateKey, f_priv",
        "entity_mask2_token=entity_mask2_token, x=1",
        "password_hash = hashlib.sha256(password.encode())",
        "the password is Base64-encoded and SHA256-hashed",
        "your password was changed on 2024-01-01",
        "docker run -u app -p 127.0.0.1:8080:80 image",
        "docker run -u 1000 -p 8080:80 image",
        "perf/attr/test-stat-basic\n24a1319ab0a609ba2b20d11e9d478797  usr/lib/perf",
    ],
)
def test_words_and_ports_are_no_passwords(text: str):
    assert redacted(text) == text


# Of what may stand in a key nothing says that it ends one, unless the same stands before it. A connection string holds
# names of its own, whose values may hold anything.
@pytest.mark.parametrize("template", [*MARKDOWN, *TYPOGRAPHY[:-2], *PUNCTUATION[:4], *URLS[:4], *PATHS[:2]])
def test_nothing_but_the_key_is_redacted(template: str):
    before, after = around(template)
    for rule_id, sample in samples().items():
        divided = set("/:+\\" if template in PATHS else "\\." if "…" in template else "\\") & set(sample.key)
        if sample.start == 0 and "connection-string" not in rule_id and not divided:
            assert redacted(before + sample.text + after) == f"{before}<SECRET_1>{after}", (rule_id, sample.text)


@pytest.mark.parametrize("template", ["_{}_", "__{}__", "~~{}~~", "**_{}_**", "_the key is {}_"])
@pytest.mark.parametrize("tail", ["_", "-", "__", "_-"])
def test_a_key_may_end_with_what_closes_emphasis(template: str, tail: str):
    key = "gl" + "pat-" + made.chars(Random(1), 20 - len(tail)) + tail
    before, after = around(template)
    text = before + key + after
    assert redacted(text).replace(after, "") == f"{before}<SECRET_1>".replace(after, ""), text


@pytest.mark.parametrize(
    "template", ["_{}_", "**{}**", "{}—and", "{}…", "https://h.io/x.js?key={}&v=1", "/a/{}/b", "{}..."]
)
def test_wrapped_keys_stream_as_they_are_checked_whole(template: str):
    before, after = around(template)
    for number, sample in enumerate(samples().values()):
        text = f"See {before}{sample.text}{after} and on."
        at = 4 + number * 7 % (len(text) - 4)
        whole = redacted(text)
        assert streamed([text[:at], text[at:]]) == whole, text
        assert streamed(list(text)) == whole, text


def test_a_view_is_as_long_as_the_text():
    for sample in samples().values():
        for template in [*MARKDOWN, *PUNCTUATION, *URLS]:
            before, after = around(template)
            scan = Text(before + sample.text + after).scan
            assert {len(view) for view in views(scan)} == {len(scan)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("password=hunter2xyz(old)", "hunter2xyz"),
        ("password = 'self.password_v2'", "self.password_v2"),
        ("token: b64.Xy7qqPz81LmNo, next", "b64.Xy7qqPz81LmNo"),
        ("api_key=api_key3Xy7q", "api_key3Xy7q"),
    ],
)
def test_what_only_looks_like_code_is_a_value(text: str, value: str):
    assert redacted(text) == text.replace(value, "<SECRET_1>")


# --- what counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "postgres://user:password@localhost/db",
        "postgres://postgres:postgres@localhost:5432/app",
        "postgres://postgres:postgres@10.0.0.1/app",
        "amqp://guest:guest@localhost",
        "amqp://guest:guest@rabbit.internal/",
        "mongodb://admin:password@h/db",
        "mysql://root:root@127.0.0.1/db",
        "redis://:foobared@localhost:6379",
        "ftp://anonymous:anonymous@h.io/",
        "s3://access_key_id:secret_access_key@bucket/key",
        "https://me:my-api-token@h.io/simple",
        "curl -u user:pass https://h.io",
        "curl -u username:password https://h.io",
    ],
)
def test_passwords_that_everybody_knows_pass_unless_the_policy_wants_them(text: str):
    assert redacted(text) == text
    assert "<SECRET_1>" in redacted(text, threshold=0.3)


def test_a_password_for_localhost_that_nobody_knows_is_a_secret():
    assert redacted("postgres://app:Xy7qqPz81@localhost/db") == "postgres://app:<SECRET_1>@localhost/db"
    assert redacted("clickhouse://u:Password42x@h/db") == "clickhouse://u:<SECRET_1>@h/db"


def test_a_well_known_password_hides_no_key():
    key = "AK" + "IAQ3EGRBL7JX2VWP5M"
    assert (
        redacted(f"postgres://user:password@localhost/db {key}") == "postgres://user:password@localhost/db <SECRET_1>"
    )


def test_an_engine_that_may_say_a_word_we_do_not_know_refuses_to_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_SCORES", {"high": 0.9, "medium": 0.6})
    with pytest.raises(RuntimeError, match=r"the scanner knows confidence \['low'\], we do not"):
        SecretDetector()


def test_a_rule_to_leave_out_that_is_gone_refuses_to_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_LEFT_OUT", frozenset({"betterleaks.renamed"}))
    with pytest.raises(RuntimeError, match=r"has no rules \['betterleaks.renamed'\]"):
        SecretDetector()


class _Match:
    rule_id, location = "betterleaks.new", {"start_offset": 4, "end_offset": 24}
    confidence = "certain"


def test_a_word_unknown_all_the_same_counts_as_the_highest(monkeypatch: pytest.MonkeyPatch):
    class Scanner:
        def scan(self, _: str) -> list[_Match]:
            return [_Match()]

    odd = SecretDetector()
    monkeypatch.setattr(odd, "_scanner", Scanner())
    [finding] = odd.scan(Text("see abcdefgh12345678ABCD now"))
    assert (finding.start, finding.end, finding.score) == (4, 24, 0.9)


DIGESTS = {
    "a lock file of npm": '"integrity": "sha512-{512}"',
    "a lock file of pnpm": "resolution: {{integrity: sha512-{512}}}",
    "a lock file of yarn": "  integrity sha512-{512}\n",
    "a script tag": '<script src="x.js" integrity="sha384-{384}" crossorigin="anonymous"></script>',
    "two in one": 'integrity="sha384-{384} sha512-{512}"',
    "a header": "Digest: SHA-512={512}, SHA-256={256}",
    "a policy": "script-src 'sha256-{256}'",
}


@pytest.mark.parametrize("where", sorted(DIGESTS))
def test_digests_of_files_are_no_secrets(where: str):
    random = Random(7)
    for _ in range(20):
        digests = {f"{{{bits}}}": base64.b64encode(random.randbytes(bits // 8)).decode() for bits in (256, 384, 512)}
        text = DIGESTS[where].replace("{{", "{").replace("}}}", "}\0").replace("\0", "}")
        for name, digest in digests.items():
            text = text.replace(name, digest)
        assert redacted(text) == text
        account_key = text.replace("sha512-", "AccountKey=")
        if account_key != text:
            assert "<SECRET_1>" in redacted(account_key)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("curl -u admin:letmein https://h.io", "letmein"),
        ("curl -u 'bob:Tr0ub4dor&3' https://h.io", "Tr0ub4dor&3"),
        ('curl --user "bob:hunter" https://h.io', "hunter"),
        ("curl -X POST \\\n  -sSLu bob:letmein \\\n  https://h.io", "letmein"),
        ("curl -ubob:letmein! https://h.io", "letmein!"),
        ("curl --proxy-user bob:letmein https://h.io", "letmein"),
        (
            'curl -H "Authorization: 7f1c0a52-93be-4d68-8e07-b1c24fd95a30" https://h.io',
            "7f1c0a52-93be-4d68-8e07-b1c24fd95a30",
        ),
        ("curl -H 'Authorization: Token 9944b09199c62bcf9418ad84' https://h.io", "9944b09199c62bcf9418ad84"),
        ('curl -H "Authorization: Basic Ym9iOmxldG1laW4=" https://h.io', "Ym9iOmxldG1laW4="),
        ('curl -H "Authorization: Basic dXNlcjpwYXNz" https://h.io', "dXNlcjpwYXNz"),
        ('headers["Authorization"] = "7f1c0a5293be4d688e07"', "7f1c0a5293be4d688e07"),
        ("use sk" + "_test_4eC39HqLyjWDarjtT1zdp7dc here", "sk" + "_test_4eC39HqLyjWDarjtT1zdp7dc"),
        (
            "sandbox-" + "sq0csb-q8Zt0LrWnV3yKc5xJd9mHb2gFs7pQa4eTuYiOoRe-1_",
            "sandbox-" + "sq0csb-q8Zt0LrWnV3yKc5xJd9mHb2gFs7pQa4eTuYiOoRe-1_",
        ),
        (
            "EAAA" + "EOq8Zt0LrWnV3yKc5xJd9mHb2gFs7pQa4eTuYiOoReXx1234567890",
            "EAAA" + "EOq8Zt0LrWnV3yKc5xJd9mHb2gFs7pQa4eTuYiOoReXx1234567890",
        ),
    ],
)
def test_finds_credentials_by_their_place(text: str, value: str):
    assert redacted(text) == text.replace(value, "<SECRET_1>")
    assert streamed(list(text)) == text.replace(value, "<SECRET_1>")


def test_finds_the_passwords_of_two_commands_in_a_row():
    text = "curl -u bob:letmein https://h.io\ncurl -u bob:hunter https://h.io"
    assert redacted(text) == "curl -u bob:<SECRET_1> https://h.io\ncurl -u bob:<SECRET_2> https://h.io"


@pytest.mark.parametrize(
    "text",
    [
        "curl https://h.io | docker run -u 1000:1000 image",
        "curl -u $USER:$PASSWORD https://h.io",
        "curl -u <user>:<password> https://h.io",
        "curl -u user:{password} https://h.io",
        "curl -u bob: https://h.io",
        "Basic concepts, basic tutorials1 and Basic usage: 12345678",
        '{"NextToken": "eyJOZXh0VG9rZW4iOiBudWxsfQ1234"}',
        "pageToken=abcd1234efgh5678",
        '"LockToken": "447e55ac-2396-4c6d-b9f9-86b67c17f8b5"',
        "arn:aws:secretsmanager:us-west-2:123456789012:secret:MyTestSecret-a1b2c3",
        "api_key: sk-abcdefgh1234...",
        "api_key: abcdefgh1234****",
        '"DbPassword": "AMAFUyyuros1QjxPTtgzcsuQsqzIasdz/EXAMPLE=="',
        "Authorization: Bearer <token>",
        "Authorization: Bearer your_token_of_2024_03_01",
        "Authorization: AWS4-HMAC-SHA256 Credential=...",
    ],
)
def test_leaves_alone_what_only_stands_in_such_a_place(text: str):
    assert redacted(text) == text


# --- what it costs ---------------------------------------------------------------------------------------------------


def _windowed_text(keys: list[str], random: Random) -> str:
    words = []
    for key in keys:
        words += [random.choice(made.WORDS) for _ in range(random.randint(150, 400))]
        words.append(f"password: {made.chars(random, 14)} and {key}")
    return " ".join(words)


def test_long_texts_are_searched_in_windows_that_find_the_same():
    random = Random(5)
    keys = [made.github_pat(random) for _ in range(60)]
    text = _windowed_text(keys, random)
    assert len(text) > 8 * WINDOW_CHARS
    whole = [(f.start, f.end) for f in detector().scan(Text(text))]
    assert {text[start:end] for start, end in whole} >= set(keys)
    pieces = streamed([text[i : i + 997] for i in range(0, len(text), 997)])
    assert pieces == redacted(text)


class _Counting:
    """Counts the characters given to the scanner."""

    def __init__(self, scanner: Any) -> None:
        self._scanner, self.chars, self.longest = scanner, 0, 0

    def scan(self, view: str) -> Any:
        self.chars += len(view)
        self.longest = max(self.longest, len(view))
        return self._scanner.scan(view)


SHAPES = {
    "one letter": "a",
    "blanks": " ",
    "key ids": "AK" + "IAQ3EGRBL7JX2VWP5M ",
    "joined key ids": "AK" + "IAQ3EGRBL7JX2VWP5M,",
    "assignments": "password=hunter2Xy7qPz ",
    "parameters": "pwd=a1b2c3d4&",
    "curl": "curl ",
    "curl -u": "curl -u bob:letmein ",
    "curl -u without an end": "curl -u a:",
    "basic": "Basic dXNlcjpwYXNz ",
    "uris": "postgres://app:p4ssw0rd@db/x ",
    "half uris": "a://b:",
    "headers of keys": "-----BEGIN PRIVATE KEY-----\n",
    "headers with attributes": "-----BEGIN PRIVATE KEY-----\nA:",
    "headers in one line": "-----BEGIN PRIVATE KEY-----A:",
    "dashes": "-",
    "low lines": "_",
    "emphasis": "_a",
    "stars": "*",
    "dots": ".",
    "paths": "a/",
    "ampersands": "&a=",
    "percent escapes": "%22",
    "backslashes": "\\",
    "newline escapes": "\\n",
    "jwt": "eyJabc.",
    "base64 of jwt": "ZXlK",
    "fly.io": "fm2_",
    "heroku": "HR" + "KU-",
    "kubernetes": "kind: Secret\ndata:\n  a: ",
    "em dashes": "—",
    "digests": "sha512-",
}


def shape_of(name: str, chars: int) -> Text:
    return Text(SHAPES[name] * (chars // len(SHAPES[name])))


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_scanner_sees_a_bounded_multiple_of_the_text(shape: str, monkeypatch: pytest.MonkeyPatch):
    text = shape_of(shape, 100_000)
    counting = _Counting(detector()._scanner)
    monkeypatch.setattr(detector(), "_scanner", counting)
    detector().scan(text)
    assert counting.chars <= 7 * len(text.scan) * 1.1
    unbroken = max(map(len, text.scan.split()), default=0)
    assert counting.longest <= WINDOW_CHARS + 1024 + unbroken


def _cpu_s(text: Text) -> float:
    start = time.process_time()
    detector().may_find(text.scan)
    detector().scan(text)
    return time.process_time() - start


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_cost_is_linear(shape: str):
    """Eight times the text costs about eight times the CPU; squares would be 64, a busy machine is far from 24."""
    small, large = shape_of(shape, 20_000), shape_of(shape, 160_000)
    ratios = (_cpu_s(large) / max(_cpu_s(small), 1e-4) for _ in range(4))
    assert any(ratio < 24 for ratio in ratios)


def test_what_is_long_is_checked_in_a_thread():
    def run(size: int) -> int:
        return asyncio.run(_Exchange._run(None, lambda _: get_ident(), bytes(size)))  # type: ignore[arg-type]

    assert run(INLINE_CHARS) == get_ident()
    assert run(INLINE_CHARS + 1) != get_ident()

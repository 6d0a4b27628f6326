"""Pictures: passed, refused, or judged by an image classifier; found wherever a body may hold one."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from aim_guardrail.detectors.base import Asked, Finding, Passage
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.detectors.images.detector import ImageDetector
from aim_guardrail.detectors.onnx import ModelError
from aim_guardrail.policy import PolicyError, parse_policy
from aim_guardrail.protocols.messages import MESSAGES
from aim_guardrail.protocols.places import CHAT
from aim_guardrail.slots.collect import collect
from aim_guardrail.slots.pictures import is_picture_file
from aim_guardrail.slots.places import FREE
from fake_predictor import FakePredictor
from guarded import guardrail
from served import Served
from tiny_onnx import image_classifier

RED, GREEN = (250, 10, 10), (10, 250, 10)
FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"]


def file(colour: tuple[int, int, int], form: str = "PNG", size: tuple[int, int] = (40, 30), **more: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form, **more)
    return buffer.getvalue()


def uri(raw: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(raw).decode()}"


def moving(*colours: tuple[int, int, int]) -> bytes:
    first, *others = [Image.new("RGB", (40, 30), colour) for colour in colours]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others)
    return buffer.getvalue()


def pages(*sizes: tuple[int, int]) -> bytes:
    """A TIFF whose pages have sizes of their own, and next to no bytes."""
    first, *others = [Image.new("1", size) for size in sizes]
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=others, compression="group4")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


# --- the detector -----------------------------------------------------------------------------------------------------


def options(folder: Path, **more: Any) -> Any:
    return FAMILIES["nsfw_image"].options.model_validate({"path": str(folder), **more})


@pytest.fixture
async def detector(tmp_path: Path) -> AsyncIterator[ImageDetector]:
    detector = ImageDetector.read(options(image_classifier(tmp_path / "m")))
    yield detector
    await detector.close()


async def scan(detector: ImageDetector, *pictures: str) -> list[Finding]:
    found = await detector.scan_batch([Passage(each, "prompt") for each in pictures], Asked(time.monotonic() + 20))
    return [finding for (finding,) in found]


@pytest.mark.parametrize("form", FORMATS)
async def test_pictures_of_every_form_are_judged(detector: ImageDetector, form: str) -> None:
    bad, good = await scan(detector, uri(file(RED, form)), uri(file(GREEN, form)))
    assert (bad.label, bad.rule_id) == ("NSFW", "nsfw_image.nsfw")
    assert bad.score > 0.99
    assert good.score < 0.01


async def test_base64_alone_and_with_line_breaks_is_read(detector: ImageDetector) -> None:
    coded = base64.encodebytes(file(RED)).decode()
    url_safe = base64.urlsafe_b64encode(file(RED)).decode().rstrip("=")
    assert all(finding.score > 0.99 for finding in await scan(detector, coded, url_safe))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
async def test_any_mode_of_pixels_is_read(detector: ImageDetector, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (20, 20)).save(buffer, "TIFF")
    (found,) = await scan(detector, uri(buffer.getvalue()))
    assert found.rule_id == "nsfw_image.nsfw"


async def test_a_frame_in_a_moving_picture_counts(detector: ImageDetector) -> None:
    (found,) = await scan(detector, uri(moving(GREEN, GREEN, RED, GREEN)))
    assert found.score > 0.99


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"no picture at all, but some words", "unreadable"),
        (file(RED)[:60], "unreadable"),
        (b"", "unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unreadable"),
        (bomb(9000, 9000), "too_large"),
        (bomb(60000, 60000), "too_large"),
        (bomb(200, 200), "unreadable"),
        (pages((8, 8), (6000, 5000)), "too_large"),
        (file(GREEN, "BMP", (2100, 2000)), "too_large"),
    ],
    ids=["words", "cut", "nothing", "postscript", "bomb", "huge bomb", "lies", "page", "bytes"],
)
async def test_what_cannot_be_judged_counts_as_found(detector: ImageDetector, raw: bytes, why: str) -> None:
    (found,) = await scan(detector, uri(raw))
    assert (found.score, found.rule_id) == (1.0, f"nsfw_image.{why}")


async def test_what_is_not_base64_counts_as_found(detector: ImageDetector) -> None:
    for text in ("data:image/png;base64,@@@@", "data:image/svg+xml,%3Csvg%3E", "https://example.com/a.png"):
        (found,) = await scan(detector, text)
        assert found.rule_id == "nsfw_image.unreadable"


async def test_the_preprocessor_is_followed(tmp_path: Path) -> None:
    """Red at the edge, green in the middle: with a centre crop nothing red is left."""
    picture = Image.new("RGB", (64, 64), RED)
    picture.paste(Image.new("RGB", (40, 40), GREEN), (12, 12))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    crop = {"do_resize": False, "do_center_crop": True, "crop_size": 32}
    shortest = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    for at, (more, red) in enumerate([({}, True), (crop, False), (shortest, False)]):
        detector = ImageDetector.read(options(image_classifier(tmp_path / str(at), **more)))
        (found,) = await scan(detector, uri(buffer.getvalue()))
        assert (found.score > 0.9) is red
        await detector.close()


async def test_other_labels_can_be_named(tmp_path: Path) -> None:
    folder = image_classifier(tmp_path, ("ok", "bad"))
    with pytest.raises(ModelError, match=r"nothing among its labels \(ok, bad\) means NSFW: say which"):
        ImageDetector.read(options(folder))
    detector = ImageDetector.read(options(folder, labels={"bad": "NSFW"}))
    (found,) = await scan(detector, uri(file(RED)))
    assert found.label == "NSFW"
    assert found.score > 0.99
    await detector.close()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("preprocessor_config.json", None, r"preprocessor_config\.json: cannot be read"),
        ("preprocessor_config.json", '{"size": {"longest": 3}}', "size needs height and width, or shortest_edge"),
        ("preprocessor_config.json", '{"size": 100000}', "use 1 to 4096"),
        ("preprocessor_config.json", '{"size": 33}', r"does not take the pictures of preprocessor_config\.json"),
        (
            "config.json",
            '{"id2label": {"0": "a", "1": "nsfw", "2": "c"}}',
            r"answers \[1, 2\] where config\.json names",
        ),
        ("model.onnx", "x", "not a model ONNX Runtime can run"),
    ],
)
def test_a_broken_directory_is_one_line(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    folder = image_classifier(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=says) as refused:
        ImageDetector.read(options(folder))
    assert "\n" not in str(refused.value)


# --- where pictures are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_a_picture_is_known_by_its_first_bytes(form: str) -> None:
    assert is_picture_file(file(RED, form)[:18])


OTHERS = [b"RIFF\x10\0\0\0WAVEfmt ", b"ID3\x04", b"%PDF-1.7", b"BMW sold more cars in May", b"\0\0\0\x20ftypM4A "]


@pytest.mark.parametrize("raw", OTHERS)
def test_other_files_are_no_pictures(raw: bytes) -> None:
    assert not is_picture_file(raw[:18])


PNG = uri(file(RED))
CODED = PNG.partition(",")[2]
WAVE = base64.b64encode(b"RIFF\0\0\0\0WAVE" * 3).decode()


def content(part: Any) -> Any:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, part]}]}


@pytest.mark.parametrize(
    ("place", "body", "seen"),
    [
        (CHAT, content({"type": "image_url", "image_url": {"url": PNG}}), "picture"),
        (CHAT, content({"type": "image_url", "image_url": PNG}), "picture"),
        (CHAT, content({"type": "image_url", "image_url": {"url": PNG.replace("data:", "DATA:")}}), "picture"),
        (CHAT, content({"type": "image_url", "image_url": {"url": f" {PNG}"}}), "picture"),
        (CHAT, content({"type": "image_url", "image_url": {"url": PNG.replace("image/png", "")}}), "picture"),
        (CHAT, content({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}), "link"),
        (CHAT, content({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "link"),
        (CHAT, content({"type": "image_url", "image_url": {"url": "//example.com/a.png"}}), "link"),
        (CHAT, content({"type": "file", "file": {"file_data": PNG}}), "picture"),
        (CHAT, content({"type": "input_audio", "input_audio": {"data": CODED, "format": "wav"}}), "picture"),
        (MESSAGES, content({"type": "image", "source": {"type": "base64", "data": CODED}}), "picture"),
        (MESSAGES, content({"type": "image", "source": {"type": "url", "url": "https://example.com/a"}}), "link"),
        (CHAT, content({"type": "new", "novel": {"of": PNG}}), "picture"),
        (FREE, {"instances": [{"image": {"b64": CODED}}]}, "picture"),
        (FREE, {"instances": [{"image": base64.encodebytes(file(RED)).decode()}]}, "picture"),
        (FREE, {"image_url": "https://example.com/a.png"}, "link"),
        (CHAT, content({"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}), None),
        (
            CHAT,
            content(
                {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF\0\0\0\0WAVE" * 3).decode()}}
            ),
            None,
        ),
        (CHAT, content({"type": "text", "text": "see https://example.com/a.png"}), None),
        (FREE, {"url": "https://example.com/a.png", "text": "Qk, said the duck, and swam away from the others"}, None),
    ],
)
def test_pictures_are_seen_wherever_they_stand(place: Any, body: Any, seen: str | None) -> None:
    assert [slot.kind for slot in collect("prompt", body, place).pictures] == ([] if seen is None else [seen])


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("images: classify\nprompt: [{type: pii, action: flag}]", "images: classify needs a rule that judges pictures"),
        (
            "prompt: [{type: nsfw_image, action: block, options: {path: /m}}]",
            "type 'nsfw_image' judges pictures, and images is 'pass'",
        ),
        ("images: classify\nprompt: [{type: nsfw_image, action: redact, options: {path: /m}}]", "cannot be redacted"),
        ("images: classify\nprompt: [{type: nsfw_image, action: block}]", "path"),
        ("images: hide\nprompt: [{type: pii, action: flag}]", "images"),
    ],
)
def test_policies_that_make_no_sense_are_refused(policy: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        parse_policy(f"version: 2\nname: p\n{policy}\n", "p.yaml")


def test_a_policy_may_do_nothing_but_refuse_pictures() -> None:
    assert parse_policy("version: 2\nname: p\nimages: refuse\n", "p.yaml").images == "refuse"


Serving = Callable[[str], AbstractContextManager[Served]]


def serve(predictor: FakePredictor, folder: Path, policy: str) -> Served:
    path = folder / "policy.yaml"
    path.write_text(f"version: 2\nname: p\nbudget_ms: 5000\n{policy}\n")
    return guardrail(predictor.host, "--policy", str(path))


@pytest.fixture(scope="module")
def judging(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("judging")
    rule = f"{{type: nsfw_image, action: block, options: {{path: {image_classifier(folder / 'm')}}}}}"
    with serve(predictor, folder, f"images: classify\nprompt: [{rule}]") as server:
        yield server


@pytest.fixture(scope="module")
def refusing(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(predictor, tmp_path_factory.mktemp("refusing"), "images: refuse") as server:
        yield server


def chat(server: Served, picture: str, **more: Any) -> httpx.Response:
    body = {"model": "m", **content({"type": "image_url", "image_url": {"url": picture}}), **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_is_judged_before_it_goes_on(judging: Served, predictor: FakePredictor, stream: bool) -> None:
    assert chat(judging, uri(file(GREEN)), stream=stream).status_code == 200
    seen = len(predictor.seen)
    refused = chat(judging, PNG, stream=stream)
    assert refused.status_code == 400
    assert refused.headers["x-guardrail-families"] == "nsfw_image"
    assert refused.json()["error"]["code"] == "content_filter"
    assert refused.json()["error"]["param"] == "messages[0].content[1].image_url.url"
    assert CODED[:40] not in refused.text
    assert len(predictor.seen) == seen


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (
            "https://example.com/a.png",
            "it is a link to a picture, which the guardrail does not fetch: send",
        ),
        (uri(b"\x89PNG\r\n\x1a\nnothing more to see here"), "it is no picture that can be read: send PNG, JPEG"),
        (uri(bomb(9000, 9000)), "the picture is larger than the policy allows: send a smaller one"),
    ],
)
def test_what_is_not_judged_is_refused_with_its_reason(judging: Served, picture: str, says: str) -> None:
    refused = chat(judging, picture)
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]


def test_pictures_are_refused_where_the_policy_says_so(refusing: Served) -> None:
    for picture in (uri(file(GREEN)), "https://example.com/a.png"):
        refused = chat(refusing, picture)
        assert refused.status_code == 400
        where, _, why = refused.json()["error"]["message"].partition(" was blocked by the guardrail: ")
        assert (where, why) == (
            "messages[0].content[1].image_url.url",
            "it is a picture, and the policy refuses pictures",
        )
        assert refused.headers["x-guardrail-verdict"] == "block"
    body = {"model": "m", "messages": [{"role": "user", "content": "no picture"}]}
    assert httpx.post(f"{refusing.url}/v1/chat/completions", json=body, timeout=30).status_code == 200


def v2(raw: bytes) -> tuple[bytes, dict[str, str]]:
    data = struct.pack("<I", len(raw)) + raw
    head = b'{"inputs":[{"name":"image","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":%d}}]}' % len(
        data
    )
    return head + data, {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}


def test_pictures_in_kserves_protocols_are_judged(judging: Served, refusing: Served) -> None:
    for server, colour, expected in ((judging, GREEN, 200), (judging, RED, 400), (refusing, GREEN, 400)):
        coded = base64.b64encode(file(colour)).decode()
        v1 = httpx.post(f"{server.url}/v1/models/m:predict", json={"instances": [{"b64": coded}]}, timeout=30)
        element = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [coded]}
        rest = httpx.post(f"{server.url}/v2/models/m/infer", json={"inputs": [element]}, timeout=30)
        body, headers = v2(file(colour))
        binary = httpx.post(f"{server.url}/v2/models/m/infer", content=body, headers=headers, timeout=30)
        assert [answer.status_code for answer in (v1, rest, binary)] == [expected] * 3

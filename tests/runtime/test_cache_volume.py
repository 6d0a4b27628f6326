"""What is on the volume: found, verified, counted, pruned; and a server that starts from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from aim_kserve.settings import SettingsError
from aim_profile.errors import AimProfileError
from aim_runtime.assignment import Refused
from aim_runtime.cache.add import Options, add, present
from aim_runtime.cache.errors import CacheError
from aim_runtime.cache.index import Cache, Entry
from aim_runtime.cache.locks import Lease
from aim_runtime.cache.prune import prune
from aim_runtime.cache.stats import count, read_stats
from aim_runtime.cache.uri import parse_uri
from aim_runtime.cache.use import cached, hold
from aim_runtime.cache.verbs import main
from aim_runtime.cache.verify import verify
from aim_runtime.models.file import parse_models
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import located
from model_sources import cache_verb, digests, random_model
from rclone_servers import S3_ENVIRONMENT, s3_server
from served import Served

DAY_S = 86400


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def have(cache: Cache, name: str, size: int = 1000, age_days: float = 0, pin: bool | None = None) -> Entry:
    source = cache.root.parent / "sources" / name
    if not source.exists():
        random_model(source, size)
    entry = add(cache, parse_uri(str(source)), Options(name=name, pin=pin)).entry
    then = time.time() - age_days * DAY_S
    os.utime(cache.lease(entry.key), (then, then))
    entry = entry.model_copy(update={"fetched_at": then})
    cache.write(entry)
    return entry


def names(cache: Cache) -> list[str]:
    return [entry.name for entry in cache.entries()]


def test_a_model_is_found_by_id_source_and_directory(cache: Cache) -> None:
    entry = have(cache, "org/m")
    assert cache.find("org/m") == cache.find(entry.source) == entry
    assert cached(cache.root, entry.source) == (cache.root / "org/m").resolve()
    assert cache.find("org") is cache.find("/nowhere") is None
    with pytest.raises(
        CacheError, match=r"file:///nowhere is not in the cache .*: aim-runtime cache add file:///nowhere"
    ):
        cached(cache.root, "/nowhere")


def test_the_volume_may_be_mounted_elsewhere_and_read_only(cache: Cache, tmp_path: Path) -> None:
    entry = have(cache, "org/m")
    moved = cache.root.rename(tmp_path / "elsewhere")
    for path in [moved, *moved.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    script = (
        "import sys, pathlib; from aim_runtime.cache import use, stats\n"
        "place = pathlib.Path(sys.argv[1]); cache, _ = use.entry_at(place)\n"
        "assert not stats.count(cache, hits=1), 'not read only'; print(use.hold(place).name)"
    )
    place = moved / "org/m"
    as_anybody = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []  # root may write
    command = [*as_anybody, sys.executable, "-c", script, str(place)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "org/m\n", found.stderr
    assert digests(place.resolve()) == {file.path: file.sha256 for file in entry.files}
    for path in [moved, *moved.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


def test_damage_is_found_and_served_no_more_and_mended(cache: Cache) -> None:
    entry = have(cache, "org/m")
    have(cache, "org/other")
    file = cache.content(entry.key) / "model-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(data)
    assert not any(found.bad for found in verify(cache, cache.entries(), quick=True))  # the size is right
    ran = cache_verb("verify", "--cache", str(cache.root))
    assert ran.returncode == 1
    assert "org/m: damaged\n  model-00001-of-00001.safetensors: sha256 is " in ran.stdout
    assert f"aim-runtime cache add {entry.source}" in ran.stdout
    assert "org/other: whole" in ran.stdout
    assert cache.find("org/m") is cache.find(entry.source) is None
    assert not cache.link("org/m").exists()
    with pytest.raises(CacheError, match="is damaged in the cache"):
        cached(cache.root, entry.source)
    with pytest.raises(CacheError, match="not whole"):
        hold(cache.content(entry.key))
    assert not verify(cache, cache.entries(), quick=True)[0].bad  # sizes do not clear it
    assert cache.find("org/m") is None
    mended = add(cache, parse_uri(entry.source), Options(name="org/m"))
    assert not mended.hit
    assert not any(found.bad for found in verify(cache, cache.entries(), quick=False))
    assert cache.find("org/m") == mended.entry


@pytest.mark.parametrize("spoil", ["gone", "short"])
def test_quick_sees_what_is_gone_or_short(cache: Cache, spoil: str) -> None:
    entry = have(cache, "m")
    file = cache.content(entry.key) / "config.json"
    file.unlink() if spoil == "gone" else file.write_bytes(b"{")
    assert list(verify(cache, cache.entries(), quick=True)[0].bad) == ["config.json"]


def test_prune_takes_the_least_recently_used_first(cache: Cache) -> None:
    sizes = {name: have(cache, name, 1000, age).size_bytes for name, age in (("a", 3), ("b", 9), ("c", 1), ("d", 40))}
    assert [each.name[0] for each in prune(cache, max_size_bytes=None, max_age_s=30 * DAY_S, dry_run=True).pruned] == [
        "d"
    ]
    assert names(cache) == ["a", "b", "c", "d"]
    outcome = prune(cache, max_size_bytes=2 * sizes["a"], max_age_s=30 * DAY_S)
    assert [(each.name[0], each.why) for each in outcome.pruned] == [("d", "age"), ("b", "size")]
    assert outcome.size_bytes == sizes["a"] + sizes["c"]
    assert names(cache) == ["a", "c"]
    assert sorted(path.name for path in cache.root.iterdir()) == [".aim-cache", "a", "c"]
    assert len(list((cache.own / "content").iterdir())) == 2


def test_prune_keeps_what_is_pinned_or_in_use(cache: Cache) -> None:
    have(cache, "old", age_days=99)
    pinned, used = have(cache, "pinned", age_days=99, pin=True), have(cache, "used", age_days=99)
    script = (
        "import sys, pathlib; from aim_runtime.cache.use import hold\n"
        "hold(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(cache.link("used"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "held\n"
        assert time.time() - cache.last_used(used) < 60  # its start is its last use
        assert json.loads(cache_verb("stats", "-o", "json", "--cache", str(cache.root)).stdout)["in_use"] == 1
        outcome = prune(cache, max_size_bytes=1, max_age_s=None)
        assert outcome.kept == {pinned.key: "pinned", used.key: "in use"}
        assert names(cache) == ["pinned", "used"]
        refused = cache_verb("prune", "--max-size", "1B", "--cache", str(cache.root))
        assert refused.returncode == 1
        assert "more than --max-size: the rest is in use or pinned" in refused.stderr
        server.kill()  # -9: its lease goes with it
    assert [each.name for each in prune(cache, max_size_bytes=1, max_age_s=None).pruned] == [used.key]
    found = present(cache, parse_uri(pinned.source), Options(pin=False))
    assert found is not None
    assert not found.entry.pinned
    prune(cache, max_size_bytes=1, max_age_s=None)
    assert names(cache) == []


def test_prune_sweeps_what_killed_processes_left(cache: Cache) -> None:
    have(cache, "m")
    for left in ("trash/1", "content/gone@1", "partial/abandoned"):
        (cache.own / left).mkdir(parents=True)
        (cache.own / left / "file").write_bytes(b"12345")
    then = time.time() - 9 * DAY_S
    for path in ("partial/abandoned/file", "partial/abandoned"):
        os.utime(cache.own / path, (then, then))
    outcome = prune(cache, max_size_bytes=None, max_age_s=8 * DAY_S)
    assert {each.name: (each.size_bytes, each.why) for each in outcome.pruned} == {
        ".aim-cache/trash/1": (5, "left behind"),
        ".aim-cache/content/gone@1": (5, "left behind"),
        ".aim-cache/partial/abandoned": (5, "abandoned"),
    }
    assert names(cache) == ["m"]
    assert not any(found.bad for found in verify(cache, cache.entries(), quick=False))


def test_an_entry_being_removed_cannot_be_taken_into_use(cache: Cache) -> None:
    entry = have(cache, "m")
    script = (
        "import sys, pathlib; from aim_runtime.cache.locks import unused\n"
        "with unused(pathlib.Path(sys.argv[1])) as free: print(free, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(cache.lease(entry.key))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pruning:
        assert pruning.stdout is not None
        assert pruning.stdout.readline() == "True\n"
        with pytest.raises(CacheError, match="is being removed by"):
            Lease(cache.lease(entry.key))
        pruning.kill()


def test_hits_and_bytes_are_counted_by_all_and_never_a_reason_to_fail(cache: Cache) -> None:
    entry = have(cache, "m")
    add(cache, parse_uri(entry.source), Options(name="m"))
    known = read_stats(cache)
    assert (known.hits, known.misses, known.fetched_bytes, known.saved_bytes) == (
        1,
        1,
        entry.size_bytes,
        entry.size_bytes,
    )
    assert known.hit_rate == 0.5
    (cache.own / "stats.json").write_text("broken")
    assert count(cache, hits=1)
    assert read_stats(cache).hits == 1


def test_what_is_somebody_elses_is_not_touched(cache: Cache) -> None:
    (cache.root / "org/m").mkdir(parents=True)
    (cache.root / "org/m/mine").write_text("x")
    with pytest.raises(CacheError, match="not this cache's: move it away, or give --name"):
        have(cache, "org/m")
    have(cache, "other/m")
    with pytest.raises(CacheError, match="not this cache's"):
        have(cache, "other/m/deeper")
    assert (cache.root / "org/m/mine").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["add", "gs://x/y"], 1, "error: source gs://x/y: gs:// is not known; give a path"),
        (["add", "/nowhere"], 1, "error: /nowhere: no such directory or file"),
        (["prune", "--max-size", "5"], 2, "argument --max-size: '5': write a number with a unit"),
        (["prune", "--max-age", "soon"], 2, "as in 30d"),
        (["add", "/x", "--parallel", "0"], 2, "a whole number from 1 to 64"),
        (["verify", "m"], 1, "'m' is not in the cache"),
        (["list", "--cahce", "x"], 2, "unrecognized arguments"),
        ([], 2, "VERB"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        done = main([*arguments, *(["--cache", str(tmp_path)] if arguments else [])])
    except SystemExit as ended:  # argparse
        done = ended.code
    shown = capsys.readouterr().err
    assert done == code
    assert said in shown
    assert "Traceback" not in shown


def test_without_the_extra_one_line_names_it(tmp_path: Path) -> None:
    block = tmp_path / "sitecustomize.py"
    block.write_text("import sys\nsys.modules['s3fs'] = sys.modules['fsspec'] = None\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    done = cache_verb("add", "s3://bucket/m", "--cache", str(tmp_path), env=environment)
    assert (done.returncode, "pip install aim-kserve[cache]" in done.stderr) == (1, True)


def test_a_server_that_uses_no_cache_imports_none_of_it() -> None:
    script = (
        "import sys, aim_runtime.server, aim_runtime.models.directory\n"
        "heavy = {'fsspec', 's3fs', 'oras', 'huggingface_hub', 'requests', 'botocore'}\n"
        "print(sorted(name for name in sys.modules if name in heavy or name.startswith('aim_runtime.cache.')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


FLAGS = ["-m", "aim_runtime", "--model_name", "m", "--threads", "1", "--max_model_len", "512", "--access_log=false"]


def figure(metrics: str, name: str) -> float:
    (found,) = (line for line in metrics.splitlines() if line.startswith(f"{name} "))
    return float(found.split()[1])


@pytest.fixture
def sources(embedded_model: Path, tmp_path: Path) -> Iterator[Path]:
    bucket = tmp_path / "s3/bucket/smollm2"
    bucket.mkdir(parents=True)
    os.link(
        embedded_model, bucket / "model.gguf"
    ) if bucket.stat().st_dev == embedded_model.stat().st_dev else shutil.copy(embedded_model, bucket / "model.gguf")
    return tmp_path / "s3"


@pytest.mark.model
def test_a_server_fetches_when_told_and_starts_from_a_warm_cache_without_a_network(
    cache: Cache, sources: Path, embedded_model: Path
) -> None:
    uri = "s3://bucket/smollm2"
    where = ["--model_uri", uri, "--cache_path", str(cache.root)]
    question = {"model": "m", "prompt": "Cats and dogs are", "max_tokens": 4, "temperature": 0}
    with s3_server(sources) as port:
        there = {**os.environ, **S3_ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        with Served([*FLAGS, *where, "--fetch"], env=there) as server:
            first = httpx.post(f"{server.url}/v1/completions", json=question, timeout=60).json()["choices"][0]["text"]
            metrics = httpx.get(f"{server.url}/metrics").text
            assert 'aim_cache_lookups_total{result="miss"} 1.0' in metrics
            assert figure(metrics, "aim_cache_fetched_bytes_total") == embedded_model.stat().st_size
    # The S3 server has ended: whoever asks it is refused.
    with Served([*FLAGS, *where], env=there) as server:
        again = httpx.post(f"{server.url}/v1/completions", json=question, timeout=60).json()["choices"][0]["text"]
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'aim_cache_lookups_total{result="hit"} 1.0' in metrics
        assert figure(metrics, "aim_cache_saved_bytes_total") == embedded_model.stat().st_size
        assert "aim_cache_hit_ratio 0.5" in metrics
        assert prune(cache, max_size_bytes=1, max_age_s=None).kept.popitem()[1] == "in use"
    assert again == first
    assert prune(cache, max_size_bytes=1, max_age_s=None).kept == {}


def test_models_of_a_file_come_from_the_cache_and_are_held(cache: Cache, tmp_path: Path) -> None:
    entry = have(cache, "org/m")
    other = have(cache, "org/other")
    listed = f"version: 1\nmodels:\n- {{name: a, uri: 'URI'}}\n- {{name: b, path: '{cache.link('org/other')}'}}\n"
    cache.write(entry.model_copy(update={"source": "hf://org/m", "revision": "1" * 40}))
    base = RuntimeSettings.load(["--models", "x", "--cache_path", str(cache.root)], {}, prog="p", description="d")
    for uri in ("hf://org/m", f"hf://org/m@{'1' * 40}"):
        _, own = parse_models(listed.replace("URI", uri), base, "models.yaml")
        assert own[0].model_dir == cache.content(entry.key)
    with pytest.raises(AimProfileError, match=r"models\.yaml:3: models\[0\]\.uri: hf://org/no is not in the cache"):
        parse_models(listed.replace("URI", "hf://org/no"), base, "models.yaml")
    script = (
        "import sys; from pathlib import Path; from prometheus_client import REGISTRY\n"
        "from aim_runtime.server import hold_cached; from aim_runtime.models.file import load_models\n"
        "from aim_runtime.settings import RuntimeSettings\n"
        "flags = ['--models', sys.argv[1], '--cache_path', sys.argv[2]]\n"
        "base = RuntimeSettings.load(flags, {}, prog='p', description='d')\n"
        "hold_cached(load_models(Path(sys.argv[1]), base)[1])\n"
        "print(REGISTRY.get_sample_value('aim_cache_lookups_total', {'result': 'hit'}), flush=True); sys.stdin.read()"
    )
    file = tmp_path / "models.yaml"
    file.write_text(listed.replace("URI", "hf://org/m"))
    command = [sys.executable, "-c", script, str(file), str(cache.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "2.0\n"
        kept = prune(cache, max_size_bytes=1, max_age_s=None).kept
        assert kept == {entry.key: "in use", other.key: "in use"}
        server.kill()


def settings(*flags: str) -> RuntimeSettings:
    return RuntimeSettings.load(["--model_name", "m", *flags], {}, prog="p", description="d")


def test_what_a_server_is_told_finds_the_model_or_says_what_fetches_it(cache: Cache) -> None:
    entry = have(cache, "org/m")
    place = cache.content(entry.key)
    where = ("--cache_path", str(cache.root))
    assert located(settings("--model_uri", entry.source, *where)).model_dir == place
    assert located(settings("--model_id", "org/m", *where)).model_dir.resolve() == place
    with pytest.raises(
        Refused,
        match=rf"hf://org/no is not in the cache .*: aim-runtime cache add .* --cache {cache.root}; or start with",
    ):
        located(settings("--model_uri", "hf://org/no", *where))
    with pytest.raises(Refused, match="ftp:// is not known") as unknown:
        located(settings("--model_uri", "ftp://a/b", *where))
    assert "--fetch" not in str(unknown.value)  # it would not help


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fetch"], "--fetch is for a model of a source"),
        (["--model_uri", "hf://a/b", "--model_dir", "/x"], "both say where the model is"),
        (["--model_uri", "hf://a/b", "--models", "/x"], "--model_uri is of one model"),
    ],
)
def test_settings_that_contradict_each_other(flags: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings(*flags)

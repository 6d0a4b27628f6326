"""Helm as a process: JSON on stdin says which charts with which values, JSON on stdout what they come to.

A process of its own, since Helm's library brings Go's runtime, its threads and its signal handlers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Object = dict[str, Any]


class Rendered(NamedTuple):
    """objects: what is installed; refused: Helm's words, where the values are not as the schema wants them."""

    objects: list[Object]
    refused: str


def rendered(requests: list[tuple[Path, Object]]) -> list[Rendered]:
    """What `helm template CHART -f VALUES` says to each, in order."""
    asked = json.dumps([(str(chart), values) for chart, values in requests])
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [
        Rendered([each for each in yaml.safe_load_all(answer["text"]) if each], answer["refused"])
        for answer in json.loads(done.stdout)
    ]


def findings(chart: Path) -> list[str]:
    """Errors and warnings of `helm lint`."""
    done = subprocess.run(
        [sys.executable, __file__, "lint", str(chart)], input="[]", capture_output=True, text=True, check=True
    )
    return [str(line) for line in json.loads(done.stdout)]


def main() -> None:
    """Answers what is asked, in this process."""
    import helm_python as helm

    if sys.argv[1:2] == ["lint"]:
        found = helm.lint(sys.argv[2])
        worse = [each["error"] for each in found["messages"] if each["severity"] > 1]  # 1: information
        print(json.dumps([*worse, *found["errors"]]))
        return
    answers = []
    for path, values in json.loads(sys.stdin.read()):
        with helm.Chart.load(path) as chart:
            try:
                texts = chart.render(values, name="test", namespace="default")
                answers.append({"text": "\n---\n".join(texts.values()), "refused": ""})
            except helm.HelmValuesError as error:
                answers.append({"text": "", "refused": str(error)})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

"""What a person did, or a machine lacks, that stops a job; each kind ends the process with a code of its own."""

from __future__ import annotations

from aim_profile.errors import AimProfileError


class TrainerError(AimProfileError):
    """Field, value and remedy, as all of ours. `exit_code`: what the process ends with."""

    exit_code = 1


class JobError(TrainerError):
    """A job file that cannot be run: `job.yaml:7: spec.hyperparameters.loraRank: …`."""

    exit_code = 2


class DataError(TrainerError):
    """Rows that cannot be trained on: `chat.jsonl:3: messages[0].role: …`, one to a line, capped."""

    exit_code = 2


class ResourceError(TrainerError):
    """Not enough memory, disk or devices; says how much is short."""

    exit_code = 3


class StoreError(TrainerError):
    """A place (directory, S3, hub, registry) that cannot be read or written."""

    exit_code = 3


class GateError(TrainerError):
    """The tuned model was judged and failed a gate. What was trained is kept; nothing is published."""

    exit_code = 4

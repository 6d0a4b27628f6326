"""`aim-trainer`: the verbs and their options. What they do is in the files beside this one, imported when asked for.

Exit codes: 0 done; 2 bad input, said in one line; 3 something is lacking (memory, disk, a place); 4 a gate failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from aim_profile.errors import AimProfileError
from aim_trainer.errors import ResourceError, TrainerError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Fine-tuning on Ray: LoRA, QLoRA and full, that survives, is judged, and comes out ready to serve.\n\n"
    "Exit codes: 0 done; 2 bad input; 3 something is lacking; 4 a gate failed.",
)

JobArgument = Annotated[Path, typer.Argument(metavar="JOB", help="A FineTuningJob, as YAML.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="As in spec.hyperparameters.seed=7; may be repeated."),
]


OutputOption = Annotated[
    Literal["table", "json", "yaml"], typer.Option("--output", "-o", help="A table for people, or JSON or YAML.")
]


@contextmanager
def refusals_told() -> Iterator[None]:
    """What is refused inside is said on stderr; the process ends with the code of its kind."""
    try:
        yield
    except AimProfileError as problem:
        typer.echo(str(problem), err=True)
        raise typer.Exit(problem.exit_code if isinstance(problem, TrainerError) else 2) from None


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"aim-trainer {version('aim-kserve')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def init(
    template: Annotated[
        Literal["chat", "code", "summarization", "classification"], typer.Option(help="What the model is to do.")
    ] = "chat",
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="A configuration of axolotl or LLaMA-Factory.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Leave this key of --from out; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write to this new file instead of stdout.")] = None,
) -> None:
    """Print a job to start from, with comments.

    Example: `aim-trainer init --from axolotl.yml --out job.yaml`
    """
    from . import init as verb

    with refusals_told():
        verb.write(verb.foreign(source, drop or []) if source else verb.template(template), out)


@app.command()
def validate(
    job: JobArgument,
    overrides: SetOption = None,
    data: Annotated[bool, typer.Option("--data/--no-data", help="Read every row as well.")] = True,
    places: Annotated[
        bool,
        typer.Option(
            "--places/--no-places", help="Look whether checkpoints.uri and output.registry can be written to."
        ),
    ] = False,
) -> None:
    """Say whether a job can be run, and name each row that cannot be trained on: neither torch nor Ray is needed."""
    from aim_trainer.job.read import read_job

    with refusals_told():
        read = read_job(job, overrides or ())
        from . import validate as verb

        found = [*(verb.sources(read) if data else ()), *(verb.places(read) if places else ())]
    typer.echo("\n".join([f"{job}: {read.metadata.name} is valid", *found]))


@app.command()
def preview(
    job: JobArgument,
    overrides: SetOption = None,
    samples: Annotated[int, typer.Option(min=0, max=100, help="Rows to show.")] = 3,
    output: OutputOption = "table",
) -> None:
    """Show rows as they will be trained on, what counts for the loss marked, and the data in figures.

    Example: `aim-trainer preview job.yaml --samples 1`
    """
    from aim_trainer.job.read import read_job

    with refusals_told():
        read = read_job(job, overrides or ())
        from . import preview as verb

        verb.preview(read, samples, output)


@app.command()
def plan(
    job: JobArgument,
    overrides: SetOption = None,
    gpu: Annotated[str | None, typer.Option(help="A GPU of `aim-profile gpus`; all of them when left out.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="To train on; local files are counted.")] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="A run of the same job, for how long it lasts.")
    ] = None,
    workload: Annotated[
        bool, typer.Option("--workload", help="Print a workload of `aim-profile plan` instead.")
    ] = False,
    output: OutputOption = "table",
) -> None:
    """Say what a job takes of each device, where it fits, and how many steps it is. Exit code 3: it fits nowhere.

    Example: `aim-trainer plan job.yaml --gpu MI300X`
    """
    from aim_trainer.job.read import read_job

    from . import plan as verb

    with refusals_told():
        read = read_job(job, overrides or ())
        if workload:
            typer.echo(verb.workload(read), nl=False)
        else:
            counted = rows if rows is not None else verb.counted_rows(read)
            made = verb.plan(read, gpu, counted, measured)
            verb.tell(made, output)
            if not made.fits:
                raise typer.Exit(ResourceError.exit_code)


RayOption = Annotated[
    bool | None,
    typer.Option("--ray/--no-ray", help="Workers of Ray's; unset: where there are several, or RAY_ADDRESS is set."),
]


@app.command()
def run(
    job: JobArgument,
    overrides: SetOption = None,
    directory: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the run keeps what it makes; unset: runs/NAME.")
    ] = None,
    ray: RayOption = None,
) -> None:
    """Train, judge and publish. A run that was begun in DIR goes on from its newest whole checkpoint.

    SIGTERM or Ctrl-C: the step is ended and saved, exit code 143; a second time: at once.

    Example: `aim-trainer run job.yaml --set spec.hyperparameters.epochs=2`
    """
    from . import run as verb

    with refusals_told():
        code = verb.run(job, overrides or (), directory, ray)
    raise typer.Exit(code)


@app.command()
def resume(run: RunArgument, overrides: SetOption = None, ray: RayOption = None) -> None:
    """Go on with a run that was paused or killed, by the job in its directory.

    Example: `aim-trainer resume runs/support-bot`
    """
    from . import run as verb

    with refusals_told():
        code = verb.resume(run, overrides or (), ray)
    raise typer.Exit(code)


@app.command()
def pause(
    run: RunArgument,
    patience_s: Annotated[float, typer.Option("--patience", metavar="SECONDS", min=0, help="Wait no longer.")] = 570,
) -> None:
    """End the step a run is at, save it, and wait for that; from any machine that sees its directory."""
    from . import run as verb

    with refusals_told():
        typer.echo(verb.pause(run, patience_s))


@app.command()
def render(job: JobArgument, overrides: SetOption = None) -> None:
    """Print the job as a KubeRay RayJob, with the ConfigMap that holds it.

    Example: `aim-trainer render job.yaml | kubectl apply -f -`
    """
    from aim_profile.files.write import dump_all
    from aim_trainer import render as objects
    from aim_trainer.job.read import read_job

    with refusals_told():
        made = objects.render(read_job(job, overrides or ()))
    typer.echo(dump_all(("", each) for each in made), nl=False)


@app.command()
def schema() -> None:
    """Print the CustomResourceDefinition, for `kubectl apply --server-side -f -`."""
    from aim_profile.files.write import dump
    from aim_trainer.job.schema import custom_resource_definition

    typer.echo(dump(custom_resource_definition()), nl=False)


@app.command()
def status(run: RunArgument, output: OutputOption = "table") -> None:
    """Say how far a run is: step, loss, what is left, what was measured and saved."""
    from . import status as verb

    with refusals_told():
        verb.status(run, output)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of runs.")],
    output: OutputOption = "table",
) -> None:
    """Print runs side by side: what they were told differently, and what they came to."""
    from . import compare as verb

    with refusals_told():
        verb.compare(runs, output)


@app.command()
def evaluate(job: JobArgument, run: RunArgument, overrides: SetOption = None, output: OutputOption = "table") -> None:
    """Judge the result of a run beside its base model once more: measures, answers, gates, the page.

    Example: `aim-trainer evaluate job.yaml runs/support-bot --set spec.validation.samples=200`
    """
    from aim_trainer.job.read import read_job

    with refusals_told():
        read = read_job(job, overrides or ())
        from . import evaluate as verb

        verb.evaluate(read, run, output)


@app.command()
def publish(
    run: RunArgument,
    to: Annotated[
        str | None, typer.Option(help="A directory, s3://, hf:// or oci:// in place of the job's output.registry.")
    ] = None,
    output: OutputOption = "table",
) -> None:
    """Publish what a run trained as a new version: weights, tokenizer, card, serving profile.

    Example: `aim-trainer publish runs/support-bot --to oci://registry/models/support-bot`
    """
    from . import publish as verb

    with refusals_told():
        verb.publish_run(run, to, output)


@app.command()
def search(
    job: JobArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory: trials, table, plot, best job.")],
    overrides: SetOption = None,
    output: OutputOption = "table",
) -> None:
    """Try values of the job's search, stop what is not worth its device, and write the best job.

    Example: `aim-trainer search job.yaml searches/support-bot && aim-trainer run searches/support-bot/best.yaml`
    """
    from aim_trainer.job.read import read_job

    with refusals_told():
        read = read_job(job, overrides or ())
        from . import search as verb

        verb.search_job(read, directory, output)

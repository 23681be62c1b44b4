"""`pumice launch`: the job script that runs a recipe on many machines."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pumice.cli.options import FeatureCacheGbOption, FeatureCacheOption, TrackOption, example
from pumice.cli.output import say
from pumice.cli.stages import check_shares

_group = typer.Typer(
    help="Print the job script that runs a recipe on many GPUs.",
    epilog=example("pumice launch slurm llava15-7b --out runs/7b --nodes 2 --gpus-per-node 8"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
# Before the time is over Slurm asks the processes to stop; a large state takes minutes to write.
_SECONDS_TO_SAVE = 300
# Each process finds its place in variables of Slurm's that torch does not know.
_PLACE = """
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE={processes}
exec "$@"
"""


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(_group, name="launch")


@_group.command(
    "slurm",
    epilog=example("pumice launch slurm llava15-7b --out runs/7b --nodes 2 --gpus-per-node 8"),
)
def slurm(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name or a YAML file.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where to write; all machines see it.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option("--gpus-per-node", min=1, help="GPUs of each, and so processes.")
    ] = 8,
    cpus_per_gpu: Annotated[
        int, typer.Option("--cpus-per-gpu", min=1, help="Cores of each process.")
    ] = 8,
    time: Annotated[
        str, typer.Option("--time", metavar="HH:MM:SS", help="The longest the job may take.")
    ] = "24:00:00",
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Slurm's account.")] = None,
    python: Annotated[
        str, typer.Option("--python", help="The interpreter on the machines.")
    ] = "python",
    feature_cache: FeatureCacheOption = None,
    feature_cache_gb: FeatureCacheGbOption = None,
    track: TrackOption = None,
) -> None:
    """Print a Slurm job script on stdout.

    Submit it with sbatch, and the same script again to go on after its time was over.
    """
    from pumice.recipe.load import load_recipe
    from pumice.train.trackers import TRACKERS

    loaded = load_recipe(recipe, overrides or [])
    check_shares(loaded, nodes * gpus_per_node)
    for name in track or ():
        # Known, that is; whether its package is there, the machines say.
        TRACKERS[name]
    options = [
        ("--feature-cache", feature_cache),
        ("--feature-cache-gb", feature_cache_gb),
        *(("--track", name) for name in track or ()),
    ]
    run = [python, "-m", "pumice", "run", recipe, *(overrides or []), "--out", str(out)]
    run += [word for key, value in options if value is not None for word in (key, str(value))]
    asked = {
        "job-name": f"pumice-{loaded.name}",
        "nodes": nodes,
        "ntasks-per-node": gpus_per_node,
        "gpus-per-node": gpus_per_node,
        "cpus-per-task": cpus_per_gpu,
        "time": time,
        "partition": partition,
        "account": account,
        "signal": f"TERM@{_SECONDS_TO_SAVE}",
        "output": "%x-%j.log",
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
    say(slurm_script(lines, run, processes=gpus_per_node, threads=cpus_per_gpu))


def slurm_script(asked: list[str], run: list[str], *, processes: int, threads: int) -> str:
    """The script: `asked` are its #SBATCH lines, `run` the command of one process."""
    place = shlex.quote(_PLACE.format(processes=processes))
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *asked,
            "set -euo pipefail",
            "",
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
            f"export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS={threads}",
            "# One process a GPU. When one fails, all end; when the time is nearly over, each gets",
            "# SIGTERM and saves: submit this script again to go on.",
            "# shellcheck disable=SC2016 # the variables are those of each process",
            f"srun --kill-on-bad-exit=1 bash -c {place} rank \\",
            f"  {shlex.join(run)}",
        ]
    )

"""``lic train`` and ``lic export``."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import click

from lic.options import device_options, verbosity_options
from lic.quality import TUNES


@click.command()
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--state", "folder", required=True, type=click.Path(path_type=Path), help="Folder of the run's state.")
@click.option("--minutes", type=float, required=True, help="Length of this slice.")
@click.option("--schedule-minutes", type=float, help="Length of the whole run (default: this slice).")
@click.option("--steps", type=int, help="Length of the whole run in steps, instead.")
@click.option("--model", default="base", show_default=True, help="Configuration of a new run.")
@click.option(
    "--part",
    type=click.Choice(
        [
            "all",
            "context",
            "nonlocal",
            "transforms",
            "synthesis",
            "gains",
            "tables",
            "vectors",
            "adapters",
            "synthesis-adapters",
            "refinement",
        ]
    ),
    default="all",
    show_default=True,
    help="What to train: everything, or only a part of --init: the context model on its latents, "
    "the non-local modules with the context model, analysis and synthesis, the synthesis, the scaling factors of the "
    "latents, all tables by quality, these with the biases and depthwise kernels of analysis and synthesis, these with "
    "additions of low rank to their matrices, what of these belongs to the synthesis.",
)
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Of such additions.")
@click.option("--tune", type=click.Choice(TUNES), default=TUNES[0], show_default=True, help="What distortion is.")
@click.option(
    "--quantiser",
    type=click.Choice(["ste", "universal", "noise"]),
    default="ste",
    show_default=True,
    help="What stands for the rounding of latents: straight-through rounding, universal quantisation, noise.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "muon", "soap"]),
    default="adamw",
    show_default=True,
    help="muon: for the matrices of the networks; soap needs the package pytorch-optimizer.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of matrix products; auto: bfloat16 on a GPU. It also pays on a CPU that computes in bfloat16 (AMX).",
)
@click.option("--init", type=click.Path(path_type=Path, exists=True), help="Weights file or state to start from.")
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--frozen-part", type=float, default=0.3, show_default=True, help="First share, with a linear analysis.")
@click.option(
    "--exact-part", type=float, default=0.0, show_default=True, help="Last share, with the integers of the exact path."
)
@click.option("--refine-part", type=float, default=0.25, show_default=True, help="Last share, with the analysis fixed.")
@click.option("--batch", type=int, default=4, show_default=True)
@click.option("--crop", type=int, default=192, show_default=True)
@click.option("--late-batch", type=int, default=2, show_default=True)
@click.option("--late-crop", type=int, default=256, show_default=True)
@click.option(
    "--chroma-part",
    type=float,
    default=0.7,
    show_default=True,
    help="Share of the crops whose chroma is made as soft as that of camera JPEGs.",
)
@click.option(
    "--pattern-part",
    type=float,
    default=0.05,
    show_default=True,
    help="Share of the crops with a pattern drawn over them.",
)
@click.option("--seed", type=int, default=1, show_default=True)
@device_options
@verbosity_options
def command(data, folder, minutes, schedule_minutes, init, device, threads, **settings):  # type: ignore[no-untyped-def]
    """Train a model on DATA: tar files or folders of pictures.

    With --part context, DATA can be files of latents instead (scripts/store_latents.py).

    A slice stops after --minutes and the next call with the same --state continues it exactly. For several GPUs:
    torchrun --nproc-per-node N -m lic train ...
    """
    import torch
    import torch.distributed as dist

    from lic.device import select_device
    from lic.errors import LicError
    from lic.train.data import Pictures
    from lic.train.latents import SUFFIX, StoredLatents
    from lic.train.trainer import Settings, Trainer, append_log, averaged_model

    if threads:
        torch.set_num_threads(threads)
    target = torch.device(select_device(device))
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
        if target.type == "cuda":
            target = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(target)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False  # the variances in MS-SSIM are differences of large numbers
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.pt"
    if state.exists():
        trainer = Trainer.restore(state, target)
        given = settings | {"schedule_minutes": schedule_minutes}
        for name in given:
            explicit = click.get_current_context().get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
            if explicit and given[name] != getattr(trainer.settings, name):
                raise LicError(f"{state} was made with {name} {getattr(trainer.settings, name)}, not {given[name]}")
    else:
        if settings["part"] != "all" and init is None:
            raise LicError(f"--part {settings['part']} needs the other parts: give --init")
        run = Settings(schedule_minutes=schedule_minutes or minutes, **settings)
        if init is None:
            trainer = Trainer(run, target)
        else:
            from lic.model.store import load_file, read_info

            net = averaged_model(init)[0] if init.suffix == ".pt" else load_file(read_info(init)).net
            trainer = Trainer(run, target, refinement=net.config.refinement)
            trainer.start_from(net.state_dict(), net.dependent)
    write = append_log(folder / "log.jsonl")

    def log(entry: dict[str, object]) -> None:
        if trainer.rank == 0:
            write(entry)
            if logging.getLogger("lic").isEnabledFor(logging.WARNING):
                click.echo(json.dumps(entry), err=True)

    source: Pictures | StoredLatents
    if all(path.suffix == SUFFIX for path in data):
        source = StoredLatents(data, target)
    else:
        source = Pictures(list(data), target, trainer.settings.seed)
    try:
        trainer.run(source, minutes, state, log)
        if dist.is_initialized():
            dist.barrier()  # a process that leaves early takes its connections with it
    except OSError as error:
        raise LicError(f"cannot save the state: {error}") from error
    finally:
        source.close()
        if dist.is_initialized():
            dist.destroy_process_group()


@click.command()
@click.argument("state", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--calibration",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="Tar file or folder of pictures that the integers of the exact path are fitted to.",
)
@click.option(
    "--shared-from",
    type=click.Path(path_type=Path, exists=True),
    help="For a part trained alone: the weights file, in TARGET's folder, with everything else.",
)
@click.option("--name", help="Name of the model (default: its configuration's).")
@click.option("--data", required=True, help="What it was trained on, for the record inside the file.")
@click.option("--rate-range", type=(float, float), help="Bits per pixel at quality 0 and 100, for `lic models`.")
@verbosity_options
def export_command(state, target, calibration, shared_from, name, data, rate_range):  # type: ignore[no-untyped-def]
    """Turn the training STATE (a .pt file) into the weights file TARGET."""
    from lic.errors import LicError
    from lic.train.export import export

    try:
        export(
            state,
            target,
            calibration=list(calibration),
            shared_from=shared_from,
            name=name,
            data=data,
            rate_range=rate_range,
        )
    except ValueError as error:
        raise LicError(f"nothing written: {error}") from error

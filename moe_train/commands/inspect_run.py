"""What inspect shows of a run: the documents that a step read, the text of a sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moe_train.commands.inspect_data import origin_of, show_text

if TYPE_CHECKING:
    from moe_train.training.step_samples import StepSamples


def check_run(path: str, asked: str) -> None:
    """ValueError where the path is no folder of a run; the message says what it is, and where to ask."""
    from moe_train.data.dataset import data_prefixes, datasets_in
    from moe_train.training.run_folder import CONFIG, holds_run

    folder = Path(path)
    if (folder / CONFIG).is_file():
        return
    parents = [*folder.parents, *folder.resolve().parents]
    run = next((parent for parent in parents if (parent / CONFIG).is_file() and holds_run(parent)), None)
    if folder.is_dir() and run is not None:
        what = "a checkpoint" if (folder / "state.json").is_file() else "a folder of a run"
        raise ValueError(f"{path} is {what}, not the run itself: ask the run by moe-train inspect {run} {asked}")
    if folder.is_dir():
        what = "is a checkpoint, not a run" if (folder / "state.json").is_file() else "is no folder of a run"
        there = datasets_in(folder)
        hint = f"; did you mean {' or '.join(there)}?" if there and asked.startswith("--sample") else ""
        raise ValueError(f"{path} {what} (it holds no {CONFIG}), and {asked} is asked of one{hint}")
    try:
        data_prefixes(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no folder {path}; {asked} is asked of the folder of a run, for example runs/demo"
        ) from None
    raise ValueError(
        f"{path} is a data set, not the folder of a run, which {asked} is asked of; of a data set inspect shows "
        "--document N and --sample N"
    )


def show_step(args: argparse.Namespace) -> int:
    """The documents of a step, from the run's record of its starts and the data alone."""
    from moe_train.data.dataset import sidecar_stem
    from moe_train.data.domains import documents_path
    from moe_train.data.origins import Origins
    from moe_train.data.provenance import trace
    from moe_train.training.step_samples import not_learned, open_samples, samples_of_step

    run = Path(args.path)
    found = samples_of_step(run, args.step, args.rank)
    with open_samples(run, found) as samples:
        origins = {
            name: Origins(sidecar_stem(name)) for name in samples.names if documents_path(sidecar_stem(name)).is_file()
        }
        reader = "" if args.rank is None else f", rank {args.rank} of {found.ranks}"
        print(f"step {args.step} of {args.path}{reader}{_taken_by(run, found)}: {len(found.indices)} samples")
        if note := not_learned(found):
            print(f"  {note}")
        for index in found.indices:
            read = trace(samples, index)
            print(f"sample {index}: {read.name}, epoch {read.epoch}")
            for piece in read.pieces:
                line = f"  document {piece.document}, its tokens {piece.first} to {piece.stop - 1}"
                if read.name in origins:
                    line += f": {origin_of(origins[read.name], piece.document)}"
                print(line)
    return 0


def show_run_sample(args: argparse.Namespace) -> int:
    """Text of a sample of a run."""
    from moe_train.data.provenance import trace
    from moe_train.training.step_samples import open_samples, samples_of_step, step_of_sample

    run = Path(args.path)
    found = samples_of_step(run, step_of_sample(run, args.sample))
    with open_samples(run, found) as samples:
        read = trace(samples, args.sample)
        print(f"sample {read.index}: {read.name}, epoch {read.epoch}, read by step {found.step}{_taken_by(run, found)}")
        dataset = samples.samplers[samples.names.index(read.name)].reader.dataset
        begins = [dataset.document_span(piece.document)[0] for piece in read.pieces]
        show_text(dataset, [(begin + p.first, begin + p.stop) for begin, p in zip(begins, read.pieces, strict=True)])
    return 0


def _taken_by(run: Path, found: StepSamples) -> str:
    other = Path(found.stretch.run)
    return "" if other == run.resolve() else f", taken by {other}"

"""Options of the training loop; composed with those of the other rooms in run_config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TrainOptions:
    steps: int = 100
    global_batch_size: int = 8
    """Sequences per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = 4
    """Sequences per rank and micro-batch; accumulation = global / (micro * DP)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    zero_stage: Literal[1, 2, 3] = 1
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu: float32 masters and moments lie in host memory, and AdamW runs there (docs/parallelism.md)."""
    deterministic: bool = False
    """Deterministic kernels on CUDA (CPU always is)."""
    init_may_change: list[Literal["rope_theta", "rope_scaling"]] = field(default_factory=list)
    """Keys of model that may differ from the model that --init-from names: to go on with longer texts."""


@dataclass(frozen=True)
class OptimizerOptions:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to norms, biases, prototypes and gate state."""
    gate_lr_factor: float = 1.0
    """Learning rate of gate parameters relative to the others."""


@dataclass(frozen=True)
class ScheduleOptions:
    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    """Share of the steps that wsd spends decaying at the end."""
    final_lr_fraction: float = 0.1
    """Learning rate at the last step relative to the peak."""


@dataclass(frozen=True)
class EvalOptions:
    every: int = 0
    """Validate every this many steps; 0 for never."""
    steps: int = 20
    """Global batches of validation data per validation."""


@dataclass(frozen=True)
class CheckpointOptions:
    every_steps: int = 0
    """Save every this many steps; 0: only at the end (and on SIGTERM or Ctrl-C)."""
    every_minutes: float = 0.0
    keep: int = 2
    """Complete checkpoints that stay on disk, the newest first."""
    keep_every_steps: int = 0
    """Those whose step is a multiple of this stay for ever; 0: none."""
    keep_every_hours: float = 0.0
    """The first one of each period of so many hours stays for ever; 0: none."""
    asynchronous: bool = True
    """Training waits only while the state is copied in memory; a thread writes the files. Needs the host memory of that
    copy on each rank: 12 bytes per parameter of the rank's share."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint, or a record of the metrics, cannot be written: end the run (what was written before is
    untouched), or say so and train on."""
    verify: bool = True
    """Compare all files with their checksums before a checkpoint is loaded."""
    best: bool = False
    """Save the weights alone whenever the validation loss is the lowest so far; ``checkpoints/best`` names them."""
    final_weights: bool = False
    """Save the weights alone after the last step as well."""


@dataclass(frozen=True)
class LoggingOptions:
    every: int = 10
    """Steps between two console lines and two records in metrics.jsonl."""
    tensorboard: bool = True
    wandb: bool = False
    csv: bool = False
    per_layer: bool = True
    """Also write balance/layer_i/* tags."""
    max_layer_tags: int = 400
    """Most tags of that kind; a model whose layers need more has the summary over layers only."""


@dataclass(frozen=True)
class AlarmOptions:
    """Warnings of collapsing routing. They are printed and recorded and never stop a run."""

    enabled: bool = True
    quiet_steps: int = 100
    """Steps at the start of the run in which nothing is judged."""
    window: int = 20
    """Steps that the load is judged over; an expert without a token for so many in a row is dead."""
    min_slots: int = 100
    """Slots that an expert must have to expect in the window. Where steps have few tokens the window is longer."""
    dead_experts: bool = True
    load_share: float = 0.4
    """Alarm where an expert has less than this part of its even share 1/E; 0 switches it off."""
    entropy: float = 0.7
    """Alarm where the entropy of the load / ln E is lower; 0 switches it off."""
    z_growth: float = 10.0
    """Alarm where the z-loss (measured also where it is none) is so many times its lowest of the last ``z_steps``
    steps; 0 switches it off."""
    z_steps: int = 100


@dataclass(frozen=True)
class GuardOptions:
    """What a run does with steps whose numbers are bad (docs/guard.md). A step is judged before the optimizer moves."""

    non_finite: Literal["skip", "rewind", "stop"] = "skip"
    """Where the loss or a gradient is NaN or infinite."""
    spike: Literal["ignore", "warn", "skip", "rewind", "stop"] = "warn"
    """Where the loss is far above those of the steps before."""
    window: int = 100
    """Steps whose losses a spike is measured against; nothing is judged until there are so many."""
    threshold: float = 10.0
    """Robust z-score, (loss - median) / (1.4826 * MAD), from which a loss is a spike."""
    max_in_a_row: int = 3
    """Steps that may be skipped one after another; one more stops the run."""
    max_skips: int = 100
    """Steps that may be skipped in the whole run; one more stops it."""
    rewind_steps: int = 20
    """A rewind leaves out the data of the bad step and of so many steps before it, as far back as the checkpoint."""
    max_rewinds: int = 5
    """In the whole run; one more stops it."""
    replica_every: int = 1000
    """Steps between two comparisons of what must be equal on all data-parallel ranks; 0: never."""
    replica_mismatch: Literal["stop", "warn"] = "stop"


@dataclass(frozen=True)
class ProfileOptions:
    """torch profiler window and CUDA memory snapshot, written to <run>/profile/."""

    start_step: int = 0
    """First profiled step; 0 switches profiling off."""
    steps: int = 3
    memory: bool = False

"""The numbers at the top of the report, and its facts about configuration and environment, as text."""

from __future__ import annotations

import shlex
from typing import Any

from moe_train.evaluation.run_files import RunFiles
from moe_train.evaluation.table import number
from moe_train.model.families import FAMILIES

Card = tuple[str, str, str]


def summary_cards(run: RunFiles) -> list[Card]:
    """Name, value, remark. What is not known is left out; the first is the loss that counts."""
    loss_cards = _evaluation_cards(run.evaluation) if run.evaluation else _record_cards(run)
    return [*loss_cards, *_balance_cards(run), *_size_cards(run)]


def _evaluation_cards(evaluation: dict[str, Any]) -> list[Card]:
    cards = [
        ("validation loss", number(evaluation["loss"]), "nats per token"),
        ("perplexity", number(evaluation.get("perplexity")), "exp(loss)"),
    ]
    if evaluation.get("bits_per_byte") is not None:
        cards.append(("bits per byte", number(evaluation["bits_per_byte"]), "of text"))
    entropy = evaluation.get("unigram_entropy")
    if entropy is not None:
        sample = evaluation.get("unigram_sample")
        remark = f"nats, estimated from {sample:,} tokens" if sample else "nats, of the same tokens"
        cards.append(("unigram entropy", number(entropy), remark))
        if evaluation["loss"] is not None:
            difference = entropy - evaluation["loss"]
            if difference >= 0:
                cards.append(("nats below unigram", number(difference), "unigram entropy - loss"))
            else:
                cards.append(("nats ABOVE unigram", number(-difference), "loss - unigram entropy"))
    return cards


def _record_cards(run: RunFiles) -> list[Card]:
    cards: list[Card] = []
    if run.validation:
        last = run.validation[-1]
        cards.append(("validation loss", number(last.get("eval/loss")), f"nats per token, at step {last['step']:,}"))
        cards.append(("perplexity", number(last.get("eval/perplexity")), "exp(loss)"))
    if run.train:
        last = run.train[-1]
        cards.append(("training loss", number(last.get("loss")), f"nats per token, at step {last['step']:,}"))
    return cards


def _balance_cards(run: RunFiles) -> list[Card]:
    if run.evaluation and run.evaluation.get("mean"):
        mean = run.evaluation["mean"]
        floor = f"floor {number(mean['gini_floor'])}" if mean.get("gini_floor") is not None else "mean over layers"
        return [
            ("Gini of expert load", number(mean.get("gini")), floor),
            ("min-max of expert load", number(mean.get("min_max")), "1 is even"),
        ]
    if run.train and run.train[-1].get("balance/gini") is not None:
        return [("Gini of expert load", number(run.train[-1]["balance/gini"]), "training, last interval")]
    return []


def _size_cards(run: RunFiles) -> list[Card]:
    cards: list[Card] = []
    if run.train:
        last = run.train[-1]
        steps = run.option("train.steps")
        of = f" of {steps:,}" if isinstance(steps, int) else ""
        cards.append(("tokens seen", big_number(last.get("tokens", 0)), f"step {last['step']:,}{of}"))
        if last.get("tokens_per_second") is not None:
            mfu = last.get("mfu")
            more = f"tokens/s, MFU {100 * mfu:.1f}\u00a0%" if mfu is not None else "tokens/s"
            cards.append(("throughput", big_number(last["tokens_per_second"]), more))
    model = run.environment.get("model") or {}
    if model.get("total_parameters"):
        active = model.get("active_parameters")
        cards.append(
            ("parameters", big_number(model["total_parameters"]), f"{big_number(active)} active" if active else "")
        )
    return cards


def subtitle(run: RunFiles) -> str:
    """Model, gate and layout in one line."""
    family, gate = run.option("model.family"), run.option("router.gate")
    layers, experts = run.option("model.num_layers"), run.option("model.moe.num_experts")
    if family in FAMILIES and not FAMILIES[family].experts:
        gate = experts = None
    ep, zero = run.option("parallel.expert"), run.option("train.zero_stage")
    processes = run.environment.get("processes")
    parts = [
        str(family) if family else None,
        f"gate {gate}" if gate else None,
        f"{layers} layers" if layers else None,
        f"{experts} experts" if experts else None,
        f"{processes} {'process' if processes == 1 else 'processes'}" if processes else None,
        f"EP {ep}" if ep else None,
        f"ZeRO {zero}" if zero is not None else None,
        run.option("train.precision"),
        str(run.environment["date"])[:10] if run.environment.get("date") else None,
    ]
    return " · ".join(str(part) for part in parts if part)


def environment_rows(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """environment.json as names and values, one row each."""
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        name = key.replace("_", " ")
        if value is None or value in ({}, []) or key == "earlier":
            continue
        if key == "command" and isinstance(value, list):
            rows.append((name, shlex.join(str(item) for item in value)))
        elif isinstance(value, dict):
            rows.append((name, ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v is not None)))
        else:
            rows.append((name, _plain(value)))
    if environment.get("earlier"):
        rows.append(("earlier starts", str(len(environment["earlier"]))))
    return rows


def big_number(value: float | int | None) -> str:
    """Three or four digits and a unit: 950, 1.23 K, 45.6 M."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _plain(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) >= 100_000:
        return f"{value:,.0f}"
    return str(value)

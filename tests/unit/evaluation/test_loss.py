"""Evaluation against plain sums over all tokens, for any composition of batches and any number of ranks.

Suffixes: N samples, S tokens per sample, B sequences of a batch, T = S * B, E experts, L layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_train.data.batches import Batch
from moe_train.evaluation.loss import evaluate
from moe_train.evaluation.result import EvaluationResult, evaluation_path, read_evaluation, write_evaluation
from moe_train.routing.interface import Routing
from moe_train.routing.statistics import gini_floor

N, S, E, L, V = 7, 5, 8, 3, 20
DOMAINS = ["a", "b", "never"]


class Data:
    """Random samples and a "model" whose answer for a token depends on that token only."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels_NS = torch.randint(1, V, (N, S), generator=generator)
        self.nll_NS = torch.rand(N, S, generator=generator) * 5
        self.length_N = torch.randint(1, S + 1, (N,), generator=generator)
        self.domain_NS = torch.randint(0, 2, (N, S), generator=generator)
        self.selected_LNSE = torch.rand(L, N, S, E, generator=generator) < 0.3
        self.kept_LNSE = self.selected_LNSE & (torch.rand(L, N, S, E, generator=generator) < 0.8)
        self.token_bytes = torch.arange(V, dtype=torch.int32)  # token 0 stands for no byte
        self.real_NS = torch.arange(S) < self.length_N[:, None]

    def batch(self, samples: Sequence[int], rows: int) -> Batch:
        """These samples and all-padding rows up to ``rows``; labels at padding are nonsense on purpose."""
        missing = rows - len(samples)
        sample_B = torch.tensor([*samples, *[-1] * missing], dtype=torch.int64)
        real_BS = torch.cat([self.real_NS[list(samples)], torch.zeros(missing, S, dtype=torch.bool)])
        labels_BS = torch.cat([self.labels_NS[list(samples)], torch.full((missing, S), -100)])
        domain_BS = torch.cat([self.domain_NS[list(samples)], torch.full((missing, S), -1)])
        labels_BS = labels_BS.masked_fill(~real_BS, -100)
        return Batch(labels_BS.clamp(min=0), labels_BS, real_BS, ~real_BS, sample_B, domain_BS)

    def forward(self, batch: Batch) -> tuple[Tensor, list[Routing]]:
        """Padding gets NaN as its loss and experts as if it were routed: neither may count."""
        rows = batch.sample_B.clamp(min=0)
        nll_BS = self.nll_NS[rows].masked_fill(batch.padding_BS, float("nan"))
        routings = []
        for layer in range(L):
            selected_TE = self.selected_LNSE[layer, rows].transpose(0, 1).reshape(-1, E)
            kept_TE = self.kept_LNSE[layer, rows].transpose(0, 1).reshape(-1, E)
            scores_TE = torch.zeros(len(selected_TE), E)
            routings.append(Routing(scores_TE, scores_TE, scores_TE, selected_TE, kept_TE))
        return nll_BS, routings

    def evaluate(self, batches: Sequence[Batch], reduce: Callable[[Tensor], Tensor] | None = None) -> EvaluationResult:
        more = {} if reduce is None else {"reduce": reduce}
        return evaluate(
            self.forward,
            batches,
            layers=range(L),
            num_experts=E,
            token_bytes=self.token_bytes,
            domains=DOMAINS,
            **more,  # type: ignore[arg-type]
        )

    def whole(self) -> EvaluationResult:
        return self.evaluate([self.batch(range(N), N)])


def same(left: EvaluationResult, right: EvaluationResult) -> None:
    a, b = left.to_json(), right.to_json()
    assert a.pop("layers") == b.pop("layers"), "counts are integers"
    for key in ("loss", "perplexity", "bits_per_byte"):
        assert a.pop(key) == pytest.approx(b.pop(key), rel=1e-13)
    domains_a, domains_b = a.pop("domains"), b.pop("domains")
    for name in domains_a:
        for key in ("loss", "bits_per_byte"):
            left_value, right_value = domains_a[name].pop(key), domains_b[name].pop(key)
            assert left_value == (right_value and pytest.approx(right_value, rel=1e-13))
    assert domains_a == domains_b
    assert a == b


def test_equals_plain_sums() -> None:
    data = Data()
    result = data.whole()
    real = data.real_NS
    nll = float(data.nll_NS[real].double().sum())
    assert result.tokens == int(real.sum()) == result.routed_tokens
    assert result.loss == pytest.approx(nll / result.tokens, rel=1e-14)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.bytes == int(data.labels_NS[real].sum())
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / result.bytes)
    for layer in range(L):
        assert result.layers[layer].load == data.selected_LNSE[layer][real].sum(0).tolist()
        assert result.layers[layer].kept == data.kept_LNSE[layer][real].sum(0).tolist()
        slots = sum(result.layers[layer].load)
        assert result.layers[layer].statistics["mean_k"] == pytest.approx(slots / result.tokens)
        assert result.layers[layer].gini_floor == pytest.approx(float(gini_floor(slots, E)))
    assert result.mean()["gini"] == pytest.approx(sum(layer.statistics["gini"] for layer in result.layers) / L)


def test_domains_equal_plain_sums_and_add_up() -> None:
    data = Data(1)
    result = data.whole()
    assert list(result.domains) == DOMAINS, "no row for tokens without a domain when there are none"
    for number, name in enumerate(DOMAINS[:2]):
        mask = data.real_NS & (data.domain_NS == number)
        domain = result.domains[name]
        assert domain.tokens == int(mask.sum())
        assert domain.loss == pytest.approx(float(data.nll_NS[mask].double().mean()), rel=1e-7)
        assert domain.load == data.selected_LNSE[:, mask].sum(1).tolist()
    never = result.domains["never"]
    assert never.loss is None and never.bits_per_byte is None and never.tokens == 0
    total = torch.tensor([domain.load for domain in result.domains.values()]).sum(0)
    assert total.tolist() == [layer.load for layer in result.layers]
    assert sum(domain.tokens * (domain.loss or 0) for domain in result.domains.values()) == pytest.approx(
        result.loss * result.tokens
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10])
def test_any_batch_size_and_an_uneven_last_batch(size: int) -> None:
    data = Data(2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(size)).tolist()
    batches = [data.batch(order[i : i + size], size) for i in range(0, N, size)]
    same(data.evaluate(batches), data.whole())


def test_whole_batches_of_padding_change_nothing() -> None:
    data = Data(3)
    same(data.evaluate([data.batch([], 2), data.batch(range(N), N), data.batch([], 4)]), data.whole())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_uneven_shares(ranks: int) -> None:
    """The ranks of a data-parallel group one after the other: what each hands to ``reduce`` is summed, then every rank
    must come to the result of a single process."""
    data = Data(4)
    shares = [list(range(N))[rank::ranks] for rank in range(ranks)]
    longest = max(len(share) for share in shares)
    batches = [[data.batch(share[i : i + 1], 1) for i in range(longest)] for share in shares]
    handed: list[list[Tensor]] = []
    for own in batches:
        calls: list[Tensor] = []

        def remember(tensor: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(tensor.clone())
            return torch.ones_like(tensor)

        data.evaluate(own, remember)
        handed.append(calls)
    assert len({len(calls) for calls in handed}) == 1, "every rank takes part in the same reductions"
    totals = [torch.stack(tensors).sum(0) for tensors in zip(*handed, strict=True)]
    for own in batches:
        answers = iter(totals)
        same(data.evaluate(own, lambda _, answers=answers: next(answers).clone()), data.whole())  # type: ignore[misc]


def test_sums_do_not_lose_small_terms() -> None:
    """A million tokens of float32: a running float32 sum would be off by far more than 1e-9."""
    batch = Batch(*(torch.zeros(1, 2**20, dtype=torch.int64) for _ in range(2)), torch.ones(1, 2**20, dtype=torch.bool),
                  torch.zeros(1, 2**20, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))  # fmt: skip
    nll_BS = torch.full((1, 2**20), 0.1)
    result = evaluate(lambda _: (nll_BS, []), [batch] * 3, layers=[], num_experts=0)
    assert result.loss == pytest.approx(float(nll_BS[0, 0].double()), rel=1e-12)
    assert result.bits_per_byte is None and result.bytes is None and result.mean() == {}


def test_tokens_of_no_known_domain_have_their_own_row() -> None:
    data = Data(5)
    data.domain_NS[0, 0] = -1
    data.domain_NS[1, 0] = 99
    result = data.whole()
    assert result.domains["(none)"].tokens == 2
    assert sum(domain.tokens for domain in result.domains.values()) == result.tokens


def test_no_domains() -> None:
    data = Data(6)
    batch = data.batch(range(N), N)
    plain = Batch(batch.ids_BS, batch.labels_BS, batch.target_BS, batch.padding_BS, batch.sample_B, None)
    result = evaluate(data.forward, [plain], layers=range(L), num_experts=E)
    assert result.domains == {} and result.loss == pytest.approx(data.whole().loss)


def test_runs_without_gradients() -> None:
    data = Data(7)
    weight = torch.ones((), requires_grad=True)

    def forward(batch: Batch) -> tuple[Tensor, list[Routing]]:
        nll_BS, routings = data.forward(batch)
        assert not (nll_BS * weight).requires_grad
        return nll_BS, routings

    evaluate(forward, [data.batch(range(N), N)], layers=range(L), num_experts=E)


def test_nothing_to_predict() -> None:
    data = Data(8)
    with pytest.raises(ValueError, match="no token to predict"):
        data.evaluate([data.batch([], 2)])


def test_table_of_bytes_of_another_tokenizer() -> None:
    data = Data(9)
    data.token_bytes = data.token_bytes[:3]
    with pytest.raises(ValueError, match="different tokenizers"):
        data.whole()


def test_json_file(tmp_path: Path) -> None:
    path = evaluation_path(tmp_path, "some/where/validation")
    assert path == tmp_path / "evaluation" / "validation.json"
    evaluation = Data(10).whole().to_json(step=7, data="validation", unigram_entropy=6.5)
    write_evaluation(path, evaluation)
    assert read_evaluation(path) == json.loads(json.dumps(evaluation))
    assert set(evaluation) == {
        *("step", "data", "loss", "perplexity", "bits_per_byte", "tokens", "bytes", "routed_tokens"),
        *("unigram_entropy", "layers", "mean", "over_layers", "domains"),
    }
    assert {"layer", "gini", "gini_floor", "min_max", "load", "kept"} <= set(evaluation["layers"][0])
    assert [file.name for file in path.parent.iterdir()] == ["validation.json"]


def test_names_of_results_by_checkpoint(tmp_path: Path) -> None:
    names = [evaluation_path(tmp_path, "d/val", c).name for c in ("latest", "120", "runs/x/checkpoints/step_00000010")]
    assert names == ["val.json", "val-step_00000120.json", "val-step_00000010.json"]


def test_data_sets_of_one_last_name_have_results_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order, and however a data set is named, its next result replaces its own one only."""
    monkeypatch.chdir(tmp_path)
    result = EvaluationResult(loss=1.0, tokens=1, bytes=None, bits_per_byte=None, routed_tokens=1, layers=[])

    def put(data: str, kind: str = "") -> str:
        path = evaluation_path(tmp_path / "run", data, kind=kind)
        write_evaluation(path, result.to_json(data=data))
        return path.name

    there = tmp_path / "run" / "evaluation"
    assert [put(name) for name in ("a/val", "b/val", "x/b/val")] == ["val.json", "b-val.json", "x-b-val.json"]
    assert put("c/val", "-documents") == "val-documents.json"
    again = ("a/val", "b/val", "b/./val", "b/val_text_document", str(tmp_path / "a/val"))
    assert [put(name) for name in again] == ["val.json", "b-val.json", "b-val.json", "b-val.json", "val.json"]
    assert put("d/val-documents") == "d-val-documents.json"
    (there / "val.json").unlink()
    assert put("b/val") == "b-val.json" and put("e/val") == "val.json"
    assert [put(label) for label in ("a/x + a/y", "a/x + a/z", "a/x + a/y")] == [
        "validation.json",
        "validation-2.json",
        "validation.json",
    ]


def test_infinite_perplexity_is_null_in_the_file(tmp_path: Path) -> None:
    result = EvaluationResult(loss=800.0, tokens=1, bytes=None, bits_per_byte=None, routed_tokens=1, layers=[])
    assert result.perplexity == math.inf
    write_evaluation(tmp_path / "x.json", result.to_json())
    assert read_evaluation(tmp_path / "x.json")["perplexity"] is None


@pytest.mark.parametrize("text", ["{", "[]", '{"loss": 1}'])
def test_a_file_that_is_no_evaluation(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is no"):
        read_evaluation(tmp_path / "x.json")

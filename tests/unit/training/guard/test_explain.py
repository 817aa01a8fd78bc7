from __future__ import annotations

from moe_train.training.guard.explain import Documents, Place, text_of


def test_the_line_names_the_first_of_each() -> None:
    place = Place(ranks=[1], parameters=["decoder.layers.3.mlp.router.gate.weight", "embedding.weight"])
    documents = Documents({"data/demo/train": list(range(12))})
    assert text_of(place, documents) == (
        "the loss is not finite on data-parallel rank 1; gradients are not finite in "
        "decoder.layers.3.mlp.router.gate.weight and in 1 more; documents of train: 0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
    )
    assert text_of(Place(), Documents()) == ""

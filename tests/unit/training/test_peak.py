from __future__ import annotations

import pytest

from moe_train.training.peak import DENSE_BF16_TFLOPS, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_row_37_dense_peaks_by_device(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "Tesla V100-SXM2-32GB",  # no bfloat16
        "NVIDIA A10G",  # not an A10
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a slice
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD EPYC 7763 64-Core Processor",
        "cpu",
        "",
    ],
)
def test_row_37_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def test_no_sparse_figures() -> None:
    """The sheets' figures with sparsity of the largest entries are 1979 (Hopper) and 4500 or 5000 (Blackwell)."""
    assert max(tflops for _, tflops in DENSE_BF16_TFLOPS) < 2600
    assert all(tflops < 1000 for pattern, tflops in DENSE_BF16_TFLOPS if pattern.startswith("NVIDIA H"))

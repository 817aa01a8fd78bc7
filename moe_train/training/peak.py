"""Dense bfloat16 peak of known accelerators, the denominator of MFU.

Figures are those of the manufacturers' data sheets for DENSE matrices (sheets often print the figure with structured
sparsity, twice as high, first). The names are those that ``torch.cuda.get_device_name`` returns. Whatever is not
matched in full has no peak, and then there is no MFU: a wrong denominator is worse than none. MIG slices and laptop
variants carry a suffix and so have none.
"""

from __future__ import annotations

import re

_MEMORY = r"( \d+GB)?( HBM\d\w?)?"

DENSE_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"NVIDIA GB300", 2500.0),
    (r"NVIDIA GB200", 2500.0),
    (r"NVIDIA B300( SXM6 AC)?", 2250.0),
    (r"NVIDIA B200", 2250.0),
    (rf"NVIDIA GH200{_MEMORY}", 989.4),
    (r"NVIDIA H200 NVL", 835.5),
    (r"NVIDIA H200", 989.4),
    (r"NVIDIA H100 NVL", 835.5),
    (r"NVIDIA H100 PCIe", 756.0),
    (rf"NVIDIA H[18]00( SXM5)?{_MEMORY}", 989.4),
    (r"NVIDIA H20", 148.0),
    (rf"(NVIDIA )?A[18]00-(SXM4|SXM|PCIE|PCIe)-\d+GB{_MEMORY}", 312.0),
    (r"NVIDIA A100 80GB PCIe", 312.0),
    (r"NVIDIA A40", 149.7),
    (r"NVIDIA A30", 165.0),
    (r"NVIDIA A10", 125.0),
    (r"NVIDIA L40S", 362.05),
    (r"NVIDIA L40", 181.05),
    (r"NVIDIA L4", 121.0),
    (r"NVIDIA RTX 6000 Ada Generation", 364.25),
    (r"NVIDIA RTX A6000", 154.85),
    (r"NVIDIA GeForce RTX 5090", 209.5),
    (r"NVIDIA GeForce RTX 4090", 165.2),
    (r"NVIDIA GeForce RTX 3090", 71.0),
    (r"AMD Instinct MI355X", 2516.6),
    (r"AMD Instinct MI325X( .*)?", 1307.4),
    (r"AMD Instinct MI300X( .*)?", 1307.4),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, or None when the device is not known.

    >>> peak_flops("NVIDIA H100 PCIe")
    756000000000000.0
    """
    for pattern, tflops in DENSE_BF16_TFLOPS:
        if re.fullmatch(pattern, device_name.strip()):
            return tflops * 1e12
    return None

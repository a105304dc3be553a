"""Peak matrix throughput of GPUs, the reference of MFU. Imports no torch.

From the manufacturers' data sheets: bfloat16 with float32 accumulation, dense (without the factor of structured
sparsity), in 10¹² operations per second.
"""

from __future__ import annotations

PEAKS: dict[str, float] = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 5090": 209.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Part of the driver's name of a GPU -> its peak."""


NVLINK: dict[str, float] = {
    "GB200": 900.0,
    "B200": 900.0,
    "H200": 450.0,
    "GH200": 450.0,
    "H100": 450.0,
    "H800": 200.0,
    "H20": 450.0,
    "A100": 300.0,
    "A800": 200.0,
}
"""GPUs whose machines connect all of them by NVLink -> bytes per second of a GPU in one direction, in 10⁹; data sheets
name the sum of both directions."""
PCIE = 32.0
"""The same for GPUs without NVLink: PCIe 4.0 with 16 lanes."""


def peak_tflops(device_name: str) -> float | None:
    """The peak of a GPU by the name that its driver reports; None if it is not listed.

    The longest matching name counts: an H100 PCIe is not an H100.
    """
    words = device_name.replace("-", " ").split()
    fitting = [name for name in PEAKS if _contains(words, name.split())]
    return PEAKS[max(fitting, key=len)] if fitting else None


def _contains(words: list[str], wanted: list[str]) -> bool:
    """Whether `wanted` occurs in `words` as consecutive words."""
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))

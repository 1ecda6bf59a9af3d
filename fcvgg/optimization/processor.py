"""What arithmetic this processor has."""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Whether it computes in bfloat16, and oneDNN may use that (see ``ONEDNN_MAX_CPU_ISA``)."""
    return (_says("_is_avx512_bf16_supported") or has_amx()) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def has_amx() -> bool:
    """Whether it has tiles of AMX, which multiply matrices of bfloat16."""
    return _says("_is_amx_tile_supported")


def _says(name: str) -> bool:
    check = getattr(torch.cpu, name, None)
    return check is not None and bool(check())

"""Numbers in 16 bits: IEEE half precision, whose ten bits of fraction keep a core to 0.05 %."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from htcompress.storage.codec import Codec
from htcompress.vocabulary import HARMLESS


class Half(Codec):
    """float16, decoded to float32. A core beyond its range (6e-5 to 65,504, bar its smallest numbers) is left out."""

    name = "float16"
    bits = 16

    def encode(self, core: Tensor, scales: Tensor | None = None) -> dict[str, Tensor]:
        return {"": core.to(torch.float16)}

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return parts[""].to(torch.float32)

    def rounded(self, core: Tensor, scales: Tensor | None = None) -> Tensor:
        return core.to(torch.float16).to(core.dtype)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"": shape}

    def bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return 2 * torch.Size(shape).numel()

    def holds(self, core: Tensor) -> bool:
        """Whether rounding changes it by no more than half precision's own error."""
        wide = core.to(torch.float64)
        lost = torch.linalg.vector_norm(self.rounded(wide) - wide)
        return bool(lost <= HARMLESS * torch.linalg.vector_norm(wide))

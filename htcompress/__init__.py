"""Post-training compression of recurrent networks in Hierarchical Tucker form.

>>> import torch, htcompress
>>> result = htcompress.compress(torch.nn.LSTM(64, 32), budget=2000)
>>> y, (h, c) = result.model(torch.randn(5, 3, 64))
>>> tuple(y.shape)
(5, 3, 32)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htcompress.checks import Verdict, check
    from htcompress.compression import Compressed, compress, save, save_pretrained
    from htcompress.continuing import evaluate, finetune
    from htcompress.conversion import convert
    from htcompress.directory.pretrained import from_pretrained
    from htcompress.directory.read import load
    from htcompress.errors import HTCompressError
    from htcompress.exporting import Exported, export
    from htcompress.finetuning.checkpoints import Checkpoints
    from htcompress.finetuning.together import joined
    from htcompress.report import Report, read_report
    from htcompress.request import FineTuning, Goal
    from htcompress.vocabulary import Scope, UnitOrder

# Names are imported when they are used: `import htcompress` costs no torch.
_HOMES = {
    "Checkpoints": "htcompress.finetuning.checkpoints",
    "Compressed": "htcompress.compression",
    "Exported": "htcompress.exporting",
    "FineTuning": "htcompress.request",
    "Goal": "htcompress.request",
    "HTCompressError": "htcompress.errors",
    "Report": "htcompress.report",
    "Request": "htcompress.request",
    "Scope": "htcompress.vocabulary",
    "UnitOrder": "htcompress.vocabulary",
    "Verdict": "htcompress.checks",
    "check": "htcompress.checks",
    "compress": "htcompress.compression",
    "convert": "htcompress.conversion",
    "evaluate": "htcompress.continuing",
    "export": "htcompress.exporting",
    "finetune": "htcompress.continuing",
    "from_pretrained": "htcompress.directory.pretrained",
    "joined": "htcompress.finetuning.together",
    "load": "htcompress.directory.read",
    "read_report": "htcompress.report",
    "save": "htcompress.compression",
    "save_pretrained": "htcompress.compression",
}

__all__ = [
    "Checkpoints",
    "Compressed",
    "Exported",
    "FineTuning",
    "Goal",
    "HTCompressError",
    "Report",
    "Request",
    "Scope",
    "UnitOrder",
    "Verdict",
    "check",
    "compress",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "from_pretrained",
    "joined",
    "load",
    "read_report",
    "save",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'htcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

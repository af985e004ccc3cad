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
    from htcompress.checkpoint.directory import load
    from htcompress.errors import HTCompressError
    from htcompress.exporting import Exported, export
    from htcompress.finetuning.distill import FineTuning
    from htcompress.gate import Verdict, check
    from htcompress.pipeline import compress, convert, evaluate, finetune, save
    from htcompress.planning import Goal, Scope, UnitOrder
    from htcompress.report import Report, read_report
    from htcompress.stages import Compressed

# Names are imported when they are used: `import htcompress` costs no torch.
_HOMES = {
    "Compressed": "htcompress.stages",
    "Exported": "htcompress.exporting",
    "FineTuning": "htcompress.finetuning.distill",
    "Goal": "htcompress.planning",
    "HTCompressError": "htcompress.errors",
    "Report": "htcompress.report",
    "Scope": "htcompress.planning",
    "UnitOrder": "htcompress.planning",
    "Verdict": "htcompress.gate",
    "check": "htcompress.gate",
    "compress": "htcompress.pipeline",
    "convert": "htcompress.pipeline",
    "evaluate": "htcompress.pipeline",
    "export": "htcompress.exporting",
    "finetune": "htcompress.pipeline",
    "load": "htcompress.checkpoint.directory",
    "read_report": "htcompress.report",
    "save": "htcompress.pipeline",
}

__all__ = [
    "Compressed",
    "Exported",
    "FineTuning",
    "Goal",
    "HTCompressError",
    "Report",
    "Scope",
    "UnitOrder",
    "Verdict",
    "check",
    "compress",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "load",
    "read_report",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'htcompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

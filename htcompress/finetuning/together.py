"""The processes that fine-tune one model: this one alone, or all that a launcher has started.

Every exchange begins with a word from each process on how it fares, so that an error in one ends all of them with its
message, wherever they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from htcompress.errors import HTCompressError, RequestError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)
"""How long a process waits for the others: the first one may measure and write as long as it needs to. One that dies
is noticed at once."""


class Together(Protocol):
    """What processes that do the same work have to exchange.

    Attributes:
        count: how many they are.
        index: which of them this is; the first, 0, decides, writes and tells.
    """

    count: int
    index: int

    def gather(self, value: T) -> list[T]:
        """What every process gives, in their order; the same list for all. Small values: they are pickled."""
        ...

    def of_first(self, ask: Callable[[], T]) -> T:
        """What a function gives in the first process, the only one that calls it."""
        ...

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes, of equal shapes; the same bits for all."""
        ...

    def device(self, asked: str) -> str:
        """The device of this process, where so much was asked for: `cuda` is one GPU for each."""
        ...


class Alone:
    """One process, which has nobody to ask and nothing to import."""

    count, index = 1, 0

    def gather(self, value: T) -> list[T]:
        """The one value."""
        return [value]

    def of_first(self, ask: Callable[[], T]) -> T:
        """What the function gives."""
        return ask()

    def add(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def device(self, asked: str) -> str:
        """The device that was asked for."""
        return asked


_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where MPI says how many processes there are, which `accelerate launch` uses between machines without GPUs."""


def launched() -> int:
    """How many processes a launcher says that there are; 1 without a launcher."""
    names = ("WORLD_SIZE",) if "RANK" in os.environ else _MPI if "ACCELERATE_MIXED_PRECISION" in os.environ else ()
    sizes = [os.environ[name] for name in names if os.environ.get(name, "").isdecimal()]
    return max(1, int(sizes[0])) if sizes else 1


def forgotten() -> bool:
    """Whether `accelerate launch` was asked for several processes and, finding no GPUs, has started this one alone."""
    return "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and launched() == 1


@contextmanager
def joined(device: str = "cpu") -> Iterator[Together]:
    """All processes that `accelerate launch` or `torchrun` has started, or this one alone where there is no launcher.

    Once in a process: several calls may share the block, and all processes leave it together. Where one of them fails,
    all do: the first process raises its error, the others `SystemExit` with the same exit code.

    Args:
        device: where the model will run; GPUs talk by NCCL, everything else by gloo.

    Raises:
        RequestError: there are several processes, and Accelerate is not installed or cannot join them.
        HTCompressError: of another process.
    """
    if launched() == 1:
        yield Alone()
        return
    processes = _Processes(device)
    try:
        yield processes
        processes.gather(None)
    except Exception as error:
        raised, code = processes.told(error)
        processes.part()
        if processes.index > 0 and not isinstance(error, _LostError):
            raise SystemExit(code) from error
        if raised is error:
            raise
        raise raised from error
    processes.part()


@dataclass(frozen=True)
class _Failure:
    """The end of a process, as others are told."""

    process: int
    text: str
    exit_code: int


class _ElsewhereError(HTCompressError):
    """An error that other processes know of already."""

    def __init__(self, failure: _Failure) -> None:
        super().__init__(failure.text)
        self.exit_code = failure.exit_code


class _LostError(HTCompressError):
    """A process that can no longer be reached."""


class _Processes:
    """The processes of a launch, by way of Hugging Face Accelerate.

    Gradients are added as one vector, not by `DistributedDataParallel`: what is trained are not always the model's own
    parameters (`TrainedNumbers`), some take no part in a step, and a process may have no batch left in the last step
    of a pass. A vector with zeros in it has none of these cases.
    """

    def __init__(self, device: str) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs, gather_object
        except ImportError as error:
            raise RequestError(
                f"This is one of {launched()} processes that a launcher has started, and they fine-tune together by "
                f"Hugging Face Accelerate: {error}. Install it with: pip install 'htcompress[accelerate]'. To run by "
                f"itself, start it without accelerate launch or torchrun."
            ) from error
        found = torch.distributed.is_available() and torch.distributed.is_initialized()
        try:
            self._accelerator = Accelerator(
                cpu=not (device.startswith("cuda") and torch.cuda.is_available()),
                mixed_precision="no",
                kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
            )
        except Exception as error:
            raise RequestError(
                f"The {launched()} processes cannot be joined: {error}. Start them with accelerate launch or torchrun."
            ) from error
        self._gather_object = gather_object
        self._own = not found
        self.count, self.index = self._accelerator.num_processes, self._accelerator.process_index

    def gather(self, value: T) -> list[T]:
        """What every process gives; raises the error of one that has failed."""
        found = self._exchanged(value)
        failures = [one for one in found if isinstance(one, _Failure)]
        if failures:
            raise _ElsewhereError(failures[0])
        return found

    def of_first(self, ask: Callable[[], T]) -> T:
        """What the function gives in the first process."""
        found: Any = self.gather(ask() if self.index == 0 else None)[0]
        return found

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        self.gather(None)
        try:
            added = self._accelerator.reduce(tensor, reduction="sum")
        except RuntimeError as error:
            raise _lost(error) from error
        return added

    def device(self, asked: str) -> str:
        """The GPU that this process has been given, where GPUs were asked for."""
        if not asked.startswith("cuda:"):
            return str(self._accelerator.device) if asked == "cuda" and torch.cuda.is_available() else asked
        raise RequestError(f"Each of {self.count} processes takes a GPU of its own; give --device cuda, not {asked}.")

    def told(self, error: Exception) -> tuple[Exception, int]:
        """Let the others know what ends this process; what the first of all is to raise, and the exit code of all."""
        own = getattr(error, "exit_code", 2)
        if isinstance(error, _ElsewhereError | _LostError):
            return error, own
        kind = "" if isinstance(error, HTCompressError) else f"unexpected {type(error).__name__}: "
        text = f"in process {self.index} of {self.count}: {kind}{error}"
        try:
            found = self._exchanged(_Failure(self.index, text, own))
        except _LostError:
            return error, own
        first = next(one for one in found if isinstance(one, _Failure))
        return (error if first.process == self.index else _ElsewhereError(first)), first.exit_code

    def part(self) -> None:
        """Close what connects the processes, where it is still there and not the caller's."""
        with suppress(RuntimeError):
            if self._own and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def _exchanged(self, value: Any) -> list[Any]:
        try:
            return list(self._gather_object([value]))
        except RuntimeError as error:
            raise _lost(error) from error


def _lost(error: Exception) -> _LostError:
    reason = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0]).split(". ")[0]
    return _LostError(
        f"another process of this run has ended without a word ({reason}). Look at its messages; "
        f"with --checkpoint-every, --resume goes on from the last checkpoint."
    )

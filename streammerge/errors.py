"""Every error that streammerge raises on purpose, one tree.

StreammergeError
├── RefusedError                 before any work: nothing was written; exit code 2
│   ├── RecipeError              an option is wrong, missing, or does not go with another
│   │   └── RecipeFileError      a recipe file cannot be read, or says what is not known
│   ├── AdapterError             one adapter cannot be used
│   │   ├── MissingFileError     a file that the adapter needs is not there
│   │   ├── CorruptFileError     a file is not what its name or its header says
│   │   ├── UnsupportedAdapterError   a format or variant known by name, but not merged
│   │   ├── HubError             it cannot be had from the Hugging Face Hub
│   │   ├── UnknownScalingError  the config cannot explain the rank of a tensor
│   │   └── ExtraTensorsError    tensors that are not LoRA factors, and no choice what to do
│   ├── IncompatibleError        adapters that do not fit together
│   ├── BudgetError              the merge cannot be done inside the allowed memory
│   ├── ClusterError             the cluster cannot be reached, or its workers cannot do it
│   ├── DiskSpaceError           the output or the scratch does not fit its disk
│   ├── OutputExistsError        something lies at the output's name
│   ├── OutputBusyError          another merge is writing to the same output
│   ├── UnfinishedError          an unfinished merge lies there, and nothing was said of it
│   └── ResumeError              what would be gone on with is not what was begun
├── MergeFailedError             during the work: the output's name is untouched; exit code 1
│   ├── NonFiniteError           NaN or infinity in an input tensor
│   ├── UnlikeExtrasError    tensors that are no factors and no numbers to average differ
│   ├── ComputeOverflowError     a target's values leave the range of the compute dtype
│   ├── BroughtRuleError         a rule that another distribution brings has failed
│   ├── OutputOverflowError      a merged value does not fit the output's dtype
│   ├── ClampError               the clamp's quantile is negative on this target
│   ├── MemoryExhaustedError     an allocation failed although the plan fitted the budget
│   ├── WorkerError              a cluster or a worker of it was lost, or is not like the others
│   ├── InputChangedError        an input file is not the one that was planned with
│   ├── InputUnreadableError     an input file could not be read during the run
│   └── StorageError             the output could not be written
├── StoppedError                 at the time limit; what is done is kept; exit code 75
├── PushError                    an output could not be brought to the Hub; exit code 1
├── PublishedError               what was to be gone on with is done; exit code 0
└── VerificationError            an output's bytes are not those that were recorded; exit code 1
"""

from __future__ import annotations

import math
import reprlib
import shlex
from typing import Any


def printable(text: object) -> str:
    """Return text on one line and without control characters: names in files may hold escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shorten(value: object) -> str:
    """Return the repr of a value out of a file, which may be of any size and depth."""
    short = reprlib.Repr()
    short.maxstring, short.maxlong, short.maxother, short.maxlevel = 200, 40, 40, 3
    return short.repr(value)


class StreammergeError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message, safe to print: a traceback sends it to a terminal as it is."""
        return printable(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of a cluster send them; Exception's own way calls the class with the message.
        return _remake, (type(self), self.args, vars(self))


def _remake(
    kind: type[StreammergeError], args: tuple[Any, ...], facts: dict[str, Any]
) -> StreammergeError:
    # OSError has a memory layout of its own, which only its own __new__ makes.
    error = (OSError if issubclass(kind, OSError) else Exception).__new__(kind, *args)
    error.args = args
    vars(error).update(facts)
    return error


class RefusedError(StreammergeError):
    """Refused before any work; nothing was written."""

    exit_code = 2


class RecipeError(RefusedError, ValueError):
    """An option is wrong, missing, or does not go with another.

    Attributes:
        option: name of the option at fault, as in the Python call.
    """

    def __init__(self, message: str, *, option: str) -> None:
        super().__init__(message)
        self.option = option


class RecipeFileError(RecipeError):
    """A recipe file cannot be read, or says what is not known.

    Attributes:
        path: the file.
        line: where in it, from 1; None where it is no one line.
    """

    def __init__(self, message: str, *, path: str, line: int | None = None) -> None:
        where = path if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {message}", option="recipe")
        self.path = path
        self.line = line


class AdapterError(RefusedError, ValueError):
    """One adapter cannot be used.

    Attributes:
        path: the directory or file at fault.
        tensor: the tensor's full name in the file, or None.
    """

    def __init__(self, message: str, *, path: str, tensor: str | None = None) -> None:
        where = f"{path}: {tensor}" if tensor else path
        super().__init__(f"{where}: {message}")
        self.path = path
        self.tensor = tensor


class MissingFileError(AdapterError, FileNotFoundError):
    """A file that the adapter needs is not there."""


class CorruptFileError(AdapterError):
    """A file is not what its name or its header says."""


class UnsupportedAdapterError(AdapterError):
    """A format or variant that is known by name, but not merged.

    Attributes:
        variant: its name, such as "DoRA".
    """

    def __init__(self, message: str, *, path: str, variant: str, tensor: str | None = None) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.variant = variant


class HubError(AdapterError):
    """An adapter cannot be had from the Hugging Face Hub.

    Attributes:
        reason: "id" (what was written names nothing), "repository" (there is none, or it is
            private), "gated", "revision", "file", "token" (refused), "offline" (not in the cache),
            "busy" (too many requests), "network", "format" (cannot be streamed) or "disk".
    """

    def __init__(self, message: str, *, path: str, reason: str) -> None:
        super().__init__(message, path=path)
        self.reason = reason


class UnknownScalingError(AdapterError):
    """The config cannot explain the rank of a tensor, so its scaling is unknown.

    Attributes:
        declared_rank: the rank that the config gives this module, None without a config.
        found_rank: the rank of the tensor.
    """

    def __init__(
        self, message: str, *, path: str, tensor: str, declared_rank: int | None, found_rank: int
    ) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.declared_rank = declared_rank
        self.found_rank = found_rank


class ExtraTensorsError(AdapterError):
    """The file holds tensors that are not LoRA factors, and no choice was made about them.

    Attributes:
        names: all of them.
    """

    def __init__(self, message: str, *, path: str, names: tuple[str, ...]) -> None:
        super().__init__(message, path=path)
        self.names = names


class IncompatibleError(RefusedError, ValueError):
    """Adapters that do not fit together.

    Attributes:
        target: the target module, or None where the whole adapters disagree.
        paths: the adapters that disagree.
    """

    def __init__(self, message: str, *, target: str | None, paths: tuple[str, ...]) -> None:
        super().__init__(message)
        self.target = target
        self.paths = paths


class BudgetError(RefusedError):
    """The merge cannot be done inside the allowed memory.

    Attributes:
        target: the target that needs most.
        projected_bytes: what that target's task holds at least, above the reserved bytes.
        allowed_bytes: what was allowed for the whole process.
        smallest_bytes: the smallest budget that works.
    """

    def __init__(
        self,
        message: str,
        *,
        target: str,
        projected_bytes: int,
        allowed_bytes: int,
        smallest_bytes: int,
    ) -> None:
        super().__init__(message)
        self.target = target
        self.projected_bytes = projected_bytes
        self.allowed_bytes = allowed_bytes
        self.smallest_bytes = smallest_bytes


class ClusterError(RefusedError):
    """The cluster cannot be reached, or its workers cannot do this merge.

    Attributes:
        worker: address of the worker at fault, None where it is none of them.
    """

    def __init__(self, message: str, *, worker: str | None = None) -> None:
        super().__init__(f"worker {worker}: {message}" if worker else message)
        self.worker = worker


class DiskSpaceError(RefusedError):
    """The output or the scratch does not fit its disk.

    Attributes:
        path: where it was to go.
        needed_bytes: what it takes.
        free_bytes: what is free there.
    """

    def __init__(self, *, path: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{path}: {needed_bytes} bytes are needed here, {free_bytes} are free; make room or "
            "choose another disk"
        )
        self.path = path
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class OutputExistsError(RefusedError, FileExistsError):
    """Something lies at the output's name."""


class OutputBusyError(RefusedError):
    """Another merge is writing to the same output."""


class UnfinishedError(RefusedError):
    """An unfinished merge lies beside the output, and nothing was said of what to do with it.

    Attributes:
        path: the output.
        done: how many targets it has finished.
    """

    def __init__(self, *, path: str, done: int) -> None:
        super().__init__(
            f"{path}: an unfinished merge into it is there, with {done} targets done; go on with "
            "it (--resume), or begin anew (--overwrite)"
        )
        self.path = path
        self.done = done


class ResumeError(RefusedError):
    """What would be gone on with is not what was begun.

    Attributes:
        path: the output.
        changes: one sentence for each thing that has changed.
    """

    def __init__(self, *, path: str, changes: tuple[str, ...]) -> None:
        super().__init__(
            f"{path}: the unfinished merge into it cannot be gone on with: {'; '.join(changes)}. "
            "Undo that, or begin anew (--overwrite)"
        )
        self.path = path
        self.changes = changes


class MergeFailedError(StreammergeError):
    """The work failed; nothing lies at the output's name that was not there before."""

    resumable = True
    """Whether the same merge can go on from what is done, once what stood in its way is gone."""


class StoppedError(StreammergeError):
    """Stopped at the time limit; what is done is kept, and the same merge can go on from it.

    Attributes:
        done: how many targets are finished.
        targets: of so many.
    """

    exit_code = 75

    def __init__(self, message: str, *, done: int, targets: int) -> None:
        super().__init__(f"{message}: {done} of {targets} targets are done and kept")
        self.done = done
        self.targets = targets


class NonFiniteError(MergeFailedError, ValueError):
    """NaN or infinity in an input tensor, or a float64 number beyond the compute dtype.

    Attributes:
        path: the file.
        tensor: the tensor's full name in it.
        value: "NaN", "infinity", or the number.
    """

    resumable = False

    def __init__(self, *, path: str, tensor: str, value: float) -> None:
        name = "NaN" if math.isnan(value) else "infinity"
        what = f"{name}; a merge would spread it over the whole target. Leave this adapter out"
        if math.isfinite(value):
            name = f"{value:g}"
            what = f"{name}, which float32 cannot hold; use compute dtype float64"
        super().__init__(f"{path}: {tensor}: holds {what}, or repair it")
        self.path = path
        self.tensor = tensor
        self.value = name


class UnlikeExtrasError(MergeFailedError, ValueError):
    """Tensors of whole numbers and the like are not the same, so that they have no mean.

    Attributes:
        tensor: the tensor's full name.
        paths: two files that hold different ones.
    """

    resumable = False

    def __init__(self, *, tensor: str, paths: tuple[str, str], dtype: str) -> None:
        super().__init__(
            f"{tensor}: holds {dtype}, of which there is no mean, and differs between {paths[0]} "
            f"and {paths[1]}; choose --extras first or drop"
        )
        self.tensor = tensor
        self.paths = paths


class ComputeOverflowError(MergeFailedError, OverflowError):
    """A target's values leave the range of the compute dtype.

    Attributes:
        target: the target module.
    """

    resumable = False

    def __init__(self, *, target: str, dtype: str) -> None:
        super().__init__(
            f"{target}: the merge leaves the range of {dtype} on the way to its factors; weights, "
            "scalings or factors are extremely large. Check them, or use compute dtype float64"
        )
        self.target = target


class BroughtRuleError(MergeFailedError):
    """A rule that another distribution brings has failed; the cause says how.

    Attributes:
        rule: its name.
        origin: the distribution, and its version.
        target: the module's path.
    """

    def __init__(self, why: str, *, rule: str, origin: str, target: str) -> None:
        super().__init__(f"rule {rule} of {origin} has failed on {target}: {why}")
        self.rule = rule
        self.origin = origin
        self.target = target


class OutputOverflowError(MergeFailedError, OverflowError):
    """A merged value does not fit the output's dtype.

    Attributes:
        tensor: the output tensor's full name.
        value: the largest magnitude that was to be written.
        dtype: the output's dtype.
    """

    resumable = False

    def __init__(self, *, tensor: str, value: float, dtype: str) -> None:
        super().__init__(
            f"{tensor}: a merged value of magnitude {value:.6g} does not fit {dtype}; "
            "ask for another output dtype (bfloat16 or float32)"
        )
        self.tensor = tensor
        self.value = value
        self.dtype = dtype


class ClampError(MergeFailedError, ValueError):
    """The clamp's quantile is negative on a target, so that no interval is left.

    Attributes:
        target: the target module.
        quantile: the quantile asked for.
        limit: its value on this target.
    """

    resumable = False

    def __init__(self, *, target: str, quantile: float, limit: float) -> None:
        super().__init__(
            f"{target}: the {quantile:g}-quantile of the factors' entries is {limit:.6g}; a clamp "
            "needs a positive one. Choose a larger clamp (0.99 is usual)"
        )
        self.target = target
        self.quantile = quantile
        self.limit = limit


class MemoryExhaustedError(MergeFailedError, MemoryError):
    """An allocation failed although the plan fitted the budget.

    Attributes:
        target: the target whose task it was.
        projected_bytes: what that task had promised to hold at most.
    """

    def __init__(self, *, target: str, projected_bytes: int) -> None:
        super().__init__(
            f"{target}: the system refused memory to a task that holds at most "
            f"{projected_bytes} bytes; something else has taken it, or a limit on this process is "
            "below --max-memory. Lower --max-memory or --workers"
        )
        self.target = target
        self.projected_bytes = projected_bytes


class WorkerError(MergeFailedError):
    """A cluster was lost, or a worker again and again with a task, or is not like the others.

    Attributes:
        worker: its address, None where it is not one of them.
        targets: the targets that it was to merge.
    """

    def __init__(
        self, message: str, *, worker: str | None = None, targets: tuple[str, ...] = ()
    ) -> None:
        more = f" and {len(targets) - 1} more" if len(targets) > 1 else ""
        who = [f"worker {worker}"] if worker else []
        what = [f"{targets[0]}{more}"] if targets else []
        super().__init__(": ".join([*filter(None, [", ".join([*what, *who])]), message]))
        self.worker = worker
        self.targets = targets


class InputChangedError(MergeFailedError):
    """An input file is not the one that was planned with.

    Once it is back as it was, the merge can be gone on with.

    Attributes:
        path: the file.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class InputUnreadableError(MergeFailedError, OSError):
    """An input file could not be read during the run.

    Attributes:
        path: the file.
        reason: of a file on the Hub, as `HubError` has it; None of one on this machine.
    """

    def __init__(self, message: str, *, path: str, reason: str | None = None) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.reason = reason


class StorageError(MergeFailedError, OSError):
    """The output could not be written.

    Attributes:
        path: the file.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class PushError(StreammergeError):
    """An output could not be brought to the Hub; it stays where it is.

    Attributes:
        repo: where it was to go.
        output: the output's directory.
        status: what the Hub answered, None where it did not.
    """

    def __init__(self, message: str, *, repo: str, output: str, status: int | None = None) -> None:
        again = " ".join(["streammerge", "push", *map(shlex.quote, (output, repo))])
        super().__init__(
            f"{repo}: {message}. {output} stays as it is; once that is settled, `{again}` goes on, "
            "and what the Hub has already is not sent again"
        )
        self.repo = repo
        self.output = output
        self.status = status


class PublishedError(StreammergeError):
    """The merge that was to be gone on with has been published: nothing is left to do.

    It was killed while it cleared up, which has been done now.

    Attributes:
        path: the output.
    """

    exit_code = 0

    def __init__(self, *, path: str) -> None:
        super().__init__(
            f"{path}: is what this merge has made; it was only cut off while it cleared up, which "
            "has been done now"
        )
        self.path = path


class VerificationError(StreammergeError):
    """An output's bytes are not those that were recorded when it was written.

    Attributes:
        path: the output directory.
        problems: one sentence for each thing that is wrong.
    """

    def __init__(self, *, path: str, problems: tuple[str, ...]) -> None:
        super().__init__(f"{path}: " + "; ".join(problems))
        self.path = path
        self.problems = problems

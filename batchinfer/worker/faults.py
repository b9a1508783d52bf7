"""What an error that ends a rank says of other tries: the exit code by which its job knows whether to try again.

Only errors that cannot be anything else are called hopeless. What may have been a passing trouble of a file system, of memory or
of a device is not, nor what the rows at work may have brought about.
"""

from __future__ import annotations

from pathlib import Path

from batchinfer.config import ConfigError
from batchinfer.data.reader import InputChanged, InputUnreadable
from batchinfer.job.manifest import OtherWeights
from batchinfer.job.replica import FAILED, FULL, HOPELESS
from batchinfer.job.room import LASTING, no_space

# What fails for these reasons says nothing of the rows that were at work.
OUTSIDE = (OSError, ConfigError, InputChanged, InputUnreadable, OtherWeights)
# Of CUDA, which has no types for them: the driver is older than PyTorch needs, the GPU newer or older than the kernels.
UNFIT_DEVICE = (
    "driver version is insufficient",
    "driver on your system is too old",
    "no kernel image is available",
    "unsupported toolchain",
    "forward compatibility was attempted",
    "invalid device ordinal",
    "no CUDA-capable device is detected",
)


def exit_code(error: BaseException, run: Path) -> int:
    """FULL: there is no space for the run's own files. HOPELESS: as long as the request, its files and this node are what they
    are, every try ends here. FAILED: another try may do."""
    if isinstance(error, OSError):
        return _of_system(error, run)
    if isinstance(error, InputUnreadable):
        cause = error.__cause__
        passing = isinstance(cause, OSError) and cause.errno is not None and cause.errno not in LASTING
        return FAILED if passing else HOPELESS
    if isinstance(error, ConfigError | InputChanged | OtherWeights):
        return HOPELESS
    return HOPELESS if any(words in str(error) for words in UNFIT_DEVICE) else FAILED


def _of_system(error: OSError, run: Path) -> int:
    if no_space(error) and error.filename is not None and Path(str(error.filename)).is_relative_to(run):
        return FULL
    return HOPELESS if error.errno in LASTING else FAILED


def sentence(error: BaseException) -> str:
    """For users: their own mistakes need no name of a type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"

"""The errors of distadam.

    DistAdamError
    ├── ConfigError(ValueError)         an argument, policy or parameter cannot be used
    ├── UsageError(RuntimeError)        calls in an order or at a place that cannot be right
    ├── RankMismatchError(RuntimeError) ranks disagree about what they are about to do
    ├── CommError(RuntimeError)         a collective failed or timed out
    ├── NonFiniteError(RuntimeError)    a norm that was asked to be finite is not
    ├── CheckFailed(AssertionError)     a check of distadam.diagnostics found something wrong
    └── CheckpointError(RuntimeError)   state that cannot be loaded
        ├── IncompleteCheckpoint
        ├── CorruptShard
        └── LayoutMismatch              local state of another rank or layout
    MissingDependency(ImportError)      an optional package is absent; says the install command

Every message says what was expected, what came, where (parameter, bucket, group, rank) and what to do.
"""


class DistAdamError(Exception):
    """Base of every error that distadam raises on purpose."""


class ConfigError(DistAdamError, ValueError):
    """An argument, policy or parameter cannot be used."""


class UsageError(DistAdamError, RuntimeError):
    """Calls in an order or at a place that cannot be right."""


class RankMismatchError(DistAdamError, RuntimeError):
    """Ranks disagree about what they are about to do."""


class CommError(DistAdamError, RuntimeError):
    """A collective failed or did not finish in time."""


class NonFiniteError(DistAdamError, RuntimeError):
    """A gradient norm that had to be finite is NaN or Inf."""


class CheckFailed(DistAdamError, AssertionError):
    """A check of `distadam.diagnostics` found something wrong; the message is its report."""


class CheckpointError(DistAdamError, RuntimeError):
    """State that cannot be loaded."""


class IncompleteCheckpoint(CheckpointError):
    """A checkpoint without its commit marker, or with a file missing."""


class CorruptShard(CheckpointError):
    """A checkpoint file whose bytes are not those that were written."""


class LayoutMismatch(CheckpointError):
    """Local state that was taken on another rank or from another layout."""


class MissingDependency(DistAdamError, ImportError):
    """An optional package is absent; the message says the install command."""

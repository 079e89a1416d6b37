"""The exception tree.

    MpiFedLoraError
    |-- ConfigError       (ValueError)       a run file, an option or a launch that cannot work
    |-- DataError         (ValueError)       data that is missing or not what the run file says
    |-- AdapterError      (ValueError)       base model, target modules, adapter files
    |-- AggregationError  (ArithmeticError)  updates that cannot be combined
    |-- ProtocolError     (RuntimeError)     processes that disagree, messages out of order
    |-- TrainingError     (RuntimeError)     a client's local training
    |-- WorkerLost        (RuntimeError)     a worker has died, the others live on
    |-- RunLost           (RuntimeError)     nobody is left to go on with; the run can be resumed
    `-- CheckpointError   (OSError)          state on disk that cannot be written or read back

Every message says what must hold, what was got, where, and what to do.
"""


class MpiFedLoraError(Exception):
    """Base of every error that mpifedlora raises on purpose."""


class ConfigError(MpiFedLoraError, ValueError):
    """A run file, an option or a launch that cannot work."""


class DataError(MpiFedLoraError, ValueError):
    """Data that is missing or is not what the run file says."""


class AdapterError(MpiFedLoraError, ValueError):
    """A base model, target module or adapter file that does not fit."""


class AggregationError(MpiFedLoraError, ArithmeticError):
    """Client updates that cannot be combined."""


class ProtocolError(MpiFedLoraError, RuntimeError):
    """Processes that disagree, or a message that is not the expected one."""


class TrainingError(MpiFedLoraError, RuntimeError):
    """A failure in one client's local training."""


class WorkerLost(MpiFedLoraError, RuntimeError):
    """A worker has died, and the others live on: the transport can be repaired."""


class RunLost(MpiFedLoraError, RuntimeError):
    """The server, or the last worker, has died: the run ends here and can be resumed."""


class CheckpointError(MpiFedLoraError, OSError):
    """State on disk that cannot be written or read back."""

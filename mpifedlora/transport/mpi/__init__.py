"""The transport over MPI collectives: the only place that knows MPI.

MPI rank 0 is the server, rank i is worker i - 1. Messages go as raw bytes: bfloat16 and other types
that MPI lacks need no special case, and nothing is pickled.

Every step begins with an *order* of the server, a fixed-size record that says what comes next: a plan and
its message, the rows as they are, their sum, or the rows in parts while the next message goes out.
"""

from mpifedlora.transport.mpi.joining import Communicator, connect, is_launched
from mpifedlora.transport.mpi.server import MpiServer
from mpifedlora.transport.mpi.survival import is_fault_tolerant
from mpifedlora.transport.mpi.worker import MpiWorker

__all__ = ["Communicator", "MpiServer", "MpiWorker", "connect", "is_fault_tolerant", "is_launched"]

"""How buffers cross between processes: MPI, and its twin in one process."""

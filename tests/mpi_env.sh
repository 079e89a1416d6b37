# Sourced: how the Makefile and the tests call mpirun on one machine, whatever its number of cores.

# The Makefile's environment, unless the caller has activated another one.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi

# Open MPI refuses to run as root, as in most containers, unless told twice.
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe # five processes on two cores are fine
export PRTE_MCA_hwloc_default_binding_policy=none           # the scheduler places them better
export OMPI_MCA_mpi_yield_when_idle=1                       # who waits leaves its core to who trains

#!/usr/bin/env bash
# Start a distadam training script with mpiexec: MPICH's, Intel MPI's or Open MPI's.
#
#   NPROC=2 launch/mpirun.sh examples/train_gpt.py --steps 200               two ranks on this host
#   NPROC=16 MPIEXEC_ARGS="--hostfile hosts" PHASES=/shared/run7 launch/mpirun.sh train.py
#
# distadam.init_process_group() finds MPI and takes the mpi4py backend, or NCCL where there are GPUs. mpiexec and PYTHON's
# mpi4py must belong to the same MPI library; the job refuses to start where they do not. When a rank fails, the launcher
# ends the job, and this script says which rank ended first, and what each one had started last. Every setting is an
# environment variable with a default; DRY_RUN=1 shows the command and does not run it.
set -euo pipefail

if (($# == 0)); then
  echo "usage: NPROC=N [MPIEXEC_ARGS=OPTIONS] $0 script.py [arguments]" >&2
  exit 2
fi

MPIEXEC="${MPIEXEC:-mpiexec}"
NPROC="${NPROC:-2}"                                 # ranks in all
PYTHON="${PYTHON:-python3}"                         # has distadam and mpi4py, on all hosts
read -ra options <<<"${MPIEXEC_ARGS:-}"             # more options of mpiexec, separated by spaces
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # threads of each rank
PHASES="${PHASES:-}"                                # where ranks note what they do: on several hosts, a shared folder
[[ -n "$PHASES" ]] || { PHASES="$(mktemp -d)" && trap 'rm -rf "$PHASES"' EXIT; }
mkdir -p "$PHASES"
rm -f "$PHASES"/phase.* "$PHASES"/exit.*
export DISTADAM_PHASES="$PHASES"

# glibc would give large freed blocks back to the kernel, and every gradient of every step would be page faults.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4000000000}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8000000000}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"

# Open MPI binds up to two ranks to one core each, and the thread that moves messages must not share it with the one that
# computes. It hands no variables on to other hosts unless told; MPICH hands on all.
if "$MPIEXEC" --version 2>/dev/null | grep -qi "open mpi\|openrte"; then
  [[ " ${options[*]-} " == *" --bind-to "* ]] || options+=(--bind-to none)
  for name in DISTADAM_PHASES OMP_NUM_THREADS MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_; do
    options+=(-x "$name")
  done
fi

# Each rank runs under a shell that outlives it and keeps its exit code. "-m mpi4py" ends the job at an uncaught exception.
# shellcheck disable=SC2016 # that shell fills these in
keep='rank="${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${PMIX_RANK:-0}}}"
"$@" || { code=$?; end="$DISTADAM_PHASES/exit.$rank"
  [ -e "$end" ] || echo "$(date +%s.%N) $rank $code" > "$end"
  exit "$code"; }'
command=("$MPIEXEC" ${options[@]+"${options[@]}"} -n "$NPROC" bash -c "$keep" rank "$PYTHON" -m mpi4py "$@")
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
code=0
"${command[@]}" || code=$?
((code != 0)) || exit 0

first="$(cat "$PHASES"/exit.* 2>/dev/null | sort -n | awk 'NR == 1 {print $2}' || true)"
echo "mpirun.sh: the job failed, exit code $code; what each rank did last:" >&2
for ((rank = 0; rank < NPROC; rank++)); do
  ended="had not ended"
  if read -r _ _ status 2>/dev/null <"$PHASES/exit.$rank"; then
    ended="ended$([[ "$rank" != "$first" ]] || echo " first"), exit code $status"
    ((status <= 128)) || ended+=" (signal $((status - 128)))"
  fi
  phase="nothing of distadam"
  [[ ! -f "$PHASES/phase.$rank" ]] || phase="$(tr -d '\0' <"$PHASES/phase.$rank")"
  echo "mpirun.sh: rank $rank $ended; last started: $phase" >&2
done
exit "$code"

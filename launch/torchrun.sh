#!/usr/bin/env bash
# Start a distadam training script with torchrun, on one host or on many.
#
#   launch/torchrun.sh examples/train_gpt.py --steps 200                      one host, every core or GPU of it
#   NPROC=2 launch/torchrun.sh examples/train_gpt.py                          one host, two processes
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh train.py     on the first host (10.0.0.1)
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun.sh train.py     on the second
#
# Every setting is an environment variable with a default; DRY_RUN=1 shows the command and does not run it. The script
# gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from torchrun, and
# distadam.init_process_group() reads them. On one host, `distadam launch` does the same with more readable output.
set -euo pipefail

if (($# == 0)); then
  echo "usage: [NPROC=N] [NNODES=N NODE_RANK=R MASTER_ADDR=HOST] $0 script.py [arguments]" >&2
  exit 2
fi

# --- how many processes ---------------------------------------------------------------------------------------------

# Processes on this host: a number, or "auto": one for each accelerator, or for each core where there is none.
# One process drives one GPU. On CPU, fewer processes with more threads each are often faster than one for each core.
NPROC="${NPROC:-auto}"

# Hosts. All start this script with the same values, NODE_RANK and the addresses of their own aside.
NNODES="${NNODES:-1}"

# This host's number, 0 to NNODES - 1. Host 0 is the one at MASTER_ADDR; ranks are numbered by host. Left empty, the
# hosts agree on an order by themselves, which is what a scheduler that starts identical commands needs.
NODE_RANK="${NODE_RANK:-}"

# --- where they meet ------------------------------------------------------------------------------------------------

# Name or address of the first host, as every other host reaches it. With one host: loopback, nothing leaves the host.
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"

# A free TCP port on the first host, open between the hosts. With one host a free one is found and this is not read.
MASTER_PORT="${MASTER_PORT:-29500}"

# A name for the job. Two jobs that share a host and a port must not share a name.
JOB_ID="${JOB_ID:-distadam}"

# This host's own address, for hosts whose name does not resolve to an address that the others can reach (containers,
# network namespaces, several networks). Empty: torchrun asks the system.
LOCAL_ADDR="${LOCAL_ADDR:-}"

# --- when something fails -------------------------------------------------------------------------------------------

# How often all processes are started again after one has failed. A training script that does not resume from a
# checkpoint begins anew, so this is 0 unless yours does resume.
MAX_RESTARTS="${MAX_RESTARTS:-0}"

# A store for each start: with torchrun's default, processes that are started again find the addresses of those that are
# gone (https://github.com/pytorch/pytorch/issues/135712).
if ((MAX_RESTARTS > 0)); then export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"; fi

# Folder that keeps each rank's output and traceback. Empty: output goes to this terminal only.
LOG_DIR="${LOG_DIR:-}"

# --- threads and memory ---------------------------------------------------------------------------------------------

# Threads of each process. torchrun sets 1 when this is unset, which leaves cores idle where processes are fewer than
# cores. Here: the cores shared out, where NPROC is a number.
if [[ -z "${OMP_NUM_THREADS:-}" && "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
  cores="$(nproc)"
  OMP_NUM_THREADS=$((cores > NPROC ? cores / NPROC : 1))
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# glibc's allocator gives large freed blocks back to the kernel at once and has to ask for them again, one page fault for
# every 4 KB: on CPU that is every gradient of every step. These keep the memory in the process: blocks up to 4 GB come
# from the heap, up to 8 GB of free heap stay, and the heap grows by 256 MB.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4000000000}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8000000000}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"

# --- network (not set here; set them when the defaults pick the wrong card) -------------------------------------------
#
# GLOO_SOCKET_IFNAME   interface for gloo (CPU), for example eth0
# NCCL_SOCKET_IFNAME   interface for NCCL (GPU)
# NCCL_DEBUG=INFO      what NCCL found and chose

# --- go -------------------------------------------------------------------------------------------------------------

# The torchrun of the python that has distadam; PYTHON chooses another.
command=("${PYTHON:-python3}" -m torch.distributed.run --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS")
if ((NNODES == 1)); then
  command+=(--standalone)
else
  command+=(--nnodes "$NNODES" --rdzv-id "$JOB_ID")
  if [[ -n "$NODE_RANK" ]]; then
    command+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  else
    command+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT")
  fi
fi
if [[ -n "$LOCAL_ADDR" ]]; then command+=(--local-addr "$LOCAL_ADDR"); fi
if [[ -n "$LOG_DIR" ]]; then command+=(--log-dir "$LOG_DIR" --redirects 3 --tee 3); fi
command+=("$@")

if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"

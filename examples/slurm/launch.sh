# The common part of this folder's sbatch files, which source it: settings, launch, and what follows each exit code.
#
#   CONFIG      YAML file of the run                   DATA_PATH  data set, if it is not the configuration's
#   RUN_DIR     folder of the run, on a shared disk    PYTHON     interpreter
#   REPO        the repository, on a shared disk       MASTER_ADDR, MASTER_PORT  where the ranks meet
#   MAX_LOST    restarts after lost ranks without a new checkpoint in between
#   LINGER_S    seconds that ranks may outlive the first one that ends
CONFIG=${CONFIG:-$REPO/examples/demo_gpu.yaml}
RUN_DIR=${RUN_DIR:-$REPO/runs/$SLURM_JOB_NAME}
PYTHON=${PYTHON:-$REPO/.venv/bin/python}
MAX_LOST=${MAX_LOST:-3}
LINGER_S=${LINGER_S:-300}
LOGS=$RUN_DIR/slurm
mkdir -p "$LOGS" || exit 2
export REPO PYTHON

# --- Where the ranks meet: on the node of rank 0, at a port of this job's own, below the range that systems hand out
# to outgoing connections (32768 and up on Linux).
: "${MASTER_ADDR:=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
: "${MASTER_PORT:=$((10000 + SLURM_JOB_ID % 20000))}"
export MASTER_ADDR MASTER_PORT

# --- Threads: without this every rank starts as many OpenMP threads as the node has cores. torchrun sets 1, too.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# srun no longer takes --cpus-per-task over from sbatch (since Slurm 22.05).
[[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A rank that crashes in native code leaves the Python stack in its log.
export PYTHONFAULTHANDLER=1

# --- NCCL. Its defaults are good; uncomment a line for the reason it names.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # why a connection failed; INFO also tells which network was chosen
# Several network interfaces, and the ranks cannot find each other at start-up (NCCL_DEBUG=INFO shows the one taken).
# gloo carries the small messages between hosts and takes what the host's name resolves to: on systems that map it
# to 127.0.1.1 it needs the name of an interface, too.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# InfiniBand or RoCE adapters that belong to storage or management: name the ones to compute with.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7
# RoCE: the row of `show_gids` with RoCE v2 over IPv4.
# export NCCL_IB_GID_INDEX=3
# "IBV_WC_RETRY_EXC_ERR" on a large fabric whose routes change: wait longer (4.096 us * 2^22 = 17 s) before giving up.
# export NCCL_IB_TIMEOUT=22
# 3, torch's default, ends a rank whose collective failed or timed out; 0 would leave it hanging, never use that.
# export TORCH_NCCL_ASYNC_ERROR_HANDLING=3
# A hang: keep the last 2000 collectives of each rank and write them down at the time-out, to see who is missing.
# export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE=$LOGS/collectives_rank

say() { echo "$(date '+%F %T') $*"; }

# Slurm keeps the job's number and waits some two minutes (AuthInfo=cred_expire in slurm.conf) before the next start.
requeue() {
  say "$1: requeue"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  say "Slurm refuses to start this job again: stop; the same sbatch command resumes the run"
}

# A node that fails is worth a restart; a rank that fails at the same place each time must not restart for ever.
requeue_lost() {
  local newest times
  newest=$(cat "$RUN_DIR/checkpoints/latest" 2>/dev/null || echo none)
  echo "$newest" >>"$LOGS/lost_$SLURM_JOB_ID"
  times=$(grep -cxF -- "$newest" "$LOGS/lost_$SLURM_JOB_ID")
  if ((times <= MAX_LOST)); then
    requeue "$1, time $times of at most MAX_LOST=$MAX_LOST since checkpoint '$newest'"
  else
    say "$1, more than MAX_LOST=$MAX_LOST times since checkpoint '$newest': stop; see $LOGS"
  fi
}

# One task per GPU and no torchrun in between: signals reach the ranks, and their exit codes come back. torchrun turns
# each code into 1, gives ranks 30 s after SIGTERM, and dies of SIGUSR1 unless --signals_to_handle names it.
# --kill-on-bad-exit=0 with --wait: =1 would send SIGTERM to ranks that are on their way out as soon as the first one
# returns 4, and the step's code would become that of the signal. So the others get LINGER_S to end by themselves,
# with the same code, or with 5 when they notice that a rank is gone. Then srun kills them.
# No --gpus-per-task: a rank picks GPU number LOCAL_RANK, and NCCL copies directly between GPUs that both ranks see.
say "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
  "$SLURM_NTASKS ranks, meeting at $MASTER_ADDR:$MASTER_PORT; run $RUN_DIR"
errors=$LOGS/${SLURM_JOB_NAME}_${SLURM_JOB_ID}_start${SLURM_RESTART_COUNT:-0}.log
code=0
srun --kill-on-bad-exit=0 --wait="$LINGER_S" --open-mode=append \
  --output="$LOGS/%x_%j_node%n_rank%t.log" --error="$LOGS/%x_%j_node%n_rank%t.log" \
  bash "$REPO/examples/slurm/rank.sh" --config "$CONFIG" --run-dir "$RUN_DIR" \
  ${DATA_PATH:+--data-path "$DATA_PATH"} "$@" 2>"$errors" || code=$?
cat "$errors"

# srun returns the highest code of all ranks; above 128 it is 128 + the signal that killed one (9: out of memory, or
# not gone after LINGER_S). A rank that ends with 2 or 3 knows the cause, where the others only see that it is gone (5).
cause=$(grep -oE 'Exited with exit code [23]$' "$errors" | grep -oE '[23]$' | head -n 1)
code=${cause:-$code}
case $code in
  0) say "done" ;;
  4) requeue "saved and stopped" ;;
  2) say "code 2, bad configuration: stop; see $LOGS" ;;
  3) say "code 3, damaged data or checkpoint: stop; see $LOGS" ;;
  5) requeue_lost "code 5, a rank was lost" ;;
  *)
    if ((code > 128 && code <= 128 + 64)); then
      requeue_lost "code $code, a rank was killed by SIG$(kill -l $((code - 128)))"
    else
      say "code $code, a bug: stop; see $LOGS"
    fi
    ;;
esac
exit "$code"

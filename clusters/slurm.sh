#!/bin/bash
# Slurm: forms a Ray cluster of the job's nodes, checks it, trains. From a folder that all nodes share:
#   sbatch --nodes=4 clusters/slurm.sh -c my.yaml ray.num_workers=4
#   sbatch --nodes=4 clusters/slurm.sh -c my.yaml ray.num_workers=4 --resume
#SBATCH --job-name=qlora-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300        # five minutes before the time is up: the run saves and ends
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# Each job has a cluster, a port and a token of its own.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(head -n 1 <<<"$nodes")
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$head_ip:$port" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

resources=(--num-cpus="${SLURM_CPUS_PER_TASK:-16}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
ulimit -n "$(ulimit -Hn)"

# --block keeps Ray in its Slurm step, so that Slurm ends it with the job. No `ray stop`: others may use these nodes.
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  ray start --head --block --node-ip-address="$head_ip" --port="$port" --include-dashboard=false "${resources[@]}" &
sleep 15
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes="$((SLURM_JOB_NUM_NODES - 1))" --ntasks-per-node=1 --exclude="$head" --overlap \
    ray start --block --address="$RAY_ADDRESS" "${resources[@]}" &
fi
for _ in $(seq 60); do
  alive=$(python -c 'import ray; ray.init(logging_level="ERROR"); print(len([n for n in ray.nodes() if n["Alive"]]))' 2>/dev/null || true)
  [ "$alive" = "$SLURM_JOB_NUM_NODES" ] && break
  sleep 5
done

doctor=()
for argument in "$@"; do [ "$argument" = --resume ] || doctor+=("$argument"); done
python -m qlora_ray.doctor "${doctor[@]}"

# Slurm's notice goes to this shell (B:): pass it on, and wait until the run has saved.
python -m qlora_ray.train "$@" &
run=$!
trap 'kill -TERM "$run"' TERM
while kill -0 "$run" 2>/dev/null; do wait "$run" && status=0 || status=$?; done
exit "$status"

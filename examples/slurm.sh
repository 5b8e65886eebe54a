#!/usr/bin/env bash
# Slurm: one job that scores and selects, one that trains on all GPUs of a node. A job that runs into its time limit
# is put into the queue again and goes on where it was.
#   SOURCE=... MODEL=... sbatch examples/slurm.sh             # filter, then start the training
#SBATCH --job-name=fifa
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=200G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=fifa-%j.log
set -euo pipefail
: "${SOURCE:?name the feedback}" "${MODEL:?name the model}"
OUT=${OUT:-$PWD/fifa-run}
GPUS=${SLURM_GPUS_ON_NODE:-1}
# two minutes before the limit: what is finished is on the disk already
trap 'scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1

read -ra score <<<"${SCORE:---executor ray --actors $GPUS --num-gpus 1 --num-cpus 6}"
fifa filter "$SOURCE" --margin "${MARGIN:-pickscore}" --quality "${QUALITY:-local}" --diversity "${DIVERSITY:-minilm}" \
  "${score[@]}" \
  --keep "${KEEP:-5000}" --out "$OUT/run" &
wait $!
# progress lines fit the log: one every ten seconds
read -ra train <<<"${TRAIN:---preset lora-small --draws 2}"
${LAUNCH:-accelerate launch --num_processes $GPUS -m fifa} train "$OUT/run" --model "$MODEL" "${train[@]}" \
  --out "$OUT/lora" &
wait $!

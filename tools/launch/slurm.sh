#!/bin/bash
# Distillation on GPUs under SLURM, one process per GPU:
#
#     sbatch tools/launch/slurm.sh --config flux --config.prompts=prompts.txt --config.out=/shared/runs/flux
#
# The arguments are those of `arcflow train`. Options of sbatch go before the script and override the lines below. Put
# model, prompts and run where all nodes reach them: on a shared file system, or in a bucket.
#
# At SIGTERM, training saves a checkpoint and exits with code 143. SIGTERM comes two minutes before the time limit, and
# when the partition preempts the job. The job then requeues itself, and the run resumes.

#SBATCH --job-name=arcflow
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

ARCFLOW=${ARCFLOW:-.venv/bin/arcflow}
PREEMPTED=143

trap '' TERM  # SIGTERM is for the tasks; this script must outlive them

# Without --kill-on-bad-exit: the first process that ends must not kill one that is still writing the checkpoint
srun --kill-on-bad-exit=0 --wait=300 "$ARCFLOW" train --xla-preset h100 "$@"
code=$?

if [ "$code" = "$PREEMPTED" ]; then
    echo "preempted: job $SLURM_JOB_ID goes into the queue again (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

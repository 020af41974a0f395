#!/bin/bash
# Distillation on a TPU slice as a queued resource: asks for the slice, waits for it, installs, trains, and asks again
# after a preemption. In a checkout, with gcloud logged in:
#
#     export NAME=arcflow ZONE=us-east5-a TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 PRESET=v5p
#     tools/launch/tpu_pod.sh --config flux:published --config.batch=64 --config.model=gs://BUCKET/flux \
#         --config.prompts=gs://BUCKET/prompts.txt --config.out=gs://BUCKET/runs/flux
#
# The arguments are those of `arcflow train`. TYPE counts TensorCores for v5p (v5p-128 is 64 chips), chips for v6e (with
# RUNTIME=v2-alpha-tpuv6e, PRESET=v6e). The default, KIND=--spot, may be preempted; KIND= asks for slices that may not.
set -euo pipefail

: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}" "${PRESET:?}"
KIND=${KIND---spot}
PREEMPTED=143
TPU=(gcloud compute tpus)

state() {
    "${TPU[@]}" queued-resources describe "$NAME" --zone "$ZONE" --format "value(state.state)" 2> /dev/null || echo NONE
}

on_all() {
    "${TPU[@]}" tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

delete() {
    "${TPU[@]}" queued-resources delete "$NAME" --zone "$ZONE" --force --quiet
}

wait_for_slice() {
    [ "$(state)" != NONE ] || "${TPU[@]}" queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${KIND:+"$KIND"}
    while true; do
        case $(state) in
            ACTIVE) return ;;
            FAILED | SUSPENDED) delete ;;
            NONE) wait_for_slice; return ;;
            *) sleep 30 ;;
        esac
    done
}

arguments=$(printf ' %q' "$@")
folder=$(mktemp -d)
pip wheel --quiet --no-deps --wheel-dir "$folder" .
while true; do
    wait_for_slice
    "${TPU[@]}" tpu-vm scp "$folder"/arcflow_jax-*.whl "$NAME": --zone "$ZONE" --worker=all
    # uv brings a newer Python than the image has
    # shellcheck disable=SC2016
    on_all 'python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python 3.12 arcflow &&
        ~/.local/bin/uv pip install --quiet --python arcflow "$(ls arcflow_jax-*.whl)[tpu,data,gcs]"'
    code=0
    on_all "exec arcflow/bin/arcflow train --xla-preset $PRESET$arguments" || code=$?
    [ "$code" != 0 ] || break
    sleep 60  # until the slice's state tells a preemption
    state=$(state)
    if [ "$code" != "$PREEMPTED" ] && [ "$state" = ACTIVE ]; then
        echo "training ended with exit code $code; the slice $NAME still runs, and costs" >&2
        exit "$code"
    fi
    echo "the slice is $state; asking again" >&2
done
delete

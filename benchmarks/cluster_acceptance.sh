#!/bin/sh
# What 2 to 8 GPUs of one machine do with this engine, in one CSV (benchmarks/cluster/acceptance.py has the cases):
#
#     benchmarks/cluster_acceptance.sh                                          the built-in tiny Flux, all GPUs
#     MODEL=black-forest-labs/FLUX.1-dev benchmarks/cluster_acceptance.sh       the same at full size
#     DS_ACCELERATOR=cpu benchmarks/cluster_acceptance.sh --gpus 2 --quick      a rehearsal without a GPU
set -eu
cd "$(dirname -- "$0")/.."
export PYTHONPATH="engine:kernels:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
[ -n "${PYTHON:-}" ] || PYTHON=.venv/bin/python
exec "$PYTHON" -m cluster.acceptance ${MODEL:+--model "$MODEL"} "$@"

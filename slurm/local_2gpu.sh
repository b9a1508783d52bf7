#!/bin/bash
# One replica on two GPUs of this host, without SLURM.
#
#   slurm/local_2gpu.sh model=llama13b model.path=/data/llama-2-13b-hf input=parquet 'input.paths=[/data/prompts]' \
#       input.prompt_column=prompt run_name=mine
#
# What follows are overrides of `python -m batchinfer`; the same command again goes on with the run. From the environment:
#   CUDA_VISIBLE_DEVICES   which two (numbers, UUIDs); default: the first two
#   HW                     the tier; default: auto, this host as the driver describes it. HW=cpu: two processes, to try it
#   PYTHON                 default: python
set -euo pipefail

exec "${PYTHON:-python}" -m batchinfer run "hw=${HW:-auto}" hw.gpus_per_node=2 hw.tensor_parallel=2 launcher=local "$@"

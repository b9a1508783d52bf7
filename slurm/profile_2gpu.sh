#!/bin/bash
# Where the time of a step goes with tensor parallel 2: a window of a running engine under Nsight Systems.
#
#   slurm/profile_2gpu.sh model=llama13b model.load_format=random profile.workload=decode
#   NSYS=0 slurm/profile_2gpu.sh model=llama13b model.load_format=random
#
# What follows are overrides of `python -m batchinfer profile`. It leaves nsys.nsys-rep in profile.dir
# (outputs/profile-<model>), for the Nsight Systems window or `nsys stats`. From the environment:
#   HW       the tier; default: auto, this host as the driver describes it
#   NSYS     0: torch.profiler instead, which prints tables and leaves trace.json.gz (and runs with HW=cpu too)
#   PYTHON   default: python
set -euo pipefail

nsys=true
if [[ "${NSYS:-1}" == 0 ]]; then
    nsys=false
elif ! command -v nsys > /dev/null; then
    echo "profile_2gpu.sh: nsys (Nsight Systems) is not on the PATH: load its module, or set NSYS=0 for torch.profiler" >&2
    exit 1
fi
exec "${PYTHON:-python}" -m batchinfer profile "hw=${HW:-auto}" hw.gpus_per_node=2 hw.tensor_parallel=2 "profile.nsys=$nsys" "$@"

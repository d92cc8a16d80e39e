# shellcheck shell=bash
# Sourced by the batch files: how to run something in the container that CONTAINER names.
#
#   CONTAINER=image.sif         Apptainer: `apptainer exec`, with --nv where there are GPUs
#   CONTAINER=anything else     Pyxis (enroot): an image of a registry (nvcr.io#nvidia/pytorch:25.01-py3) or a .sqsh file
#   CONTAINER_MOUNTS=A:A,B:C    folders of the host, and where the container sees them; this folder is always there
#
# The image needs megagpt's dependencies; megagpt itself is taken from this folder. The checks before and after the ranks
# run outside of it: they need pydantic, PyYAML and psutil on the node, but no torch. Sets, both empty without a container:
#
#   in_step     options for srun
#   in_image    words before a command
# shellcheck disable=SC2034  # used by the batch files
in_step=() in_image=()
if [[ -n ${CONTAINER:-} ]]; then
  mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  if [[ $CONTAINER == *.sif ]]; then
    if ! command -v apptainer >/dev/null; then
      echo "error: CONTAINER=$CONTAINER needs apptainer, which is not on PATH; load its module before sbatch" >&2
      exit 2
    fi
    in_image=(apptainer exec --bind "$mounts" --pwd "$PWD" "$CONTAINER")
    if [[ ${SLURM_GPUS_ON_NODE:-0} != 0 ]]; then
      in_image=(apptainer exec --nv "${in_image[@]:2}")
    fi
  else
    if ! grep -q -- --container-image <<<"$(srun --help 2>&1)"; then
      echo "error: CONTAINER=$CONTAINER needs Slurm's Pyxis plugin, which is not here; give a .sif file for Apptainer" >&2
      exit 2
    fi
    # shellcheck disable=SC2034
    in_step=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
  fi
fi

#!/usr/bin/env bash
# Collect everything that the images install, as files: distadam's wheel, torch and their dependencies. Building an image
# then needs no network, and two builds install the same bits.
#
#   docker/wheels.sh [FOLDER]                      into docker/wheels; CPU
#   TORCH=torch==2.13.0 docker/wheels.sh           a release; PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS choose the build (CUDA)
#   EXTRAS=prometheus,plot docker/wheels.sh        which of distadam's extras
#
# Run it with the Python version that the image has.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:-$here/wheels}"
mkdir -p "$folder"
python="${PYTHON:-python3}"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$here/.."
wheel="$(find "$folder" -name 'distadam-*.whl' | sort | tail -n 1)"
"$python" -m pip download --quiet --dest "$folder" --only-binary :all: \
  "${TORCH:-torch}" "distadam[${EXTRAS:-prometheus}] @ file://$wheel" numpy
echo "docker/wheels.sh: $(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1), in $folder"

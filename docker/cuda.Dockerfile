# distadam on NVIDIA GPUs. torch's wheels bring CUDA's libraries and NCCL; the host brings the driver, and its container
# toolkit hands it in (docker run --gpus all --ipc host).
#
#   TORCH=torch==2.13.0 EXTRAS=prometheus,triton docker/wheels.sh && docker build -f docker/cuda.Dockerfile -t distadam:cuda .
#
# BASE needs Python 3.10 or newer and glibc, no CUDA toolkit. Triton's wheel brings an assembler, but links its launchers
# with a C compiler at run time: with gcc in BASE an update is one pass over memory; without it distadam says so once and
# takes torch's fused operations. Built here with the wheels of the CPU image only (tests/cluster/test_docker.py).
ARG BASE=python:3.11-slim-bookworm
ARG EXTRAS=prometheus,triton

FROM ${BASE} AS build
ARG EXTRAS
COPY docker/wheels /wheels
RUN python3 -m venv /opt/distadam \
 && /opt/distadam/bin/python -m pip install --no-cache-dir --no-compile --no-index --find-links /wheels "distadam[${EXTRAS}]" numpy \
 && /opt/distadam/bin/python -m pip uninstall --yes --quiet pip

FROM ${BASE}
RUN useradd --uid 1000 --create-home distadam && install -d -o distadam -g distadam /checkpoints /srv/distadam
COPY --from=build /opt/distadam /opt/distadam
COPY --chown=distadam:distadam examples /srv/distadam/examples
ENV PATH=/opt/distadam/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TRITON_CACHE_DIR=/tmp/triton
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER distadam
WORKDIR /srv/distadam
VOLUME /checkpoints
CMD ["distadam", "doctor"]

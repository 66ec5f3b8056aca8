# distadam on NVIDIA GPUs. torch's wheels bring CUDA's libraries and NCCL; the host brings the driver, and its container
# toolkit hands it in (docker run --gpus all --ipc host).
#
#   TORCH=torch==2.13.0 EXTRAS=prometheus,triton docker/wheels.sh && docker build -f docker/cuda.Dockerfile -t distadam:cuda .
#
# BASE needs Python 3.10 or newer and glibc, no CUDA toolkit. Triton's wheel brings an assembler, but links its launchers
# with a C compiler at run time: with gcc in BASE an update is one pass over memory; without it distadam says so once and
# takes torch's fused operations. Never built here, for want of a GPU.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
COPY docker/wheels /wheels
RUN python3 -m venv /opt/distadam \
 && /opt/distadam/bin/python -m pip install --no-cache-dir --no-index --find-links /wheels "distadam[prometheus,triton]" numpy \
 && /opt/distadam/bin/python -m pip uninstall --yes --quiet pip \
 && find /opt/distadam -name __pycache__ -type d -prune -exec rm -rf {} +

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

# distadam on CPU. Files only, no network:
#
#   docker/wheels.sh && docker build -f docker/cpu.Dockerfile -t distadam:cpu .
#
# BASE is any image with Python 3.10 or newer (with venv in the first stage); pin it by digest for builds that repeat.
# EXTRAS are those of distadam that docker/wheels.sh has collected.
ARG BASE=python:3.11-slim-bookworm
ARG EXTRAS=prometheus

FROM ${BASE} AS build
ARG EXTRAS
COPY docker/wheels /wheels
RUN python3 -m venv /opt/distadam \
 && /opt/distadam/bin/python -m pip install --no-cache-dir --no-compile --no-index --find-links /wheels "distadam[${EXTRAS}]" numpy \
 && /opt/distadam/bin/python -m pip uninstall --yes --quiet pip

FROM ${BASE}
# What training writes belongs to user 1000; nothing runs as root. Checkpoints come on a volume.
RUN useradd --uid 1000 --create-home distadam && install -d -o distadam -g distadam /checkpoints /srv/distadam
COPY --from=build /opt/distadam /opt/distadam
COPY --chown=distadam:distadam examples /srv/distadam/examples
ENV PATH=/opt/distadam/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
# As `distadam launch` sets them: gradients keep their memory from step to step.
ENV MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456
USER distadam
WORKDIR /srv/distadam
VOLUME /checkpoints
CMD ["distadam", "doctor"]

# Training image: the whole `bitdistill` command, the Prefect worker and server, the MLflow server.
#   docker build -f docker/train.Dockerfile -t bitdistill-train .
FROM python:3.11-slim-bookworm AS build
# Debian serves only the newest version of a package: a pinned one would stop the build some day.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make \
 && rm -rf /var/lib/apt/lists/*
# Where pip also looks for torch; empty takes PyPI's build, with CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Optional dependencies of pyproject.toml, e.g. [smollm2].
ARG EXTRAS=
# The image's user cannot write bytecode, so uv must, or every process would compile every module again.
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
WORKDIR /app
COPY . .
# The install is the Makefile's. It is editable: Prefect loads flows/ from /app, so there must be no second copy.
RUN --mount=type=cache,target=/root/.cache \
    make setup VENV=/opt/venv EXTRAS="$EXTRAS" TORCH_OPTIONS="${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}" \
 && /opt/venv/bin/python -m compileall -q bitdistill_core tasks flows \
 && rm -rf build

FROM python:3.11-slim-bookworm
# Named volumes take the owner of the directory they cover, so these exist in the image.
RUN groupadd --gid 10001 bitdistill \
 && useradd --uid 10001 --gid 10001 --create-home bitdistill \
 && install -d -o 10001 -g 10001 /app /app/runs /app/results /mlflow /home/bitdistill/.cache/huggingface /home/bitdistill/.prefect \
 && chown -R 10001:10001 /home/bitdistill
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/bitdistill \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    GOMP_SPINCOUNT=20000 \
    DO_NOT_TRACK=true \
    DVC_NO_ANALYTICS=1 \
    GIT_PYTHON_REFRESH=quiet \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_HOME=/home/bitdistill/.prefect \
    PREFECT_UI_STATIC_DIRECTORY=/home/bitdistill/.prefect/ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS=120
USER 10001:10001
WORKDIR /app
CMD ["bitdistill", "--help"]

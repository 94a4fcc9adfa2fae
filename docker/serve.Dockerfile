# Inference image: `bitdistill classify | generate | bench | inspect` on a packed model. No PyTorch, no compiler.
#   docker build -f docker/serve.Dockerfile -t bitdistill-serve .
FROM python:3.11-slim-bookworm AS build
# Debian serves only the newest version of a package: a pinned one would stop the build some day.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && python -m venv /opt/build \
 && python -m venv --without-pip /opt/venv
WORKDIR /src
COPY constraints.txt ./
COPY docker/serve-requirements.txt docker/
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache \
    /opt/build/bin/pip install --quiet -c constraints.txt cmake ninja nanobind scikit-build-core \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --quiet --no-deps -r docker/serve-requirements.txt
COPY pyproject.toml README.md CMakeLists.txt ./
COPY bitdistill_core bitdistill_core
COPY tasks tasks
COPY flows flows
RUN /opt/build/bin/pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation -w /tmp/wheel . \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --quiet --no-cache-dir --no-deps /tmp/wheel/*.whl

FROM python:3.11-slim-bookworm
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
USER 10001:10001
WORKDIR /models
ENTRYPOINT ["bitdistill"]
CMD ["--help"]

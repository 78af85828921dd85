# One file for both kinds of machine: `--build-arg VARIANT=cpu` (default) or `cuda`. Weights are never in the image: they
# come from a volume at /models or the hub's cache at /cache.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS build
ARG VARIANT=cpu
# Where PyTorch for a CPU comes from; PyPI's is for CUDA. Empty: from the folder of wheels that PIP_FIND_LINKS names.
ARG TORCH_INDEX_CPU=https://download.pytorch.org/whl/cpu
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/idefics2
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
# Before the code, so that a change of it does not install everything again.
RUN pip="/opt/idefics2/bin/pip install --no-cache-dir --no-compile --quiet --constraint constraints.txt" \
    && case "$VARIANT" in \
        cpu) $pip --no-deps ${TORCH_INDEX_CPU:+--index-url} ${TORCH_INDEX_CPU:---no-index} torch ;; \
        cuda) ;; \
        *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 2 ;; \
    esac \
    && mkdir server && touch server/__init__.py \
    && $pip .
COPY server server
RUN /opt/idefics2/bin/pip install --no-cache-dir --no-compile --quiet --no-deps --force-reinstall . \
    && /opt/idefics2/bin/pip uninstall --quiet --yes pip setuptools \
    # What only compiling extensions against PyTorch, or its own tests, would read.
    && rm -rf /opt/idefics2/lib/python3*/site-packages/torch/include \
        /opt/idefics2/lib/python3*/site-packages/torch/share \
        /opt/idefics2/lib/python3*/site-packages/torch/lib/*.a \
        /opt/idefics2/lib/python3*/site-packages/torch/test \
    && find /opt/idefics2 -name __pycache__ -prune -exec rm -rf {} +

FROM ${BASE}
LABEL org.opencontainers.image.title="idefics2-server" \
    org.opencontainers.image.description="OpenAI-compatible inference server for Idefics2" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin idefics2 \
    && install -d -o 10001 -g 10001 /cache /models
COPY --from=build /opt/idefics2 /opt/idefics2
COPY configs /etc/idefics2
ENV PATH=/opt/idefics2/bin:$PATH \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    # The root file system may be read-only: nothing is written but to /cache and /tmp.
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
VOLUME ["/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Liveness alone: a server that loads, drains or restarts its engine is not one to be killed.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
ENTRYPOINT ["idefics2-server"]
CMD ["serve", "--config", "/etc/idefics2/demo.yaml", "--host", "0.0.0.0"]

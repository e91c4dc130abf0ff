# Braid in a container, on the CPU. For NVIDIA GPUs, take torch from a CUDA index that holds the pinned version:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t braid:cuda .
#   docker run --gpus all --init -p 127.0.0.1:8000:8000 -v braid:/data braid:cuda
FROM python:3.12-slim AS builder

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/braid/bin:$PATH
RUN python -m venv /opt/braid
WORKDIR /src

# torch alone and first: PyPI's wheel for Linux brings CUDA along, and a change of our sources must not fetch it again
COPY constraints.txt ./
RUN pip install --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch

COPY pyproject.toml README.md ./
COPY app ./app
COPY merge_algos ./merge_algos
COPY storage ./storage
RUN pip install -c constraints.txt .

# `braid demo` looks for its adapters beside the package
COPY examples /opt/braid/lib/python3.12/site-packages/examples

FROM python:3.12-slim

# a new named volume takes over the owner of the directory it is mounted on
RUN useradd --uid 10001 --user-group --create-home --home-dir /srv/braid braid \
    && install -d -o braid -g braid /data
COPY --from=builder /opt/braid /opt/braid
ENV PATH=/opt/braid/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BRAID_DATA_DIR=/data \
    BRAID_PORT=8000

# by number, so that an orchestrator can see that it is not root
USER 10001
WORKDIR /srv/braid
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; api = http.client.HTTPConnection('127.0.0.1', int(os.environ['BRAID_PORT']), timeout=4); api.request('GET', '/healthz'); sys.exit(api.getresponse().status != 200)"]
ENTRYPOINT ["braid"]
CMD ["serve", "--host", "0.0.0.0"]

# Two columns in one container.  torch's wheel brings CUDA, cuDNN and NCCL, so a slim Python,
# a compiler for torch.compile and Triton, and the host's driver are enough.
#   docker build -t modelpar .   # for a user other than 1000: --build-arg UID=$(id -u)
#   mkdir -p runs                # else Docker creates it for root
#   docker run --init --gpus all --shm-size 8g -v /data/imagenet:/data:ro -v "$PWD/runs:/runs" \
#     modelpar data=imagenet data.root=/data run_dir=/runs/first
# NCCL may pass data between GPUs through shared memory, of which Docker provides 64 MB by default.
# The tests were run with this version of Python.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

LABEL org.opencontainers.image.title="modelpar" \
      org.opencontainers.image.description="AlexNet as it ran in 2012, split over two devices" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ARG UID=1000
ARG GID=1000
RUN groupadd --gid "$GID" modelpar && useradd --uid "$UID" --gid "$GID" --create-home modelpar

# Dependencies before the source, so that a change of the code does not download torch again.
WORKDIR /opt/modelpar
COPY pyproject.toml ./
RUN python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))' \
      > requirements.txt \
    && pip install --no-cache-dir -r requirements.txt
COPY README.md LICENSE ./
COPY conf conf
COPY modelpar modelpar
RUN pip install --no-cache-dir --no-deps .

USER modelpar
WORKDIR /home/modelpar
ENTRYPOINT ["modelpar-train"]

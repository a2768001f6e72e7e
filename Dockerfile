# gardo for NVIDIA GPUs, with a driver of 580 or newer:
#
#     docker build -t gardo .
#     docker run --rm --gpus all --shm-size=16g -v "$PWD:/work" -v "$HOME/.cache/huggingface:/hub" gardo doctor
#
# For a driver from 525 to 579: --build-arg CONSTRAINTS=constraints-cuda12.txt, which has torch for CUDA 12.
# torch's wheels bring CUDA's libraries; of the base image only the distribution and the compiler matter.
FROM ubuntu:24.04

# gcc and Python's headers: Triton compiles its launcher when it first runs. pdsh and ssh: several machines.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc git libc6-dev openssh-client pdsh python3-dev \
        python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG CONSTRAINTS=constraints.txt
ENV PATH=/opt/gardo/bin:$PATH HF_HOME=/hub PYTHONUNBUFFERED=1

WORKDIR /src
COPY setup.py pyproject.toml README.md LICENSE constraints.txt constraints-cuda12.txt constraints-shared.txt ./
COPY engine engine
COPY kernels kernels
RUN python3 -m venv /opt/gardo \
    && pip install --no-cache-dir -c "$CONSTRAINTS" ".[cuda,rewards,datasets]"
COPY recipes recipes
COPY suites suites

WORKDIR /work
ENTRYPOINT ["gardo"]
CMD ["--help"]

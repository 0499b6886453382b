# anyflow-serve in a container; docs/how-to/serving.md says how to run it.
#
#   docker build --tag anyflow-serve .                              ONNX Runtime on the CPU
#   docker build --tag anyflow-serve-gpu --build-arg RUNTIME=gpu .  ONNX Runtime with CUDA
#
# The text encoder and the VAE run on PyTorch, whose ordinary wheel brings CUDA. A smaller CPU image
# takes PyTorch's CPU wheels: --build-arg EXTRA_INDEX=ADDRESS, as PyTorch's own page names it.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim
ARG RUNTIME=cpu
ARG EXTRA_INDEX=""
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    case "${RUNTIME}" in \
        cpu|gpu) ;; \
        *) echo "RUNTIME is '${RUNTIME}'. Give cpu or gpu." >&2; exit 1 ;; \
    esac; \
    pip install --no-cache-dir --constraint /tmp/constraints.txt \
        ${EXTRA_INDEX:+--extra-index-url "${EXTRA_INDEX}"} \
        "$(echo /wheels/*.whl)[${RUNTIME},serve]"; \
    useradd --create-home --uid 1000 anyflow; \
    install --directory --owner anyflow /videos

USER 1000
WORKDIR /home/anyflow
EXPOSE 8000
VOLUME ["/videos"]
HEALTHCHECK --start-period=5m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["anyflow-serve"]
CMD ["/bundle", "--host", "0.0.0.0", "--folder", "/videos"]

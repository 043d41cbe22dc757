# mlx-esm on the CPUs of a cluster. Build it: docker build -t mlx-esm .
# Run it: docker run --rm --user "$(id -u)" -v "$PWD:/work" -v mlx-esm:/cache mlx-esm embed proteins.fasta ...
# With Apptainer: apptainer build mlx-esm.sif docker-daemon://mlx-esm:latest

FROM python:3.12-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# Without a compiler the package installs without kernels; an image without them is a mistake.
RUN python -m venv /opt/mlx-esm \
    && /opt/mlx-esm/bin/pip install --no-cache-dir ".[cpu,hdf5,parquet,plots,fold]" \
    && /opt/mlx-esm/bin/python -I -c "from mlx_esm_hf.ops import kernels; assert kernels.native, kernels.STATE"

FROM python:3.12-slim-bookworm
COPY --from=build /opt/mlx-esm /opt/mlx-esm
# Any user may write into the cache of models: mount a folder there to keep them.
RUN useradd --create-home user && mkdir --mode 1777 /cache
ENV HF_HOME=/cache
USER user
WORKDIR /work
ENTRYPOINT ["/opt/mlx-esm/bin/mlx-esm"]
CMD ["--help"]

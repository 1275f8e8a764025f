# docker build -t layerskip . && docker run -it --gpus all layerskip
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# g++ and Python's headers are for --compile and --exact. Ubuntu 24.04 has a user "ubuntu" with the id 1000.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && { id -u ubuntu || useradd --create-home --uid 1000 --user-group ubuntu; } \
    && install -d -o ubuntu -g ubuntu /app /opt/venv /cache /cache/huggingface

# torch brings its own CUDA libraries: only the driver's are looked for elsewhere.
# Keep downloaded checkpoints with -v "$HOME/.cache/huggingface:/cache/huggingface".
ENV PATH=/opt/venv/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1

USER ubuntu
WORKDIR /app
COPY --chown=ubuntu:ubuntu requirements.txt .
RUN python3.12 -m venv /opt/venv && pip install --no-cache-dir -r requirements.txt
COPY --chown=ubuntu:ubuntu . .

# No banner of the base image before the program's own output.
ENTRYPOINT []
CMD ["python", "generate.py"]

# What `run.py launch gke` runs. For TPUs, and for GPUs:
#   docker build --build-arg REQUIREMENTS=requirements/tpu.txt --tag IMAGE .
#   docker build --build-arg REQUIREMENTS=requirements/cuda12.txt --tag IMAGE .
FROM python:3.11-slim

WORKDIR /app
ARG REQUIREMENTS=requirements.txt
COPY requirements.txt ./
COPY requirements/ requirements/
# gcsfs: run directories of the form gs://BUCKET/...
RUN pip install --no-cache-dir --requirement "${REQUIREMENTS}" gcsfs

COPY run.py ./
COPY spmd/ spmd/
COPY experiments/ experiments/
RUN useradd --create-home --uid 1000 spmd && install --directory --owner=spmd runs
USER 1000

# exec form: SIGTERM reaches Python, which saves
ENTRYPOINT ["python", "run.py"]

#!/usr/bin/env bash
# Replicas of a server on Kubernetes (GKE), one store for all of them.
#   IMAGE=... MODEL=/models/X STORE=CLAIM launch/gke_serve.sh [--rows=16 ...] | kubectl apply -f -
# IMAGE has this package with the extras serve and cuda12 or tpu. STORE is a volume claim
# that all pods may write (ReadWriteMany, Filestore for example); MODEL lies in it, or in
# the image. NAME, REPLICAS and GPUS have defaults. The key of clients is taken from the
# secret NAME-key, if there is one:
#   kubectl create secret generic NAME-key --from-literal=key=...
set -euo pipefail
: "${IMAGE:?}" "${MODEL:?a folder in the pod}" "${STORE:?a ReadWriteMany volume claim}"
name=${NAME:-beacon-serve}
gpus=${GPUS:-1}
args=""
for each in "--model=$MODEL" --host=0.0.0.0 --port=8000 --store=/store/memories "$@"; do
  args+=$'\n'"        - '${each//\'/\'\'}'"
done
cat <<YAML
apiVersion: apps/v1
kind: Deployment
metadata: {name: $name}
spec:
  replicas: ${REPLICAS:-2}
  selector: {matchLabels: {app: $name}}
  template:
    metadata: {labels: {app: $name}}
    spec:
      terminationGracePeriodSeconds: 60
      containers:
      - name: serve
        image: '$IMAGE'
        command: [beacon-jax, serve]
        args:$args
        ports: [{containerPort: 8000}]
        env:
        - name: BEACON_JAX_API_KEY
          valueFrom: {secretKeyRef: {name: $name-key, key: key, optional: true}}
        readinessProbe: {httpGet: {path: /ready, port: 8000}, periodSeconds: 5}
        livenessProbe: {httpGet: {path: /health, port: 8000}, initialDelaySeconds: 60}
        resources: {limits: {nvidia.com/gpu: '$gpus'}}
        volumeMounts: [{name: store, mountPath: /store}]
      volumes: [{name: store, persistentVolumeClaim: {claimName: '$STORE'}}]
---
apiVersion: v1
kind: Service
metadata: {name: $name}
spec:
  selector: {app: $name}
  ports: [{port: 80, targetPort: 8000}]
YAML

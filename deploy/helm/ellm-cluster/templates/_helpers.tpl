{{/* Labels of every object; with a component, of its pods. Takes a list: the root, and the component or "". */}}
{{- define "ellm.labels" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
app.kubernetes.io/name: ellm-cluster
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with $component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* Bytes of a size as in cluster.yaml: a number, "512MiB", "1.5 GB", null or "auto". */}}
{{- define "ellm.bytes" -}}
{{- $units := dict "" 1 "B" 1 "KB" 1000 "MB" 1000000 "GB" 1000000000 "TB" 1000000000000 "KiB" 1024 "MiB" 1048576 "GiB" 1073741824 "TiB" 1099511627776 -}}
{{- $text := . | default "auto" | toString -}}
{{- if kindIs "float64" . -}}
{{- int64 . -}}
{{- else if eq $text "auto" -}}
0
{{- else -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text | trim -}}
{{- if or (not $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "cluster.memory.host_buffer is %q: it should be a size such as 512MiB" $text) -}}
{{- end -}}
{{- mulf $number (get $units $unit) | floor | int64 -}}
{{- end -}}
{{- end }}

{{/* Bytes of Kubernetes' notation: "16Gi", "1.5G". */}}
{{- define "ellm.quantity" -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "K" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" . -}}
{{- mulf $number (get $units (trimPrefix $number .)) | int64 -}}
{{- end }}

{{/* MiB of a worker's shared memory: 512 for Ray and the lease boards, and the host buffers of all replicas. */}}
{{- define "ellm.sharedMemoryMib" -}}
{{- $buffer := include "ellm.bytes" (get (.Values.cluster.memory | default dict) "host_buffer") | int64 -}}
{{- $replicas := 0 -}}
{{- range .Values.cluster.models | default (list dict) -}}
{{- $bounds := .autoscaling_config | default dict -}}
{{- $most := .replicas | default 2 | int -}}
{{- if $bounds.max_replicas -}}
{{- $most = int $bounds.max_replicas -}}
{{- else if and $bounds.min_replicas (not .replicas) -}}
{{- $most = max 2 (int $bounds.min_replicas) -}}
{{- end -}}
{{- if ne (toString .elastic) "false" -}}
{{- $replicas = add $replicas $most -}}
{{- end -}}
{{- end -}}
{{- add 512 (div (add (mul $replicas $buffer) 1048575) 1048576) -}}
{{- end }}

{{/* The port of the API. */}}
{{- define "ellm.port" -}}
{{- get (.Values.cluster.http | default dict) "port" | default 8000 | int -}}
{{- end }}

{{/* What Ray Serve is told. */}}
{{- define "ellm.serveConfig" -}}
{{- $listen := dict "host" "0.0.0.0" "port" (include "ellm.port" . | int) -}}
{{- $args := mergeOverwrite (deepCopy .Values.cluster) (dict "http" $listen) -}}
{{- if not (get (.Values.cluster.auth | default dict) "keys_file") -}}
{{- $args = mergeOverwrite $args (dict "auth" (dict "allow_open" true)) -}}
{{- end -}}
proxy_location: Disabled
applications:
  - name: ellm
    route_prefix: null
    import_path: cluster.serve_app:build
    args:
      {{- toYaml $args | nindent 6 }}
{{- end }}

{{/* Security of a pod, and of a container. */}}
{{- define "ellm.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- define "ellm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: 1000
capabilities:
  drop: [ALL]
{{- end }}

{{/* What head and workers have in common: of a container, then of a pod's metadata and volumes. */}}
{{- define "ellm.container" -}}
image: {{ printf "%s:%s" .Values.image.repository .Values.image.tag | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- include "ellm.containerSecurity" . | nindent 2 }}
{{- end }}
{{- define "ellm.env" -}}
- {name: RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS, value: "1"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
- {name: VLLM_LOGGING_COLOR, value: "0"}
- {name: TOKENIZERS_PARALLELISM, value: "false"}
- {name: CUDA_DEVICE_ORDER, value: PCI_BUS_ID}
- {name: HF_HOME, value: /models}
- {name: HOME, value: /home/ellm}
{{- end }}
{{- define "ellm.mounts" -}}
- {name: shared-memory, mountPath: /dev/shm}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/ellm}
{{- end }}
{{- define "ellm.podMetadata" -}}
{{- $root := index . 0 -}}
labels:
  {{- include "ellm.labels" . | nindent 2 }}
annotations:
  ellm/config-digest: {{ include "ellm.serveConfig" $root | sha256sum }}
{{- end }}
{{- define "ellm.pod" -}}
restartPolicy: Never # the autoscaler replaces pods
securityContext:
  {{- include "ellm.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

# shellcheck shell=bash
# Sourced before a run on NVIDIA GPUs:   . launch/gpu_env.sh && mmjax train ...
# Memory, queues and NCCL. What is set already stays as it is.

# The share of a GPU that JAX takes when it starts, 0.75 by its own choice. What is left is for
# CUDA, cuDNN and the buffers of NCCL, which lie outside it. Take less where NCCL or cuDNN say that
# they found no memory.
if [ -z "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then
  export XLA_CLIENT_MEM_FRACTION=0.9
fi
# One queue of a GPU, so that collectives begin where the compiler put them; not from Blackwell on,
# where NVIDIA advises against it.
if command -v nvidia-smi > /dev/null; then
  query=("--query-gpu=compute_cap" "--format=csv,noheader")
  capability=$(nvidia-smi "${query[@]}" | head -n 1) || capability=''
  case ${capability%%.*} in
    7 | 8 | 9) export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" ;;
  esac
  unset capability query
fi
# Why a communicator failed stands in the log; NCCL is silent by itself.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

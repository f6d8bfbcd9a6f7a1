# shellcheck shell=bash
# What JAX is told on NVIDIA GPUs; gpu_node.sh and slurm.sbatch source it. Values set before win.
# Chosen by reading, NOT run by us on several GPUs: compare the steps/s that train.py prints with
# and without. The versions are those of requirements.txt.

# JAX takes 75 % of a GPU's memory for itself; nothing else shares these GPUs. The rest is for CUDA,
# cuDNN and NCCL; NVIDIA sets 0.8 or 0.9. (Its older name XLA_PYTHON_CLIENT_MEM_FRACTION is
# deprecated, and both together are an error.)
# https://docs.jax.dev/en/latest/201/gpu-memory.html
# https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
if [[ -z ${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then
  export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.9}
fi

# Off by default; lets the all-reduce of the gradients run beside the backward pass. The one XLA flag
# that NVIDIA's own JAX images set.
# https://docs.jax.dev/en/latest/gpu_performance_tips.html
# https://docs.nvidia.com/jax-toolbox/environment-variables
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"

# Left out on purpose: thresholds for combining collectives, pipelined collectives, CUDA graphs. They
# are advice for language models whose weights are cut over many GPUs; here each GPU has them all.
# No NCCL_*: NVIDIA asks not to keep such variables in scripts without need. Worth knowing:
#   NCCL_SOCKET_IFNAME=eth0   where a node has networks that do not lead to the other nodes
#   NCCL_DEBUG=INFO           to see what NCCL chose
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
#   NCCL_LAUNCH_MODE=GROUP    should one process with several GPUs hang
# https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance

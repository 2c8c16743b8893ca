from pathlib import Path

NAMES = ("flash-attn3", "vllm-flash-attn3")  # FlashAttention-3, and vLLM's build of it, which has attention sinks

print(":".join(f"kernels-community/{name}={Path(__file__).parent}" for name in NAMES))

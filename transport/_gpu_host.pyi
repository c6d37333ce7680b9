"""The CUDA kernel of `transport/gpu/move.cu`, compiled for the processor."""

def move(operations: int, count: int, streams: int, sums: int, chunks: int, chunks_per_warp: int) -> None:
    """As a launch of the kernel, with addresses of this process; see `transport.gpu.plan.MovePlan`."""

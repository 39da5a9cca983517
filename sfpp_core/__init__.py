"""Self-Forcing++ inference: a causal video student rolled out chunk by chunk.

Knows no host (ComfyUI) and no trainer.
"""

from .config import DEMO, WAN_1_3B, WAN_14B, RolloutSettings, StudentConfig
from .errors import SFPPError
from .geometry import VideoGeometry
from .kv_cache import CacheShape, GradientKVCache, RollingKVCache
from .network import WanNetwork
from .noise import ChunkNoise
from .rollout import Student, denoise_chunk, rollout
from .sampler import LongSampler
from .schedule import FewStepSchedule
from .student import BoundStudent, CausalStudent

__all__ = [
    "DEMO",
    "WAN_1_3B",
    "WAN_14B",
    "BoundStudent",
    "CacheShape",
    "CausalStudent",
    "ChunkNoise",
    "FewStepSchedule",
    "GradientKVCache",
    "LongSampler",
    "RollingKVCache",
    "RolloutSettings",
    "SFPPError",
    "Student",
    "StudentConfig",
    "VideoGeometry",
    "WanNetwork",
    "denoise_chunk",
    "rollout",
]

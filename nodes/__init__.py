"""The nodes of this pack."""

from ._host import ComfyExtension, io
from .decoding import SFPPDecodeToVideo
from .drift_controls import SFPPDriftControls
from .loaders import SFPPLoadDemo, SFPPLoadStudent
from .prompt_schedule import SFPPPromptSchedule
from .report import SFPPDriftReport
from .run_settings import SFPPRunSettings
from .sampling import SFPPCacheSettings, SFPPLongSampler


class SFPPExtension(ComfyExtension):
    """Node list handed to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return every node class of this pack."""
        return [
            SFPPLoadStudent,
            SFPPLoadDemo,
            SFPPPromptSchedule,
            SFPPCacheSettings,
            SFPPDriftControls,
            SFPPRunSettings,
            SFPPLongSampler,
            SFPPDecodeToVideo,
            SFPPDriftReport,
        ]

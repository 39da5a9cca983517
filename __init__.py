"""ComfyUI entry point of the Self-Forcing++ node pack.

Importing this package does nothing: the host is touched only when ComfyUI calls
``comfy_entrypoint``, so pytest, pyright and the training scripts may import it freely.
"""

WEB_DIRECTORY = "./nodes/web"
"""Folder the host serves; the help pages of the nodes are in its ``docs``."""


async def comfy_entrypoint():
    """Return the node list. Called once by ComfyUI at start-up."""
    from .nodes import SFPPExtension

    return SFPPExtension()

"""What decides the chunks of a plan: runs and kept latents are known by it, so it must not lack anything."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import to_table
from .decoder import PREVIEW
from .run.fingerprint import fingerprint

if TYPE_CHECKING:
    from .plan import Plan


def decisions_of(planned: "Plan") -> dict[str, Any]:
    """Return all that decides the chunks of a plan but for the text and the size, by names for people.

    Files count by what they hold.

    Raises:
        CheckpointError: A file cannot be read.
    """
    request = planned.request
    files = {
        "words": request.words,
        "text encoder": request.text_encoder,
        "tokenizer": request.tokenizer,
        "start": request.start,
        "encoder": request.encoder,
    }
    controls = {"anchor": request.anchor, "context sigma": request.context_sigma}
    if planned.settings.overlap:  # a window that starts anew begins with a frame that is encoded once more
        place = planned.decoder_place
        files["decoder"] = None if place == PREVIEW else Path(place)
        controls["tile"] = request.tile or 0
    return {
        "student": fingerprint(planned.student.path),
        "weights": request.weights,
        "loras": [[fingerprint(path), strength] for path, strength in request.loras],
        **{name: fingerprint(path) for name, path in files.items() if path is not None},
        "seed": request.seed,
        "settings": to_table(planned.settings),
        **{name: value for name, value in controls.items() if value},
        "cache": request.storage,
        "device": planned.device.type,
        "dtype": str(planned.dtype)[6:],
        "attention": planned.attend.__name__.strip("_"),
    }


def digest_of(planned: "Plan") -> str:
    """Return a digest of what decides the video of a plan and is not said beside kept latents."""
    made = [decisions_of(planned), str(planned.request.switch), planned.geometry.lead]
    return blake2b(json.dumps(made, sort_keys=True).encode(), digest_size=8).hexdigest()

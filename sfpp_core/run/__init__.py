"""A run on disk: a video that survives whatever ends its making, and can be gone on with and branched.

A run is a folder. ``latents`` holds its chunks, each with the key of all that decides it; ``manifest.json``
says what decides them in words; the video grows beside them and is made again from them where it has to be.
"""

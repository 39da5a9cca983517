"""A request becomes a plan: everything checked and every choice made, before a model is loaded."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import demo
from .anchor import Anchor
from .attention import Attend, choose, matmul
from .beginning import Beginning, read_beginning
from .cache_shape import Bytes
from .checkpoint import check_student
from .compute import decoder_dtype, device_named, dtype_named, threads_for, tiles_rest_on
from .config import RolloutSettings, StudentConfig
from .deciding import digest_of
from .decoder import DecoderInfo, check_decoder, check_encoder
from .decoder_memory import decoder_bytes
from .drift_report import ReportFiles
from .errors import OutputError, SettingsError
from .forecast import Forecast, forecast
from .geometry import VideoGeometry, frames_in
from .inspection import FileInfo
from .latent_space import DEMO, WAN_2_1, WAN_2_2, LatentSpace
from .latents_file import LatentsInfo, check_latents_folder
from .lora import Adapter, read_adapter
from .machine import in_words, memory_of
from .outputs import automatic_enlargement, check_enlargement, check_output, forecast_bytes
from .presets import SELF_FORCING, of_family
from .prompts import PromptSource, is_of_the_demo, prompt_source
from .recording import Recording
from .request import Request
from .schedule import check_context_sigma
from .script import read_script
from .timetable import Timetable, timetable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request found possible, every choice made."""

    request: Request
    student: FileInfo
    adapters: tuple[Adapter, ...]
    decoder: DecoderInfo
    timetable: Timetable
    source: PromptSource
    beginning: Beginning | None
    geometry: VideoGeometry
    settings: RolloutSettings
    enlarge: int
    device: torch.device
    dtype: torch.dtype
    threads: int
    attend: Attend
    forecast: Forecast

    @property
    def restarts(self) -> bool:
        """Whether a window starts anew before the video ends."""
        return restarts(self.settings, self.geometry)

    @property
    def tiles_rest_on(self) -> str | None:
        """Where the memory of the tiles not at work is kept."""
        return tiles_rest_on(self.device)

    @property
    def decoder_place(self) -> Path | str:
        """Where the decoder is, as ``load_decoder`` wants it."""
        return _decoder_place(self.request, self.student)

    @property
    def encoder_place(self) -> Path:
        """Where the encoder is, as ``load_encoder`` wants it."""
        return self.request.encoder or Path(self.decoder_place)

    @property
    def recording(self) -> Recording:
        """What is written."""
        return Recording(
            out=self.request.out,
            width=self.geometry.width,
            height=self.geometry.height,
            fps=self.geometry.fps,
            enlarge=self.enlarge,
            chunks=self.geometry.chunks,
        )

    @property
    def latents_info(self) -> LatentsInfo:
        """What is written beside kept latents."""
        geometry = self.geometry
        return LatentsInfo(
            space=self.decoder.space.name,
            width=geometry.width,
            height=geometry.height,
            frames=geometry.frames,
            chunks=geometry.chunks,
            seed=self.request.seed,
            prompt=self.request.prompt,
            run=digest_of(self),
        )

    def lines(self) -> list[str]:
        """Return what will be made, for people."""
        geometry, settings, request = self.geometry, self.settings, self.request
        size = f"{geometry.width}x{geometry.height}"
        if self.enlarge > 1:
            size += f" shown as {geometry.width * self.enlarge}x{geometry.height * self.enlarge}"
        origin = "the embedded demo" if request.student is None else str(self.student.path)
        stage = f", stage {self.student.stage}" if self.student.stage else ""
        loras = "".join(f", {path.name} at {strength:g}" for path, strength in request.loras)
        tiles = f", in tiles of {request.tile}" if request.tile else ""
        sigma = request.context_sigma or settings.context_sigma
        lines = [
            f"video    {geometry.seconds:g} s, {geometry.frames} frames, {size}, to {request.out}",
            f"student  {origin}{stage}{loras}, seed {request.seed}",
            f"text     {self.source}",
            f"rollout  {geometry.chunks} chunks of {settings.chunk} latent frames, {settings.steps} steps, "
            f"shift {settings.shift:g}, window {settings.window}, sink {settings.sink}"
            + (f" ({settings.sink_positions})" if settings.sink else "")
            + (f", overlap {settings.overlap}" if settings.overlap else "")
            + (f", past under noise {sigma:g}" if sigma else "")
            + (f", anchor {request.anchor:g}" if request.anchor else ""),
            f"decoder  {self.decoder.in_words}{tiles}",
            f"compute  {self.device}, {str(self.dtype)[6:]}, attention {self.attend.__name__.strip('_')}, "
            f"{self.threads} CPU thread{'s' if self.threads > 1 else ''}"
            + (f", cache {request.storage}" if request.storage != "plain" else ""),
            f"memory   {self.forecast}, besides Python and PyTorch; the same for any length",
        ]
        if len(self.timetable.entries) > 1:
            lines[3:3] = [
                f"{'' if row else 'scenes':<9}{line}" for row, line in enumerate(self.timetable.lines())
            ]
        if self.beginning is not None:
            lines.insert(1, f"start    {self.beginning}")
        return lines


def plan(request: Request) -> Plan:
    """Check a request against the files, the machine and the method, and make every choice left open.

    Reads headers, the words and what the video begins with; loads no model.

    Raises:
        SFPPError: Something is impossible; the message says what, and what to do instead.
    """
    frames_in(request.seconds)
    script = read_script(request.prompt, change=request.switch)
    student = check_student(request.student or demo.file(demo.STUDENT), choice=request.weights)
    config = student.config
    assert config is not None
    settings = _settings(request, student)
    space = space_of(config)
    beginning, geometry = _sizes(request, config, settings, space)
    _warn_of_options_without_effect(request, config, settings)
    adapters = tuple(read_adapter(path, config, strength=strength) for path, strength in request.loras)
    table = timetable(script, geometry)
    for warning in (*table.warnings, *table.without_effect(settings)):
        logger.warning("%s", warning)
    source = prompt_source(
        table.prompts,
        config,
        names=[str(entry) for entry in table.entries],
        words=request.words,
        encoder=request.text_encoder,
        tokenizer=request.tokenizer,
        cache=request.text_cache,
    )
    decoder = check_decoder(_decoder_place(request, student), channels=config.channels)
    _check_decoder_fits(decoder, space)
    if (beginning is not None and beginning.encodes) or restarts(settings, geometry):
        check_encoder(request.encoder or _decoder_place(request, student), channels=config.channels)
    enlarge = request.enlarge
    if enlarge is None:
        enlarge = automatic_enlargement(geometry.width, geometry.height)
    check_enlargement(enlarge, width=geometry.width, height=geometry.height)
    _check_controls(request)
    if request.run is None:  # a run finds its own video there
        _check_output(request.out, geometry, enlarge, request.start)
    device = device_named(request.device)
    dtype = dtype_named(request.dtype, device)
    attend = choose(
        request.attention,
        shape=(1, config.heads, geometry.tokens_per_chunk, config.head_dim),
        visible=settings.window_chunks * geometry.tokens_per_chunk,
        like=torch.empty(0, dtype=dtype, device=device),
    )
    decoding = decoder_bytes(
        decoder,
        width=geometry.width,
        height=geometry.height,
        latent_frames=geometry.lead + geometry.chunk,
        dtype=decoder_dtype(device),
        tile=request.tile,
        rest_elsewhere=tiles_rest_on(device) is not None,
    )
    # An encoder is taken for as large as its decoder; it is gone before the student comes, but for restarts.
    encoding = decoding if beginning is not None and beginning.encodes else 0
    expected = forecast(
        config,
        geometry,
        settings,
        dtype,
        storage=request.storage,
        decoder=decoding * (3 if restarts(settings, geometry) else 1),
        text_encoder=Bytes(device=max(source.bytes, encoding)),
        attention_holds_scores=attend is matmul,
    )
    _check_memory(expected, device)
    made = Plan(
        request=request,
        student=student,
        adapters=adapters,
        decoder=decoder,
        timetable=table,
        source=source,
        beginning=beginning,
        geometry=geometry,
        settings=settings,
        enlarge=enlarge,
        device=device,
        dtype=dtype,
        threads=threads_for(request.threads, geometry.tokens_per_chunk * config.dim),
        attend=attend,
        forecast=expected,
    )
    if request.latents is not None:
        check_latents_folder(request.latents, made.latents_info)
    return made


def restarts(settings: RolloutSettings, geometry: VideoGeometry) -> bool:
    """Return whether a window starts anew before the video ends."""
    return settings.overlap > 0 and geometry.chunks > settings.window_chunks


def _warn_of_options_without_effect(
    request: Request, config: StudentConfig, settings: RolloutSettings
) -> None:
    """Say which options do nothing here."""
    without = {
        "--encoder without --start or overlapping windows": request.encoder is not None
        and request.start is None
        and not settings.overlap,
        "--latents beside --run, which keeps them anyway": request.latents is not None
        and request.run is not None,
        "--words beside --text-encoder": request.words is not None and request.text_encoder is not None,
        "--tokenizer without --text-encoder": request.tokenizer is not None and request.text_encoder is None,
        "--text-cache without --text-encoder": request.text_cache is not None
        and request.text_encoder is None,
        "--sink-positions without a sink": "sink_positions" in request.settings and not settings.sink,
        "--preset for a student of the demo's world, which was trained with its own settings": request.preset
        is not None
        and is_of_the_demo(config),
    }
    for option in (option for option, idle in without.items() if idle):
        logger.warning("Without effect, or not what was meant: %s.", option)


def _settings(request: Request, student: FileInfo) -> RolloutSettings:
    """Return how the student is rolled out: as it or a family was made for, and as the user changes it."""
    if request.preset is not None:
        own = of_family(request.preset)
    else:
        own = student.settings or of_family(student.family or SELF_FORCING)
    changed = dict(request.settings)
    if own.sigmas and {"steps", "shift"} & changed.keys():
        changed["sigmas"] = ()  # whoever asks for steps wants them, and not those listed
    return replace(own, **changed)


def _sizes(
    request: Request, config: StudentConfig, settings: RolloutSettings, space: LatentSpace
) -> tuple[Beginning | None, VideoGeometry]:
    """Return what the video begins with and its size, which counts that."""
    native = native_size(config)
    height = native[0] if request.height is None else request.height
    width = native[1] if request.width is None else request.width
    geometry = VideoGeometry(
        height=height,
        width=width,
        frames=frames_in(request.seconds, fps=space.fps),
        chunk=settings.chunk,
        stride=space.spatial_stride,
        fps=space.fps,
    )
    if request.start is None:
        return None, geometry
    beginning = read_beginning(request.start, width=width, height=height, settings=settings, space=space)
    geometry = replace(geometry, lead=beginning.lead)
    beginning.check(geometry)
    return beginning, geometry


def space_of(config: StudentConfig) -> LatentSpace:
    """Return the space a student's latents live in."""
    if is_of_the_demo(config):
        return DEMO
    return WAN_2_2 if config.channels == WAN_2_2.channels else WAN_2_1


def _decoder_place(request: Request, student: FileInfo) -> Path | str:
    """Return the decoder that is asked for, or the demo's own."""
    assert student.config is not None
    if request.decoder is not None:
        return request.decoder
    if not is_of_the_demo(student.config):
        made_for = "2.2" if student.config.channels == WAN_2_2.channels else "2.1"
        raise SettingsError(
            f"this student has no decoder of its own; name one with --decoder: Wan{made_for}_VAE for "
            f"quality, taew{made_for.replace('.', '_')} for speed, or the word preview, which needs no file."
        )
    return demo.file(demo.AUTOENCODER)


def _check_decoder_fits(decoder: DecoderInfo, space: LatentSpace) -> None:
    """Refuse Wan's decoder for the demo and the demo's for Wan: both have 16 channels."""
    if decoder.space.name != space.name:
        raise SettingsError(
            f"the decoder is {decoder.in_words} and the student makes latents of {space.name}; choose the "
            "decoder made for them."
        )


def _check_output(out: str, geometry: VideoGeometry, enlarge: int, start: Path | None) -> None:
    """Refuse an output that cannot be written, will not fit, or replaces what the video begins with."""
    if start is not None and Path(out).exists() and Path(out).samefile(start):
        raise OutputError(f"{out} is what the video begins with; write it to another file.")
    size = forecast_bytes(
        out, frames=geometry.frames, width=geometry.width, height=geometry.height, enlarge=enlarge
    )
    check_output(out, expected_bytes=size)


def _check_controls(request: Request) -> None:
    """Refuse an anchor, a noise of the past or a report that cannot be."""
    Anchor(strength=request.anchor)
    check_context_sigma(request.context_sigma)
    if request.report is None:
        return
    if request.run is not None:
        raise SettingsError(
            "a run does not take --report: what was made before would be missing; measure its video "
            f"afterwards with: python -m sfpp_core report {request.out}"
        )
    ReportFiles.at(request.report).check()


def _check_memory(expected: Forecast, device: torch.device) -> None:
    """Refuse a run that needs more memory than there is."""
    needs = {device: expected.device, torch.device("cpu"): expected.host}
    if device.type == "cpu":
        needs = {device: expected.total}
    for place, needed in needs.items():
        limit = memory_of(place)
        if limit is not None and needed > limit:
            raise SettingsError(
                f"this run needs {expected} of memory and there is {in_words(limit)}; use a smaller window, "
                "width or height, --cache fp8 or host, or for the decoder --tile or taew2_1."
            )


def native_size(config: StudentConfig) -> tuple[int, int]:
    """Return height and width, in pixels, of the frames a student was made for: Wan's or the demo's."""
    if is_of_the_demo(config):
        return demo.SIZE, demo.SIZE
    return (704, 1280) if config.channels == WAN_2_2.channels else (480, 832)

"""Options of open_clip that are refused or ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from training.params.option import option

_AUDIO = "Audio models are not supported yet. Train an image-text model, or use open_clip's main branch for CLAP."
_GENERATIVE = "GenLIP and GenLAP models are not supported yet. CoCa models (`coca_ViT-B-32`) generate captions."


def _later(default: Any, refused: str, metavar: str | None = None, **form: Any) -> Any:
    """Return an option of open_clip's main branch that is refused with any value but its default there."""
    return option(default, metavar=metavar, help="not supported yet", refused=refused, **form)


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class UnsupportedConfig:
    """Options of open_clip that are refused, or ignored with a warning. They are not part of `TrainConfig`.

    An option is refused unless it has its default value in open_clip, so that namespaces of its scripts are accepted.
    """

    group: ClassVar[str] = "unsupported"

    horovod: bool = option(False, help="use torchrun", refused=
        "Horovod is not supported. Start the same command with `torchrun --nproc_per_node N -m training.main`.")
    torchscript: bool = option(False, help="no effect: use --torchcompile")
    trace: bool = option(False, help="use open_clip.trace_model() on a trained model", refused=
        "A traced model cannot be trained. Train without --trace and call `open_clip.trace_model(model)` on the "
        "result.")
    use_bnb_linear: str | None = option(None, metavar="NAME", help="use --precision amp_bf16", refused=
        "The int8 layers of bitsandbytes are not supported. To save memory use --precision amp_bf16 or bf16, and "
        "--grad-checkpointing.")

    audio_ext: str = _later("flac", _AUDIO, "EXT")
    pretrained_audio: str | None = _later(None, _AUDIO, "FILE")
    audio_layer_decay: float | None = _later(None, _AUDIO, "X")
    audio_fill: str = _later("repeatpad", _AUDIO, choices=("pad", "repeat", "repeatpad"))
    audio_trunc: str = _later("rand_trunc", _AUDIO, choices=("rand_trunc", "trunc", "fusion"))
    audio_fusion: bool = _later(False, _AUDIO)
    audio_int16_normalize: bool = _later(False, _AUDIO)
    audio_zeroshot_dataset: str | None = _later(None, _AUDIO, "NAME")
    audio_zeroshot_split: str = _later("train", _AUDIO, "NAME")
    audio_zeroshot_audio_key: str = _later("audio", _AUDIO, "NAME")
    audio_zeroshot_target_key: str = _later("target", _AUDIO, "NAME")
    audio_zeroshot_class_key: str = _later("category", _AUDIO, "NAME")
    audio_zeroshot_templates: str | None = _later(None, _AUDIO, "TEXT", alias="--audio-zeroshot-template")
    audio_zeroshot_workers: int = _later(0, _AUDIO, "N")
    audio_zeroshot_multiprocessing_context: str = _later(
        "forkserver", _AUDIO, choices=("fork", "forkserver", "spawn"))
    audio_multiprocessing_context: str = _later("forkserver", _AUDIO, choices=("fork", "forkserver", "spawn"))
    genlip: bool = _later(False, _GENERATIVE, has_flag=False)
    genlap: bool = _later(False, _GENERATIVE, has_flag=False)
    naflexclap: bool = _later(False, _AUDIO, has_flag=False)
# fmt: on

"""Checks before the first step, so that a run does not fail hours later for a reason that is known at its start.

Options, files and packages are checked before anything is built. Then come checks that need the model, and one batch
of each evaluation set.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from open_clip import device as devices
from open_clip.recipe import read_recipe
from training import compilation, file_utils, optim, precision, ranks
from training.checkpoint import rng
from training.checkpoint.folder_reader import is_folder
from training.data import expand_urls, get_csv_dataset, get_dataset_fn, get_wds_dataset
from training.data.probe import read_first_batch
from training.data.shards.tar import is_local
from training.data.skips import NoUsableSamples
from training.evaluators import class_names
from training.params import CheckpointConfig, DataConfig, TrainConfig
from training.params.checks import reporters, trains
from training.params.option import flag
from training.sharding import shards, units

_SAMPLE_CAPTION = "a photo of a cat"
_LABELLED = ("imagenet_val", "imagenet_v2", "zeroshot_data")


def check_options(cfg: TrainConfig) -> None:
    """Check options, files and packages, without a model or other processes.

    Raises:
        ValueError: there are no data, or an option names something unknown.
        FileNotFoundError: a file or folder does not exist.
        ModuleNotFoundError: a package that an option needs is not installed.
    """
    data = cfg.data
    if not (trains(data) or data.val_data or any(getattr(data, name) for name in _LABELLED)):
        raise ValueError(
            "There are no data. Use --train-data (or --dataset-type synthetic) to train, or --val-data, "
            "--imagenet-val, --imagenet-v2 or --zeroshot-data to evaluate."
        )
    _check_packages(cfg)
    if trains(data):
        optim.check_name(cfg.optim.opt)
        optim.check_options(cfg.optim)
        optim.check_weights(cfg.optim, precision.weights_dtype(cfg.model.precision))
        if _will_shard(cfg):
            shards.check_optimizer(cfg.optim)
    _check_pairs(data)
    for name in _LABELLED:
        folder = getattr(data, name)
        if folder and not os.path.isdir(folder):
            raise FileNotFoundError(f"{flag(name)} {folder}: no such folder (looked for {os.path.abspath(folder)}).")
    if data.zeroshot_data:
        class_names.read_templates(cfg.eval.zeroshot_templates)
        if cfg.eval.zeroshot_classnames is not None:
            class_names.read_text(cfg.eval.zeroshot_classnames, "--zeroshot-classnames")
    _check_resume(cfg.checkpoint.resume)
    if cfg.objective.distill_model is not None and trains(data):
        read_recipe(cfg.objective.distill_model, cfg.objective.distill_pretrained, cfg.model.cache_dir)


def _check_resume(resume: str | None) -> None:
    if resume is None or resume == "latest" or ranks.restarts():
        return
    if not file_utils.check_exists(resume) and not is_folder(resume):
        raise FileNotFoundError(
            f"--resume {resume!r}: there is no such file or folder of a sharded checkpoint. Use --resume latest to "
            "find the newest checkpoint of a run."
        )


def check_device(cfg: TrainConfig) -> None:
    """Check the device that the run will use, before its first use.

    Raises:
        RuntimeError: the device is missing, an environment variable would make the run fail, or torch cannot do what
            the options ask for on the device.
        ModuleNotFoundError: --torchcompile needs something that is not installed.
        ValueError: torch does not know the backend of --torchcompile.
    """
    device = devices.resolve(cfg.distributed.device)
    kind = devices.get(device)
    if _will_shard(cfg):
        units.check_device(device)
    for problem in kind.environment_errors():
        raise RuntimeError(problem)
    if cfg.model.torchcompile:
        _check_compiler(kind, cfg.model.torchcompile_backend or "inductor")


def _will_shard(cfg: TrainConfig) -> bool:
    return cfg.distributed.fsdp and ranks.world_info_from_env()[2] > 1


def _check_compiler(kind: devices.Device, backend: str) -> None:
    import torch._dynamo

    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise ValueError(
            f"--torchcompile-backend {backend!r} is not installed. torch {torch.__version__} has "
            f"{', '.join(torch._dynamo.list_backends())}, and for tests eager and aot_eager."
        )
    missing = kind.why_not_compile() if backend == "inductor" else None
    if missing is not None:
        raise ModuleNotFoundError(f"--torchcompile: {missing}")


def check_compiled_step(cfg: TrainConfig, used: precision.Precision, world: ranks.World) -> None:
    """Check whether a whole step can be compiled with this precision and number of processes.

    Raises:
        ValueError: it cannot.
    """
    if not cfg.model.torchcompile or cfg.model.torchcompile_strategy != "step" or not trains(cfg.data):
        return
    if not compilation.can_trace_backward():
        raise ValueError(
            f"--torchcompile-strategy step needs a newer torch: torch {torch.__version__} cannot compile a backward "
            "pass with the rest of the step. Use --torchcompile-strategy blocks, model or task."
        )
    if world.distributed:
        raise ValueError(
            f"--torchcompile-strategy step works on one process, and this run has {world.world_size}: "
            "DistributedDataParallel splits the graph. Use --torchcompile-strategy blocks, model or task."
        )
    if used.grad_scaler().is_enabled():
        raise ValueError(
            f"--torchcompile-strategy step cannot compile the gradient scaler of --precision {used.name}. Use "
            "--precision amp_bf16, or --torchcompile-strategy blocks, model or task."
        )
    if devices.get(used.device).saturates:
        raise ValueError(
            f"--torchcompile-strategy step needs a device that keeps NaN, to skip steps, and {used.device} does not. "
            "Use --torchcompile-strategy blocks, model or task."
        )


def _pairs(data: DataConfig) -> Iterator[tuple[str, Callable[..., Any]]]:
    """List the image-text data: (path, function that opens it)."""
    for path in (data.train_data, data.val_data):
        if path:
            yield path, get_dataset_fn(path, data.dataset_type)


def _check_pairs(data: DataConfig) -> None:
    for path, make in _pairs(data):
        if make is get_csv_dataset and "://" not in path and not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such CSV file (looked for {os.path.abspath(path)}).")
        if make is get_wds_dataset:
            urls, _ = expand_urls(path)
            if urls and all(is_local(url) for url in urls) and not any(os.path.exists(url) for url in urls):
                first = os.path.abspath(urls[0])
                raise FileNotFoundError(
                    f"None of the {len(urls)} shards of {path} exists. The first one should be {first}."
                )


def _check_packages(cfg: TrainConfig) -> None:
    for package, reason in _packages(cfg):
        if not _is_installed(package):
            raise ModuleNotFoundError(f"{reason} needs the package {package}. Run: pip install {package}")
    sync = cfg.checkpoint
    if sync.remote_sync is not None and sync.remote_sync_protocol == "s3" and shutil.which("aws") is None:
        raise FileNotFoundError(
            f"--remote-sync {sync.remote_sync} needs the command `aws`, which was not found. Install the AWS CLI, or "
            "use --remote-sync-protocol fsspec."
        )
    for name, url in _urls(sync):
        _check_protocol(name, url)


def _packages(cfg: TrainConfig) -> Iterator[tuple[str, str]]:
    """List the packages that the options need: (package, option or path that needs it)."""
    wanted = set(reporters(cfg.logging.report_to))
    if wanted & {"tensorboard", "all"} and cfg.checkpoint.logs is not None:
        yield "tensorboard", f"--report-to {cfg.logging.report_to}"
    if wanted & {"wandb", "all"}:
        yield "wandb", f"--report-to {cfg.logging.report_to}"
    for path, make in _pairs(cfg.data):
        if make is get_csv_dataset:
            yield "pandas", path
        if make is get_wds_dataset:
            yield "webdataset", path
            yield "braceexpand", path
    if cfg.optim.opt.lower().startswith("timm/") and trains(cfg.data):
        yield "timm", f"--opt {cfg.optim.opt}"
    for name, url in _urls(cfg.checkpoint):
        yield "fsspec", f"{name} {url}"


def _urls(cfg: CheckpointConfig) -> Iterator[tuple[str, str]]:
    """List the URLs that fsspec opens: (flag, URL)."""
    if cfg.remote_sync is not None and cfg.remote_sync_protocol == "fsspec":
        yield "--remote-sync", cfg.remote_sync
    if cfg.resume is not None and "://" in cfg.resume:
        yield "--resume", cfg.resume


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _check_protocol(flag: str, url: str) -> None:
    import fsspec

    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = re.search(r"nstall (\w+)", str(error))  # "Install s3fs to access S3"
        advice = f" Run: pip install {package[1]}" if package else ""
        raise ModuleNotFoundError(f"{flag} {url}: {error}.{advice}") from error
    except ValueError as error:
        raise ValueError(f"{flag} {url}: {error}.") from error


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Check that the model reads what the tokenizer gives.

    Raises:
        ValueError: ids are outside of the token embedding, captions may have more tokens than the text tower has
            positions, or batches have padding on which the features depend.
    """
    vocab_size = getattr(model, "vocab_size", None)
    if vocab_size is not None:
        _check_ids(tokenizer([_SAMPLE_CAPTION]), vocab_size)
    if (lengths := _too_long(model, tokenizer)) is not None:
        longest, most = lengths
        raise ValueError(
            f"Captions have up to {longest} tokens, and the text tower reads at most {most}. Add "
            f"--force-context-length {most}, or set context_length in the text_cfg."
        )
    if not getattr(tokenizer, "variable_text", False):
        return
    text = getattr(model, "text", None)
    expected = getattr(getattr(text, "config", None), "pad_token_id", getattr(text, "pad_id", None))
    if expected is not None and expected != tokenizer.pad_token_id:
        raise ValueError(
            f"The text tower takes the id {expected} for padding, but the tokenizer pads with "
            f"{tokenizer.pad_token_id}. Set pad_id in the text_cfg (of a Hugging Face tower: pad_token_id in "
            "hf_model_config), or use the tower's own tokenizer."
        )
    if _reads_padding(model, tokenizer):
        raise ValueError(
            "variable_text pads each batch to its longest caption, and the features of this text tower depend on the "
            "padding. Set variable_text to false in the text_cfg, or use a causal tower with pool_type 'eos', a modern "
            "text tower or a Hugging Face tower."
        )


def _reads_padding(model: Any, tokenizer: Any) -> bool:
    """Return whether the features of a text depend on the number of columns of padding after it."""
    if not getattr(getattr(model, "text", model), "ignores_padding", True):
        return True
    text_lengths = getattr(model, "text_lengths", None)
    lengths = None if text_lengths is None else text_lengths(tokenizer([_SAMPLE_CAPTION]))
    # True if the tower has another padding id, or pools at the highest id and that is the padding.
    return lengths is not None and int(lengths[0]) > len(tokenizer([_SAMPLE_CAPTION], pad=False)[0])


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    highest = int(ids.max())
    if highest >= vocab_size:
        raise ValueError(
            f"The tokenizer gives token ids up to {highest}, but the vocab_size of the model is {vocab_size}. Set "
            "vocab_size or hf_tokenizer_name in the text_cfg of the model."
        )


def check_takes_patches(model: Any) -> None:
    """Raise ValueError if images are converted to patches, which the image tower does not take."""
    if not _takes_patches(model):
        raise ValueError(
            "--aug-cfg naflex=True converts images to sequences of patches, and the model's image tower takes images "
            "of one size. Add --use-naflex or --force-naflex-vision, or leave out naflex."
        )


def _takes_patches(model: Any) -> bool:
    return hasattr(getattr(model, "visual", None), "takes_packed_patches")


def check_teacher(model: Any, teacher: Any, uses_patches: bool = False, tokenizer: Any = None) -> None:
    """Raise ValueError if student and teacher cannot process the same batches.

    Args:
        uses_patches: images are sequences of patches.
        tokenizer: of the student, if the data have captions.
    """
    if uses_patches and not _takes_patches(teacher):
        raise ValueError(
            "--distill-model: images are sequences of patches (--use-naflex), and the teacher's image tower takes "
            "images of one size. Choose a teacher with a NaFlex image tower, or leave out --use-naflex."
        )
    sizes = [] if uses_patches else [("image size", lambda m: getattr(m.visual, "image_size", None))]
    for name, of in (*sizes, ("vocab_size", _vocab_size)):
        ours, theirs = of(model), of(teacher)
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"--distill-model: the teacher's {name} is {theirs} and the model's is {ours}, but both process the "
                "same batches. Choose another teacher, or change the model's image size with --force-image-size."
            )
    if tokenizer is not None:
        _check_teacher_reads(teacher, tokenizer)


def _check_teacher_reads(teacher: Any, tokenizer: Any) -> None:
    """Raise ValueError if captions are longer than the teacher's context, or padded in another way than it needs."""
    if (lengths := _too_long(teacher, tokenizer)) is not None:
        longest, most = lengths
        raise ValueError(
            f"--distill-model: captions have up to {longest} tokens, and the teacher reads at most {most}. Choose "
            f"another teacher, or add --force-context-length {most}."
        )
    if getattr(tokenizer, "variable_text", False) and _reads_padding(teacher, tokenizer):
        raise ValueError(
            "--distill-model: batches are padded to their longest caption (variable_text), and the features of the "
            "teacher depend on the padding. Set variable_text to false in the text_cfg, or choose another teacher."
        )


def _too_long(model: Any, tokenizer: Any) -> tuple[int, int] | None:
    """Return the tokens of the longest caption and those that the model reads; None unless the latter are fewer."""
    longest, most = getattr(tokenizer, "context_length", None), _max_tokens(model)
    return None if longest is None or most is None or longest <= most else (longest, most)


def _max_tokens(model: Any) -> int | None:
    """Return the maximum number of tokens that a text tower reads, None if it is not known or there is none."""
    tower = getattr(model, "text", model)
    positions = getattr(tower, "positional_embedding", None)
    if positions is None:
        return getattr(tower, "max_tokens", None)
    return len(positions) - (getattr(tower, "cls_emb", None) is not None)


def _vocab_size(model: Any) -> int | None:
    return getattr(model, "vocab_size", None)


def check_evaluation_data(model: nn.Module, data: Iterable[Any], device: torch.device) -> None:
    """Check a few samples of each evaluation set in `data`, which are training.data.DataInfo.

    Collective: every rank reads from its part of the data, and all ranks raise the same error.

    Raises:
        ValueError: no rank has a usable sample among the first ones of a set, or token ids do not fit.
    """
    for info in data:
        with rng.untouched(device):
            is_usable, problem, is_fatal = _try_loader(info.dataloader, getattr(model, "vocab_size", None))
        results = ranks.all_gather_object((is_usable, problem, is_fatal))
        problems = [problem for _, problem, _ in results if problem]
        fatal = [problem for _, problem, is_fatal in results if is_fatal]
        if fatal or not any(is_usable for is_usable, _, _ in results):
            raise ValueError((fatal or problems)[0])


def _try_loader(loader: Any, vocab_size: int | None) -> tuple[bool, str, bool]:
    """Return (whether there is a usable sample, the problem, whether it ends the run even if other ranks have none)."""
    try:
        batch = read_first_batch(loader)
        if batch is None:
            return False, f"{loader.source}: there are no samples.", False
        if vocab_size is not None and isinstance(batch.get("text"), Tensor):
            _check_ids(batch["text"], vocab_size)
    except NoUsableSamples as error:
        return False, str(error), False
    except (ValueError, OSError, RuntimeError) as error:
        return False, f"{loader.source}: {error}" if loader.source not in str(error) else str(error), True
    return True, "", False

"""Options of the data for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from training.params.option import option

DATASET_TYPES = ("webdataset", "csv", "imagefolder", "synthetic", "auto")


# fmt: off
# Each option is followed by its help text.
@dataclass(frozen=True)
class DataConfig:
    """The data for training and evaluation, and how they are read."""

    group: ClassVar[str] = "data"

    train_data: str | None = option(None, metavar="PATH", help=
        "training data: a CSV/TSV file, webdataset shards as a brace pattern (`/data/{0000..0099}.tar`), or a .txt "
        "file that lists shards. Join several sources with `::`. Without it (and without --dataset-type synthetic) the "
        "run only evaluates the model")
    train_data_upsampling_factors: str | None = option(None, metavar="F::F", help=
        "sampling weight of each source of --train-data, joined by `::` and relative per sample (`1::2::0.5`: samples "
        "of the second source are drawn twice as often as those of the first). Needs --dataset-resampled. Default: "
        "every shard is equally likely")
    val_data: str | None = option(None, metavar="PATH", help=
        "validation data, in the same formats; used for the loss and retrieval metrics")
    train_num_samples: int | None = option(None, at_least=1, metavar="N", help=
        "samples per epoch over all processes, for webdataset and synthetic data. Default: read from the shards' "
        "`sizes.json` or `__len__`; required if both are missing. Synthetic data: 100. With --dataset-resampled any "
        "number works: it sets how often the run evaluates and saves")
    val_num_samples: int | None = option(None, at_least=1, metavar="N", help=
        "the same for the validation data. It is only used to show progress: every sample is evaluated in any case")
    dataset_type: str = option("auto", choices=DATASET_TYPES, help=
        "format of the data. auto: chosen by the file's extension; imagefolder: one folder of images per class, "
        "captions built from the folder names; synthetic: random data, to measure the speed of everything except data "
        "loading")
    dataset_resampled: bool = option(False, help=
        "webdataset: draw shards with replacement, without end, instead of reading each shard once per epoch. For very "
        "large datasets and weighted sources")
    csv_separator: str = option("\t", metavar="CHAR", help=
        "column separator of CSV files (for a comma: `--csv-separator ,`)")
    csv_img_key: str = option("filepath", metavar="COLUMN", help="CSV column with the image paths")
    csv_caption_key: str = option("title", metavar="COLUMN", help="CSV column with the captions")
    image_key: str = option("jpg;png;jpeg;webp;tif;tiff", metavar="EXT;EXT", help=
        "webdataset: extensions of images. The image of a sample is the first of these members that it has")
    text_key: str = option("txt", metavar="EXT;EXT", help="webdataset: the same for captions")
    json_text_key: str | None = option(None, metavar="FIELD;FIELD", help=
        "webdataset: read the captions from the `json` members instead of those of --text-key. The caption is the "
        "first of these fields that contains text")
    json_text_key_probs: tuple[float, ...] | None = option(None, metavar="P", help=
        "one weight per field of --json-text-key: the order in which the fields are tried is drawn for each (seed, "
        "epoch, sample), each time in proportion to the weights of the remaining fields. Fields of weight 0 come last, "
        "for samples that have no other caption. In evaluation the caption of a sample is the same in every epoch")
    text_pad_multiple: int | None = option(None, at_least=1, metavar="TOKENS", help=
        "for models with `variable_text`, whose batches are padded to their longest caption: pad to a multiple of this "
        "number of tokens (and at most to the context length), so that devices see fewer shapes. Default: 1")
    max_image_pixels: int | None = option(None, at_least=0, metavar="N", help=
        "skip images of --train-data and --val-data that have more pixels (width x height) before they are decoded; "
        "they are counted as huge_image. Default, and 0: Pillow's limit of 89 million")
    fast_decode: bool = option(False, help=
        "decode JPEG images that are at least twice as large as needed at 1/2, 1/4 or 1/8 of their size. Faster for "
        "photographs of several megapixels; pixels differ slightly, see docs/training.md")
    max_bad_fraction: float = option(0.5, at_least=0, at_most=1, metavar="X", help=
        "stop the run when more than this fraction (0 to 1) of the samples or shards read so far, over all processes, "
        "is unusable. Checked each time the log is written. Unusable samples are always skipped and counted; 1 never "
        "stops")
    length_bucketing: bool = option(False, help=
        "make batches of captions of a few lengths, so that less padding is computed and all processes have equal "
        "work. Samples are read in pools, which are sorted by the number of tokens. Every batch has short and long "
        "captions (see --bucket-runs). Useful if the captions have very different lengths; see docs/training.md")
    bucket_pool: int = option(2048, at_least=1, metavar="SAMPLES", help=
        "samples that --length-bucketing sorts together: of each worker for webdataset, of all processes for CSV files "
        "and folders. A larger pool has less padding. At least 8 batches, unless --bucket-runs is 1. A worker keeps "
        "the encoded images of one pool in memory (256 MB at most)")
    bucket_runs: int = option(4, at_least=1, metavar="N", help=
        "lengths in a batch: a batch consists of N runs of captions of nearly equal length, one of short captions, one "
        "of longer ones, and so on. Use the number of --text-groups. More runs have more padding. 1: the order of "
        "open_clip's main branch, whose batches have one length each. It suits models that pad every batch to its "
        "longest caption, but makes the negatives of a caption all as long as the caption")
    bucket_chunk: int = option(128, at_least=1, metavar="SAMPLES", help=
        "samples of a run with --bucket-runs 1: the sorted pool is cut into such runs, which are shuffled")
    bucket_prefetch_pools: int = option(0, at_least=0, metavar="N", help=
        "no effect: workers read the next pool while they decode one")
    workers: int = option(4, at_least=0, metavar="N", help=
        "data loader workers per training process. Use more if the data time in the log is not near 0; 0 decodes "
        "images in the training process itself")
    batch_size: int = option(64, at_least=1, metavar="N", help=
        "samples per process and forward pass. The contrastive loss compares the samples of all processes, so the "
        "effective batch size is this x processes x --accum-freq")
    seed: int = option(0, at_least=0, metavar="N", help=
        "seed of the initial weights, data order and augmentation. The augmentation of a sample depends on (seed, "
        "epoch, sample), not on the number of workers or processes")
    eval_batch_size: int | None = option(None, at_least=1, metavar="N", group="evaluation", help=
        "samples per process and forward pass in evaluations. Default: --batch-size for --val-data, whose loss depends "
        "on it, and twice --batch-size for zero-shot classification, whose accuracy does not. With --use-naflex, "
        "--batch-size counts as at most --naflex-max-tokens-per-batch / the length of evaluation")
    imagenet_val: str | None = option(None, metavar="DIR", group="evaluation", help=
        "zero-shot accuracy on the ImageNet validation images, one folder per class")
    imagenet_v2: str | None = option(None, metavar="DIR", group="evaluation", help="zero-shot accuracy on ImageNet-V2")
    zeroshot_data: str | None = option(None, metavar="DIR", group="evaluation", help=
        "zero-shot accuracy on other images, one folder per class")
# fmt: on

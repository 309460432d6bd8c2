"""`python -m training.main`: parse the options, join the other processes, run, and report how the run ended."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import open_clip
from open_clip import device as devices
from open_clip import progress
from training import logger as logs
from training import loop, preflight, ranks
from training.checkpoint.latest import get_latest_checkpoint, natural_key
from training.checkpoint.rng import random_seed
from training.params import parse_args, sections
from training.run_folder import copy_codebase
from training.signals import Stopped, StopSignals, exit_with

__all__ = ["copy_codebase", "get_latest_checkpoint", "main", "natural_key", "random_seed"]

logger = logging.getLogger(__name__)


def main(args: list[str] | None = None) -> None:
    """Run the command.

    Args:
        args: the options; None: `sys.argv[1:]`.

    Raises:
        SystemExit: an option is invalid; as signals.Stopped: a signal has stopped the run.
        FileExistsError: the run's folder has another run.
        ValueError, FileNotFoundError, RuntimeError: what is wrong with data, weights, device..., and how to fix it.
    """
    options = parse_args(args)
    logs.setup_logging(None, logging.DEBUG if options.debug else logging.INFO)
    world = ranks.world()  # a single process, until it joins the others
    with StopSignals() as signals:
        try:
            cfg = sections(options)
            preflight.check_options(cfg)
            with signals.default_handlers():
                preflight.check_device(cfg)
                world = ranks.init(cfg.distributed)
            with progress.showing(world.is_master):
                loop.run(options, world, signals)
        except (KeyboardInterrupt, Stopped) as stop:
            name = stop.name if isinstance(stop, Stopped) else "Ctrl-C"
            if world.is_master:  # all ranks stop together
                logger.warning(
                    "Stopped by %s. If the run has saved a checkpoint, `--resume latest` with its --name continues "
                    "from there.",
                    name,
                )
            raise
        except Exception as error:
            _log_end(error, options.debug)
            # Leaving the process group is collective, and the other ranks wait elsewhere. The launcher ends them.
            if not ranks.world().distributed:
                ranks.shutdown()
            raise


def _log_end(error: Exception, debug: bool) -> None:
    """Log why the run ends. Add the traceback if the error may be a bug, and with --debug."""
    if devices.is_out_of_memory(error):
        logger.error(
            "Out of memory: %s Try --grad-checkpointing, or a smaller --batch-size with a larger --accum-freq.", error
        )
        return
    known = devices.hint(_text_with_causes(error))
    advice = f" {known}" if known else ""
    if ranks.says_that_a_peer_died(error):
        reason = str(error).strip().partition("\n")[0] + advice
        logger.error("Another process of this run ended, so this one ends. The first error is the cause. %s", reason)
        return
    own_files = Path(open_clip.__file__).parents[1]
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    is_ours = isinstance(error, RuntimeError) and raised_in.is_relative_to(own_files)
    is_for_user = is_ours or isinstance(error, (ValueError, OSError, NotImplementedError, ImportError))
    where = " (--debug shows where.)" if is_for_user and not debug else ""
    logger.error("The run ends: %s%s%s", error, advice, where, exc_info=debug or not is_for_user)


def _text_with_causes(error: BaseException | None) -> str:
    """Return the texts of an error and of its causes, which its own text may shorten."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(texts)


def command() -> int:
    """Run `main` for the command line and return the exit status that a shell expects. Errors have been logged."""
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except Stopped as stopped:
        return int(stopped.code or 0)
    except Exception:
        return 1
    return 0


if __name__ == "__main__":
    exit_with(command())

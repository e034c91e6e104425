"""The command ``gam``: verbs → functions.

A verb is a frozen dataclass whose fields are its flags and whose ``run`` does the work; where a preset or another flag sets the defaults of the others,
its ``defaults`` says how. Its ``first`` names the flags that ``--help`` shows, by title; ``--help-all`` shows all, as ``--help`` does where it names none.
``--config FILE.toml`` gives any flags of any verb. Exit codes: 0 done, 2 the user's input (one line), 3 training diverged, 130 interrupted, 1 our bug.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from gam_lm import __version__
from gam_lm.cli.numbers import check_numbers
from gam_lm.cli.terminal import StandardError, show_anything
from gam_lm.errors import DivergedError, InputError, unknown_name
from gam_lm.runtime import processes
from gam_lm.runtime.allocator import keep_freed_memory
from gam_lm.runtime.files import REASONS
from gam_lm.runtime.imports import take_imports

logger = logging.getLogger("gam_lm")


class Entry(NamedTuple):
    """A line of the list of verbs."""

    home: str
    """Module and class of the verb."""
    summary: str
    """What it does."""
    positional: bool = False
    """Whether what has no default is given without its name."""


VERBS = {
    "train": Entry("train:Train", "make a model of a text: `gam train my_text.txt`"),
    "eval": Entry("evaluate:Eval", "measure a trained model on a text: its loss, and how much context it uses", True),
    "generate": Entry("generate:Generate", "continue a prompt, token by token", True),
    "chat": Entry("chat:Chat", "talk to a model in the terminal", True),
    "read": Entry("read:Read", "read a text of any length once and keep the state, for `gam generate --state`", True),
    "tune-state": Entry("tune_state:TuneState", "train what the memory holds before the first token on another text, for --start", True),
    "export": Entry("export:Export", "write a trained model as an ONNX or torch.export graph, in int8, or as a page that runs it", True),
    "serve": Entry("serve:Serve", "answer the OpenAI clients over HTTP", True),
    "bench": Entry("bench:Bench", "train several models on the same tokens and compare them (Table 1)"),
    "tune": Entry("tune:Tune", "find the best recipe of each model, with the same trials for all"),
    "ablate": Entry("ablate:Ablate", "take the full model apart, one thing at a time (Table 3)"),
    "recall": Entry("recall:Recall", "train models on synthetic recall and measure what they find again"),
    "scale": Entry("scale:Scale", "time and memory of one block against the length of the sequence (Table 2)"),
    "bench-train": Entry("speed:BenchTrain", "tokens per second of whole training steps, beside the machine's matmul peak"),
    "bench-plan": Entry("ladder:BenchPlan", "train a ladder of models on texts of several sizes: what the rules of `gam train` rest on"),
    "bench-decode": Entry("decode:BenchDecode", "time of one more token and bytes of state after long contexts"),
    "bench-tune-state": Entry("bench_state_tuning:BenchTuneState", "what tuning the initial memory is worth, beside adapters of the same size", True),
    "bench-export": Entry("export_speed:BenchExport", "time of an ONNX export and of its graphs, one or the portable two"),
    "bench-gpu": Entry("gpu:BenchGPU", "parity, Table 2, training and decoding on one GPU, in minutes"),
    "bench-distributed": Entry("distributed:BenchDistributed", "whether several processes make the run of one, and how fast"),
    "inspect receptive-field": Entry("inspect:ReceptiveField", "how far back a model can see", True),
    "inspect cost": Entry("inspect:InspectCost", "parameters, operations and memory of a model, also of larger ones of its kind", True),
    "inspect trace": Entry("inspect_text:InspectTrace", "what a model did at each token of a text, as a page or JSON", True),
    "inspect slots": Entry("inspect_text:InspectSlots", "what each slot of a memory is for, as a page or a table", True),
    "data prepare": Entry("data:Prepare", "turn a corpus into token ids ahead of time"),
    "compare": Entry("compare:Compare", "whether one result is better than another: DIR or DIR:MODEL, two or more", True),
    "report": Entry("report:Report", "one page of everything measured: HTML or Markdown from results.json files"),
    "models": Entry("report:Models", "every model by its name: what it changes, and where it comes from"),
    "completion": Entry("completion:Completion", "print a script that completes verbs and flags in bash or zsh", True),
    "env": Entry("report:Env", "what this machine is and which backends it has"),
}
"""Every verb; of one or of two words."""


MEASURING = ("bench", "tune", "ablate", "recall", "scale")
"""Verbs that write results.json, beside those called bench-…"""


class Verb(Protocol):
    """What every verb can do."""

    def run(self) -> None:
        """Do the work."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit."""
    show_anything()
    keep_freed_memory()
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one verb and return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[StandardError()])
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StandardError):
            handler.said.clear()
    for noisy in ("httpx", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    origin = ""
    try:
        if processes.rank():  # the first process speaks for all, and of trouble every one
            logger.setLevel(logging.WARNING)
            origin = f"process {processes.rank()}: "
        arguments = take_imports(arguments)
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_help())
            return 0
        if arguments[0] == "--version":
            print(f"gam-lm {__version__}")
            return 0
        for verb in parse(arguments):
            check_numbers(verb)
            _finish(verb, _name(arguments)[0])
        sys.stdout.flush()
    except InputError as error:
        print(f"gam: {origin}{error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"gam: {origin}{error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if (said := out_of_memory(error)) is None:
            raise
        print(f"gam: {origin}{said}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _close_output()  # whoever read our output has gone
    except OSError as error:
        if error.errno not in REASONS:
            raise
        if error.filename is None:  # printing itself
            _close_output()
        what = "the output" if error.filename is None else repr(os.fsdecode(error.filename))
        print(f"gam: cannot use {what}: {REASONS[error.errno]}; choose another place or make room", file=sys.stderr)
        return 2
    return 0


def _finish(verb: Verb, name: str) -> None:
    """Run a verb. One that measures leaves the file that repeats it, also where it was interrupted."""
    from gam_lm.cli.config_file import keep_repeating
    from gam_lm.runtime.workers import is_worker

    keeps = (name in MEASURING or name.startswith("bench-")) and not is_worker() and not getattr(verb, "dry_run", False)
    try:
        verb.run()
    except (KeyboardInterrupt, DivergedError):  # the folder is this command's; after a refusal it may be another's
        if keeps:
            keep_repeating(verb)
        raise
    if keeps:
        keep_repeating(verb)


def _close_output() -> None:
    """Nothing is left to print to; Python would try once more at the end."""
    sys.stdout = None


def out_of_memory(error: BaseException) -> str | None:
    """One line for a lack of memory, which torch reports as a RuntimeError; None for any other error."""
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error))
    known = isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)
    amount = f" (asked for {asked[1]} more)" if asked else ""
    return f"the memory does not suffice{amount}: use a smaller hidden_size, batch_size, context or vocab_size" if known else None


def parse(arguments: list[str]) -> list[Verb]:
    """The verb that the arguments name, with its flags; several for a preset of several setups. Raises InputError for words that are none of its flags."""
    import tyro

    from gam_lm.cli.config_file import with_config
    from gam_lm.cli.flag_errors import in_one_line, refuse_empty
    from gam_lm.cli.flag_list import flags_of
    from gam_lm.cli.sweep import take_sweep

    name, rest = _name(arguments)
    entry = VERBS[name]
    kind = verb_class(name)
    flags = list(flags_of(kind, positional_required=entry.positional))
    refuse_empty(flags, rest)
    rest = with_config(rest, flags, getattr(kind, "one_of", ()))
    asked = {"-h", "--help", "--help-all"} & set(rest)
    if asked:
        from gam_lm.cli.help import show_help

        others = [word for word in rest if word not in asked]
        default = kind.defaults(others)[0] if hasattr(kind, "defaults") else None
        show_help(kind, default, name, all_flags="--help-all" in asked, positional=entry.positional)
        raise SystemExit(0)
    rest, sweep = take_sweep(rest, flags) if "sweep" in kind.__dataclass_fields__ else (rest, {})
    # `gam eval RUN`: what has no default is positional; elsewhere everything is a flag.
    positional = (tyro.conf.PositionalRequiredArgs,) if entry.positional else ()
    defaults = kind.defaults(rest) if hasattr(kind, "defaults") else [None]
    with in_one_line(name, flags, rest):
        verbs = [tyro.cli(kind, args=rest, prog=f"gam {name}", default=each, config=positional) for each in defaults]
    return [dataclasses.replace(verb, sweep=sweep) for verb in verbs] if sweep else verbs


def verb_class(name: str) -> type[Any]:
    """The class of a verb."""
    module, attribute = VERBS[name].home.split(":")
    kind: type[Any] = getattr(import_module(f"gam_lm.cli.{module}"), attribute)
    return kind


def _name(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb's name of one or two words, and the arguments after it. Raises InputError with the nearest name."""
    first, second = arguments[0], " ".join(arguments[:2])
    if first in VERBS:
        return first, arguments[1:]
    if second in VERBS:
        return second, arguments[2:]
    below = [name for name in VERBS if name.startswith(first + " ")]
    if below:
        raise InputError(f"verb {second!r} is not known: use " + " or ".join(f"`gam {name}`" for name in below))
    raise unknown_name("verb", first, {name.split(" ")[0] for name in VERBS})


def _help() -> str:
    from gam_lm.presets.setups import PRESETS, RECALL, SCALING

    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:{width}}  {entry.summary}" for name, entry in VERBS.items())
    summaries = {name: each.summary for setups in (PRESETS, RECALL, SCALING) for name, each in setups.items()}
    presets = "\n".join(f"  {name}: {summary}" for name, summary in summaries.items())
    return (
        "gam: Gated Associative Memory language models\n\nusage: gam VERB [flags]; gam VERB --help lists the flags (--help-all where those are only the first)\n\n"
        f"verbs:\n{verbs}\n\nwith any of them: --config FILE.toml gives its flags; --import PATH_OR_MODULE loads a mixer of your own "
        "(examples/my_mixer.py)\n\n"
        f"presets (`gam bench --preset paper` is Table 1 whole):\n{presets}"
    )

"""The command ``nanokimi``: one subcommand, one function. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import errno
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nanokimi.cli_settings import Parser, add_settings, gather_settings
from nanokimi.config import TrainConfig, field_names
from nanokimi.console import complain, escaped, log, protect_streams, show, why_result_is_lost
from nanokimi.errors import RunError, UserError
from nanokimi.files import expand_home, provide_home
from nanokimi.inference.commands import add_generate_arguments
from nanokimi.insight.planner import add_plan_arguments, plan_lines
from nanokimi.serve.arguments import add_serve_arguments, options_of


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns its exit code: 0, 1 at run time, 2 for a mistake in the input, 130 after Ctrl-C."""
    protect_streams()
    provide_home()
    args = build_parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        if reason := why_result_is_lost():
            raise RunError(f"the result cannot be written to stdout: {reason}")
        return code
    except UserError as error:
        complain(f"nanokimi: {error}")
        return 2
    except RunError as error:
        print(escaped(f"nanokimi: {error}"), file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        complain(f"nanokimi: {error.filename}: {error.strerror}: choose a shorter name")
        return 2
    except MemoryError:
        print(
            "nanokimi: out of memory: end other programs, or take a smaller model or a shorter context", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("nanokimi: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = Parser(prog="nanokimi", description="Train, understand and run Kimi-K2-style language models of your own.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    add_train(commands)
    add_generate(commands)
    add_serve(commands)
    add_prepare(commands)
    add_tokenizer(commands)
    add_inspect(commands)
    add_eval(commands)
    add_export(commands)
    add_import(commands)
    add_demo(commands)
    add_plan(commands)
    add_doctor(commands)
    return parser


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, more: str = "") -> Any:
    """A parser for ``nanokimi NAME``, which calls ``run``; ``more`` stands in its own ``--help`` only."""
    description = f"{about[0].upper()}{about[1:]}. {more}"
    parser = commands.add_parser(name, help=about, description=description)
    parser.set_defaults(run=run)
    return parser


def add_family(commands: Any, name: str, members: str, about: str) -> Any:
    """The subcommands of ``nanokimi NAME``, called ``members`` in its ``--help``."""
    parser = commands.add_parser(name, help=about)
    return parser.add_subparsers(title=f"{members}s", metavar=members.upper(), required=True, parser_class=Parser)


# ---- train --------------------------------------------------------------------------------------


def add_train(commands: Any) -> None:
    """``nanokimi train``: every field of TrainConfig is a flag of the same name."""
    parser = add_command(commands, "train", train, "train a model on text")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir")
    parser.add_argument("--checkpoint_path", default="", metavar="FILE", help="with --resume: go on from this one")
    about = "with --resume: settings that may differ from the checkpoint's"
    parser.add_argument("--override", default="", metavar="FIELD,...", help=about)
    about = "save and end after this step, with the schedule of the whole run; --resume goes on"
    parser.add_argument("--stop_after", type=int, default=0, metavar="N", help=about)
    about = "only see whether N steps, and N more after a resume, equal 2 N steps to the bit; writes nothing elsewhere"
    parser.add_argument("--verify_resume", type=int, metavar="N", help=about)
    add_settings(parser, field_names(TrainConfig))


def train(args: argparse.Namespace) -> int:
    train_values, model_values = gather_settings(args)

    from nanokimi.training.run import TrainArguments, run_training

    override = frozenset(name.strip().replace("-", "_") for name in args.override.split(",") if name.strip())
    arguments = TrainArguments(
        train_values, model_values, args.resume, args.checkpoint_path, override, stop_after=args.stop_after
    )
    if args.verify_resume is None:
        return run_training(arguments)

    from nanokimi.training.verify_resume import verify_resume

    return verify_resume(arguments, args.verify_resume)


# ---- generate, chat, serve ----------------------------------------------------------------------


def add_generate(commands: Any) -> None:
    """``nanokimi generate`` and ``nanokimi chat``."""
    for name, about in (("generate", "continue a prompt"), ("chat", "talk to a model in the terminal")):
        parser = add_command(commands, name, generate, about)
        add_generate_arguments(parser)
        parser.set_defaults(interactive=name == "chat")


def generate(args: argparse.Namespace) -> int:
    from nanokimi.inference.commands import run_generate

    return run_generate(args)


def add_serve(commands: Any) -> None:
    """``nanokimi serve``: the API of OpenAI and a web page."""
    parser = add_command(commands, "serve", serve, "serve a model to programs and browsers (needs nanokimi[serve])")
    add_serve_arguments(parser)


def serve(args: argparse.Namespace) -> int:
    options = options_of(args)

    from nanokimi.serve.server import run_serve

    return run_serve(options)


# ---- data: prepare, tokenizer, inspect ----------------------------------------------------------


def add_prepare(commands: Any) -> None:
    """``nanokimi prepare``: text to train on."""
    sources = add_family(commands, "prepare", "source", "make a text or token files to train on")
    about = "the source code of this machine's Python standard library, and the language reference, as one text"
    stdlib = add_command(sources, "stdlib", prepare_stdlib, about)
    stdlib.add_argument("--output", default="data/train.txt", metavar="FILE", help="(default: %(default)s)")

    more = (
        "Reads what `nanokimi train` would read with the same flags and writes its tokens, once. If it is stopped, the "
        "same command goes on. Train on the result with --dataset tokenbin."
    )
    tokens = add_command(sources, "tokens", prepare_tokens, "token files from any source of text", more)
    tokens.add_argument("--output", default="data/tokens", metavar="FOLDER", help="(default: %(default)s)")
    about = "begin another file after about this many tokens (default: %(default)s)"
    tokens.add_argument("--shard_tokens", type=int, default=100_000_000, metavar="N", help=about)
    add_settings(tokens, field_names(TrainConfig, used_by="prepare"))


def prepare_stdlib(args: argparse.Namespace) -> int:
    from nanokimi.data.prepare import prepare_stdlib as prepare

    show(prepare(args.output))
    return 0


def prepare_tokens(args: argparse.Namespace) -> int:
    train_values, model_values = gather_settings(args)

    from nanokimi.data.prepare import prepare_tokens as prepare

    show(prepare(train_values, model_values, Path(args.output), shard_tokens=args.shard_tokens, log=log))
    return 0


def add_tokenizer(commands: Any) -> None:
    """``nanokimi tokenizer train``: a byte-level BPE of one's own."""
    actions = add_family(commands, "tokenizer", "action", "train a tokenizer")
    parser = add_command(actions, "train", train_tokenizer, "train a byte-level BPE tokenizer on a text")
    parser.add_argument("text", metavar="FILE", help="text in UTF-8")
    parser.add_argument("--vocab_size", type=int, default=4096, metavar="N", help="entries (default: %(default)s)")
    parser.add_argument("--output", default="data/tokenizer.json", metavar="FILE", help="(default: %(default)s)")


def train_tokenizer(args: argparse.Namespace) -> int:
    from nanokimi.data.sources import train_tokenizer_on

    show(train_tokenizer_on(args.text, args.vocab_size, args.output))
    return 0


def add_inspect(commands: Any) -> None:
    """``nanokimi inspect data``: what training will see."""
    subjects = add_family(commands, "inspect", "subject", "look at the data before you train on it")
    parser = add_command(subjects, "data", inspect_data, "show what training will see, read the way training reads it")
    add = parser.add_argument
    about = "sequences to look at; at most one epoch of a source that ends (default: %(default)s)"
    add("--sequences", type=int, default=1000, metavar="N", help=about)
    add("--show", type=int, default=2, metavar="N", help="sequences to print (default: %(default)s)")
    about = "picture of how long the documents are (default: %(default)s)"
    add("--output", default="data_lengths.png", metavar="FILE.png", help=about)
    add_settings(parser, field_names(TrainConfig, used_by="inspect"))


def inspect_data(args: argparse.Namespace) -> int:
    train_values, model_values = gather_settings(args)

    from nanokimi.insight.inspect_data import run_inspect

    return run_inspect(train_values, model_values, sequences=args.sequences, show=args.show, output=Path(args.output))


# ---- eval ---------------------------------------------------------------------------------------


def add_eval(commands: Any) -> None:
    """``nanokimi eval``: how good a model is."""
    about = "measure a model: bits per byte, multiple choice, tasks of lm-evaluation-harness"
    more = "Without a text and without --tasks it is measured on the held-out part of the text it was trained on."
    parser = add_command(commands, "eval", evaluate, about, more)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint, or a folder in Hugging Face format")
    about = "which part of the text to score {all,held_out} (default: all of a text that is named here, else held_out)"
    add("--part", default="", metavar="PART", help=about)
    about = "tokens scored per window; the ones before are their context; 0 = all of it (default: %(default)s)"
    add("--stride", type=int, default=0, metavar="N", help=about)
    about = "score only the first N tokens of each text; 0 = all (default: %(default)s)"
    add("--max_tokens", type=int, default=0, metavar="N", help=about)
    about = "questions to answer: files (.jsonl) and names of harness tasks, separated by commas"
    add("--tasks", default="", metavar="TASK,...", help=about)
    add("--include_path", default="", metavar="FOLDER", help="YAML files with harness tasks of your own")
    add("--num_fewshot", type=int, metavar="N", help="solved examples in front of each question of a harness task")
    about = "answer only the first N questions of each task; 0 = all (default: %(default)s)"
    add("--limit", type=int, default=0, metavar="N", help=about)
    add("--output", default="", metavar="FILE.json", help="write all results and settings to this file")
    about = "windows per forward pass; the results are the same (default: 8)"
    add("--batch_size", default=argparse.SUPPRESS, metavar="N", help=about)
    about = "bf16 autocast {auto,on,off} (default: off)"
    add("--mixed_precision", nargs="?", const="on", default=argparse.SUPPRESS, metavar="STR", help=about)
    add_settings(parser, field_names(TrainConfig, used_by="eval"))


def evaluate(args: argparse.Namespace) -> int:
    train_values, model_values = gather_settings(args)

    from nanokimi.insight.evaluate import EvalOptions, run_eval

    options = EvalOptions(
        part=args.part.replace("-", "_"),
        stride=args.stride,
        max_tokens=args.max_tokens,
        tasks=tuple(expand_home(name.strip()) for name in args.tasks.split(",") if name.strip()),
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        output=args.output,
    )
    return run_eval(args.model, train_values, model_values, options)


# ---- export, import -----------------------------------------------------------------------------


def add_export(commands: Any) -> None:
    """``nanokimi export``: a trained model for other programs."""
    formats = add_family(commands, "export", "format", "write a model for other programs")
    hf = add_command(formats, "hf", export_hf, "a folder for transformers and everything that reads its format")
    gguf = add_command(formats, "gguf", export_gguf, "a file for llama.cpp")
    for parser, target, dtypes in ((hf, "FOLDER", "f32,f16,bf16"), (gguf, "FILE.gguf", "f32,f16,bf16,q8_0")):
        parser.add_argument("checkpoint", metavar="CHECKPOINT", help="such as checkpoints/final.pt")
        parser.add_argument("target", metavar=target, help="what to write; must not exist yet")
        about = f"number format of the weights {{auto,{dtypes}}}; auto = as they are stored (default: %(default)s)"
        parser.add_argument("--dtype", default="auto", help=about)
        about = "do not load the result into another engine to compare what it computes"
        parser.add_argument("--no_compare", action="store_true", help=about)
    about = "largest file of weights; more are split over several files (default: %(default)s)"
    hf.add_argument("--max_shard_gb", type=float, default=5.0, metavar="GB", help=about)
    hf.add_argument("--push", default="", metavar="OWNER/NAME", help="then upload the folder to the Hugging Face hub")
    hf.add_argument("--public", action="store_true", help="with --push: let everyone see a new repository")


def export_hf(args: argparse.Namespace) -> int:
    if not 0 < args.max_shard_gb < math.inf:
        raise UserError(f"--max_shard_gb must be positive and finite, got {args.max_shard_gb:g}")
    if args.public and not args.push:
        raise UserError("--public says who may see an upload: add --push OWNER/NAME, or leave it out")

    from nanokimi.interop.commands import ExportOptions, export_hf

    options = ExportOptions(Path(args.checkpoint), Path(args.target), args.dtype, not args.no_compare)
    return export_hf(options, shard_bytes=int(args.max_shard_gb * 1e9), push=args.push, public=args.public)


def export_gguf(args: argparse.Namespace) -> int:
    from nanokimi.interop.commands import ExportOptions, export_gguf

    return export_gguf(ExportOptions(Path(args.checkpoint), Path(args.target), args.dtype, not args.no_compare))


def add_import(commands: Any) -> None:
    """``nanokimi import``: a checkpoint of a model that others trained."""
    formats = add_family(commands, "import", "format", "make a checkpoint from a model that others trained")
    about = "a folder in Hugging Face format with a DeepSeek-V3, DeepSeek-V2, Kimi K2 or Moonlight model"
    parser = add_command(formats, "hf", import_hf, about)
    parser.add_argument("folder", metavar="FOLDER", help="with config.json, safetensors and tokenizer.json")
    parser.add_argument("--output", default="checkpoints/imported.pt", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--tokenizer", default="", metavar="FILE", help="instead of the folder's own tokenizer.json")


def import_hf(args: argparse.Namespace) -> int:
    from nanokimi.interop.commands import import_hf

    return import_hf(Path(args.folder), Path(args.output), tokenizer=args.tokenizer)


# ---- demo, plan, doctor ---------------------------------------------------------------------------------


def add_demo(commands: Any) -> None:
    """``nanokimi demo``: from nothing to a trained model in minutes."""
    about = "train a small model on this machine's Python library and watch it learn"
    parser = add_command(commands, "demo", demo, about)
    parser.add_argument("--seconds", type=float, default=180.0, help="training time (default: %(default)s)")
    parser.add_argument("--output_dir", default="runs/demo", metavar="FOLDER", help="(default: %(default)s)")


def demo(args: argparse.Namespace) -> int:
    from nanokimi.demo import run_demo

    return run_demo(Path(args.output_dir), args.seconds)


def add_plan(commands: Any) -> None:
    """``nanokimi plan``: what training takes, before a device is rented."""
    about = "compute memory, traffic and time of training on many devices"
    more = (
        "Shows memory per device by component, and traffic, FLOPs and time per step, for the layout that you name or "
        "for all that are worth a look. It is all computed; nothing is run."
    )
    parser = add_command(commands, "plan", plan, about, more)
    add_plan_arguments(parser)
    add_settings(parser, field_names(TrainConfig, used_by="plan"))


def plan(args: argparse.Namespace) -> int:
    show("\n".join(plan_lines(args, *gather_settings(args))))
    return 0


def add_doctor(commands: Any) -> None:
    """``nanokimi doctor``: what this machine has, and what will go wrong on it."""
    about = "look at this machine: versions, memory, disk, compiler, speed; and at what will go wrong"
    parser = add_command(commands, "doctor", doctor, about, "Exits with 1 if something will fail.")
    parser.add_argument("--output_dir", default=".", metavar="FOLDER", help="of a run (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def doctor(args: argparse.Namespace) -> int:
    from nanokimi.insight.doctor import run_doctor

    return run_doctor(Path(args.output_dir), as_json=args.json)

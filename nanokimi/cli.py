"""The command ``nanokimi``: one subcommand, one function. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from nanokimi.cli_settings import (
    DATA_FIELDS,
    EVAL_FIELDS,
    TRAIN_FIELDS,
    Parser,
    add_settings,
    gather_settings,
    spellings,
)
from nanokimi.console import complain, log, show
from nanokimi.errors import RunError, UserError
from nanokimi.inference.commands import add_generate_arguments
from nanokimi.insight.plan_report import PLAN_FIELDS, add_plan_arguments, plan_lines, question_of
from nanokimi.serve.arguments import add_serve_arguments, options_of


def entry() -> NoReturn:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns its exit code: 0, 1 at run time, 2 for a mistake in the input, 130 after Ctrl-C."""
    args = build_parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        return code
    except UserError as error:
        complain(f"nanokimi: {error}")
        return 2
    except RunError as error:
        print(f"nanokimi: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("nanokimi: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = Parser(prog="nanokimi", description="Train, understand and run Kimi-K2-style language models of your own.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    add_train(commands)
    for name, about in (("generate", "continue a prompt"), ("chat", "talk to a model in the terminal")):
        command = commands.add_parser(name, help=about)
        add_generate_arguments(command)
        command.set_defaults(run=generate, interactive=name == "chat")
    add_serve(commands)
    add_prepare(commands)
    add_tokenizer(commands)
    add_inspect(commands)
    add_eval(commands)
    add_export(commands)
    add_import(commands)
    add_demo(commands)
    add_plan(commands)
    return parser


# ---- train --------------------------------------------------------------------------------------


def add_train(commands: Any) -> None:
    """``nanokimi train``: every field of TrainConfig is a flag of the same name."""
    parser = commands.add_parser("train", help="train a model", description="Train a model on a text.")
    add_settings(parser, TRAIN_FIELDS)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir")
    parser.add_argument(*spellings("checkpoint_path"), default="", metavar="FILE", help="with --resume: from this one")
    parser.add_argument("--override", default="", metavar="FIELD,...", help="fields a resume may change all the same")
    parser.set_defaults(run=train)


def train(args: argparse.Namespace) -> int:
    """``nanokimi train``."""
    train_values, model_values = gather_settings(args)

    from nanokimi.training.run import Request, run_training

    override = frozenset(name.strip().replace("-", "_") for name in args.override.split(",") if name.strip())
    return run_training(Request(train_values, model_values, args.resume, args.checkpoint_path, override))


# ---- the other commands -------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """``nanokimi generate`` and ``nanokimi chat``."""
    from nanokimi.inference.commands import run_generate

    return run_generate(args)


def add_serve(commands: Any) -> None:
    """``nanokimi serve``: the API of OpenAI and a web page."""
    parser = commands.add_parser("serve", help="serve a model to programs and browsers (extra: serve)")
    add_serve_arguments(parser)
    parser.set_defaults(run=serve)


def serve(args: argparse.Namespace) -> int:
    """``nanokimi serve``."""
    options = options_of(args)

    from nanokimi.serve.run import run_serve

    return run_serve(options)


def add_prepare(commands: Any) -> None:
    """``nanokimi prepare``: text to train on."""
    parser = commands.add_parser("prepare", help="make a text to train on")
    sources = parser.add_subparsers(title="sources", metavar="SOURCE", required=True, parser_class=Parser)
    stdlib = sources.add_parser(
        "stdlib", help="the Python standard library of this machine, and its language reference"
    )
    stdlib.add_argument("--output", default="data/train.txt", metavar="FILE", help="(default: %(default)s)")
    stdlib.set_defaults(run=prepare_stdlib)
    tokens = sources.add_parser(
        "tokens", help="token files of any source of text",
        description="Tokenises once what `nanokimi train` would read with the same flags. Killed, it goes on when "
        "called again. Train on the result with --dataset tokenbin.",
    )  # fmt: skip
    add_settings(tokens, DATA_FIELDS - {"mix", "seed", "num_workers", "val_tokens", "shuffle_buffer"})
    tokens.add_argument("--output", default="data/tokens", metavar="FOLDER", help="(default: %(default)s)")
    tokens.add_argument(
        *spellings("shard_tokens"), type=int, default=100_000_000, metavar="N",
        help="begin another file after about so many tokens (default: %(default)s)",
    )  # fmt: skip
    tokens.set_defaults(run=prepare_tokens)


def prepare_stdlib(args: argparse.Namespace) -> int:
    """``nanokimi prepare stdlib``."""
    from nanokimi.data.stdlib import prepare_stdlib as prepare

    print(prepare(args.output))
    return 0


def prepare_tokens(args: argparse.Namespace) -> int:
    """``nanokimi prepare tokens``."""
    train_values, model_values = gather_settings(args)

    from nanokimi.data.prepare import prepare_tokens as prepare

    print(prepare(train_values, model_values, Path(args.output), shard_tokens=args.shard_tokens, log=log))
    return 0


def add_tokenizer(commands: Any) -> None:
    """``nanokimi tokenizer train``: a byte-level BPE of one's own."""
    parser = commands.add_parser("tokenizer", help="train a tokenizer")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)
    action = actions.add_parser("train", help="a byte-level BPE from a text")
    action.add_argument("text", metavar="FILE", help="UTF-8 text")
    action.add_argument(*spellings("vocab_size"), type=int, default=4096, help="entries (default: %(default)s)")
    action.add_argument("--output", default="data/tokenizer.json", metavar="FILE", help="(default: %(default)s)")
    action.set_defaults(run=train_tokenizer)


def train_tokenizer(args: argparse.Namespace) -> int:
    """``nanokimi tokenizer train``."""
    from nanokimi.data.sources import train_tokenizer_on

    print(train_tokenizer_on(args.text, args.vocab_size, args.output))
    return 0


def add_inspect(commands: Any) -> None:
    """``nanokimi inspect data``: what training will see."""
    parser = commands.add_parser("inspect", help="look at what there is to learn from")
    subjects = parser.add_subparsers(title="subjects", metavar="SUBJECT", required=True, parser_class=Parser)
    data = subjects.add_parser(
        "data", help="what training will see", description="What training will see, read the way training reads it."
    )
    add_settings(data, DATA_FIELDS)
    data.add_argument(
        "--sequences", type=int, default=1000, metavar="N",
        help="how many to look at; of a source that ends, at most one epoch (default: %(default)s)",
    )  # fmt: skip
    data.add_argument("--show", type=int, default=2, metavar="N", help="sequences printed (default: %(default)s)")
    data.add_argument(
        "--output", default="data_lengths.png", metavar="FILE.png",
        help="picture of the documents' lengths (default: %(default)s)",
    )  # fmt: skip
    data.set_defaults(run=inspect_data)


def inspect_data(args: argparse.Namespace) -> int:
    """``nanokimi inspect data``."""
    train_values, model_values = gather_settings(args)

    from nanokimi.insight.inspect_data import run_inspect

    return run_inspect(train_values, model_values, sequences=args.sequences, show=args.show, output=Path(args.output))


def add_eval(commands: Any) -> None:
    """``nanokimi eval``: how good a model is."""
    parser = commands.add_parser(
        "eval", help="measure a model: bits per byte, multiple choice, tasks of lm-evaluation-harness",
        description="Measures a model on a text, on questions of your own and on tasks of lm-evaluation-harness. "
        "Without a text and without --tasks: on the held-out part of what it was trained on.",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, or a folder in Hugging Face format")
    add_settings(parser, EVAL_FIELDS)
    parser.add_argument(
        "--batch_size", "--batch-size", default=argparse.SUPPRESS, metavar="N",
        help="windows per forward pass; no result depends on it (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--mixed_precision", "--mixed-precision", nargs="?", const="on", default=argparse.SUPPRESS, metavar="STR",
        help="bf16 autocast {auto,on,off} (default: off)",
    )  # fmt: skip
    add = parser.add_argument
    add("--part", default="", metavar="PART", help="score {all,held_out} of the text (default: all of a named one)")
    add("--stride", type=int, default=0, metavar="N", help="tokens predicted per window (default: the whole context)")
    add(*spellings("max_tokens"), type=int, default=0, metavar="N", help="score the first N of each text; 0 = all")
    add("--tasks", default="", metavar="TASK,...", help="files of questions (.jsonl), names of tasks of the harness")
    add(*spellings("include_path"), default="", metavar="FOLDER", help="YAML files of harness tasks of your own")
    add(*spellings("num_fewshot"), type=int, metavar="N", help="solved examples before each question of the harness")
    add("--limit", type=int, default=0, metavar="N", help="the first N questions of each task; 0 = all")
    add("--output", default="", metavar="FILE.json", help="everything that was found, and how")
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """``nanokimi eval``."""
    train_values, model_values = gather_settings(args)

    from nanokimi.insight.eval_model import Request, run_eval

    request = Request(
        args.part.replace("-", "_"), args.stride, args.max_tokens,
        tuple(name.strip() for name in args.tasks.split(",") if name.strip()),
        args.include_path, args.num_fewshot, args.limit, args.output,
    )  # fmt: skip
    return run_eval(args.model, train_values, model_values, request)


def add_export(commands: Any) -> None:
    """``nanokimi export``: a trained model for other programs."""
    parser = commands.add_parser("export", help="write a model for other programs")
    formats = parser.add_subparsers(title="formats", metavar="FORMAT", required=True, parser_class=Parser)
    hf = formats.add_parser("hf", help="a folder for transformers and all that reads its format")
    gguf = formats.add_parser("gguf", help="a file for llama.cpp")
    for action, target, dtypes in ((hf, "FOLDER", "f32,f16,bf16"), (gguf, "FILE.gguf", "f32,f16,bf16,q8_0")):
        action.add_argument("checkpoint", metavar="CHECKPOINT", help="such as checkpoints/final.pt")
        action.add_argument("target", metavar=target, help="a new one")
        about = f"type of the weights {{auto,{dtypes}}}; auto: as they are stored (default: %(default)s)"
        action.add_argument("--dtype", default="auto", help=about)
        about = "do not reload the result in an independent engine"
        action.add_argument(*spellings("no_compare"), action="store_true", help=about)
    hf.add_argument(
        *spellings("max_shard_gb"), type=float, default=5.0, metavar="GB",
        help="split weights that take more over several files (default: %(default)s)",
    )  # fmt: skip
    hf.add_argument("--push", default="", metavar="OWNER/NAME", help="then upload the folder to the Hugging Face hub")
    hf.add_argument("--public", action="store_true", help="with --push: let everyone see a new repository")
    hf.set_defaults(run=export_hf)
    gguf.set_defaults(run=export_gguf)


def export_hf(args: argparse.Namespace) -> int:
    """``nanokimi export hf``."""
    if not 0 < args.max_shard_gb < math.inf:
        raise UserError(f"--max_shard_gb must be positive and finite, got {args.max_shard_gb:g}")
    if args.public and not args.push:
        raise UserError("--public says who may see an upload: add --push OWNER/NAME, or leave it out")

    from nanokimi.interop.commands import ExportOptions, export_hf

    options = ExportOptions(Path(args.checkpoint), Path(args.target), args.dtype, not args.no_compare)
    return export_hf(options, shard_bytes=int(args.max_shard_gb * 1e9), push=args.push, public=args.public)


def export_gguf(args: argparse.Namespace) -> int:
    """``nanokimi export gguf``."""
    from nanokimi.interop.commands import ExportOptions, export_gguf

    return export_gguf(ExportOptions(Path(args.checkpoint), Path(args.target), args.dtype, not args.no_compare))


def add_import(commands: Any) -> None:
    """``nanokimi import``: a checkpoint of a model that others trained."""
    parser = commands.add_parser("import", help="make a checkpoint of a model from elsewhere")
    formats = parser.add_subparsers(title="formats", metavar="FORMAT", required=True, parser_class=Parser)
    hf = formats.add_parser("hf", help="a folder with the architecture of DeepSeek-V3, V2, Kimi K2 or Moonlight")
    hf.add_argument("folder", metavar="FOLDER", help="with config.json, safetensors and tokenizer.json")
    hf.add_argument("--output", default="checkpoints/imported.pt", metavar="FILE", help="(default: %(default)s)")
    hf.add_argument("--tokenizer", default="", metavar="FILE", help="in the place of the folder's own tokenizer.json")
    hf.set_defaults(run=import_hf)


def import_hf(args: argparse.Namespace) -> int:
    """``nanokimi import hf``."""
    from nanokimi.interop.commands import import_hf

    return import_hf(Path(args.folder), Path(args.output), tokenizer=args.tokenizer)


def add_demo(commands: Any) -> None:
    """``nanokimi demo``: from nothing to a trained model in minutes."""
    parser = commands.add_parser("demo", help="train a small model on this machine's Python library and watch it learn")
    parser.add_argument("--seconds", type=float, default=180.0, help="training time (default: %(default)s)")
    parser.add_argument(*spellings("output_dir"), default="runs/demo", help="(default: %(default)s)")
    parser.set_defaults(run=demo)


def demo(args: argparse.Namespace) -> int:
    """``nanokimi demo``."""
    from nanokimi.demo import run_demo

    return run_demo(Path(args.output_dir), args.seconds)


def add_plan(commands: Any) -> None:
    """``nanokimi plan``: what training takes, before a device is rented."""
    parser = commands.add_parser(
        "plan", help="memory, traffic and time of training on many devices",
        description="Memory of a device by component, traffic, FLOPs and time of a step: of the layout that is named, "
        "or of all that are worth a look. Computed, nothing is run.",
    )  # fmt: skip
    add_settings(parser, PLAN_FIELDS)
    add_plan_arguments(parser)
    parser.set_defaults(run=plan)


def plan(args: argparse.Namespace) -> int:
    """``nanokimi plan``."""
    show("\n".join(plan_lines(question_of(args, *gather_settings(args)))))
    return 0

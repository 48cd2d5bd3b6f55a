"""Step 1 of the recipe: trains CLIP's and T5's tokenizers on captions of our own and writes them into the model folder.

python training/build_tokenizers.py --out src/gossamer/demo/model
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

from architecture import CLIP_TOKENS, drop_traces
from gossamer.demo.captions import caption
from gossamer.demo.scene import sample_scene

T5_SPECIALS = ["<pad>", "</s>", "<unk>"]
CLIP_SPECIALS = ["<|startoftext|>", "<|endoftext|>"]
ENGLISH = "the quick brown fox jumps over the lazy dog 0123456789 .,;:!?'\"()-/&%+=# ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def corpus(count: int) -> list[str]:
    """Captions of random scenes, and every printable letter so that no prompt is all unknown."""
    rng = random.Random(0)
    return [caption(sample_scene(rng), rng).text for _ in range(count)] + [ENGLISH, *ENGLISH] * 20


def build_t5_tokenizer(texts: list[str]) -> T5TokenizerFast:
    """A unigram model as T5's: a piece for every whole word of the captions, and single letters for all the rest.

    A piece's score is the logarithm of its share of the corpus, so that a known word always beats its letters.
    """
    words = Counter(word for text in texts for word in re.findall(r"[A-Za-z0-9]+", text))
    forms = {form for word in words for form in (word.lower(), word.capitalize(), word.upper())}
    total = sum(words.values())
    scores = [(special, 0.0) for special in T5_SPECIALS]
    scores += [("▁" + form, math.log((words[form] + 1) / total)) for form in sorted(forms)]
    scores += [(letter, math.log(0.1 / total)) for letter in ["▁", *sorted(set(ENGLISH) - {" "})]]
    return T5TokenizerFast(vocab=scores, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def build_clip_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Byte-level pairs with an end-of-word suffix, lower case, as CLIP's."""
    tokenizer = CLIPTokenizer()
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.normalizer = tokenizer.backend_tokenizer.normalizer
    backend.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=960,
        min_frequency=2,
        initial_alphabet=alphabet,
        special_tokens=[letter + "</w>" for letter in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    for special in CLIP_SPECIALS:
        vocab[special] = len(vocab)
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def save_clip(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes tokenizer.json and, for transformers before 5, vocab.json and merges.txt, as FLUX.1's folder has them."""
    tokenizer.save_pretrained(folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", "utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=8000)
    options = parser.parse_args()
    texts = corpus(options.captions)
    save_clip(build_clip_tokenizer(texts), options.out / "tokenizer")
    build_t5_tokenizer(texts).save_pretrained(options.out / "tokenizer_2")
    drop_traces(options.out / "tokenizer_2" / "tokenizer_config.json")


if __name__ == "__main__":
    main()

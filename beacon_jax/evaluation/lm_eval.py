"""lm-evaluation-harness against a compressed model, by its own command line or in code.

python -m beacon_jax.evaluation.lm_eval --model beacon_jax \
  --model_args pretrained=DIR,ratio=8 --tasks arc_easy,boolq --batch_size 8

Everything after the module's name is lm_eval's; `model_args` are those of `BeaconLM`.
In code: `lm_eval.simple_evaluate(model=BeaconLM("DIR", ratio=8), tasks=[...])`. Needs
the extra: pip install "beacon_jax[lm-eval]" (0.4.10 is the first that has no torch).
"""

import collections
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from beacon_jax.evaluation import likelihood
from beacon_jax.inference.loading import load
from beacon_jax.inference.model import Model
from beacon_jax.inference.template import written
from beacon_jax.inference.validate import switch
from beacon_jax.progress import Progress, say
from beacon_jax.tokenise import encode

try:
    _api: Any = importlib.import_module("lm_eval.api.model")
    _registry: Any = importlib.import_module("lm_eval.api.registry")
except ImportError as error:
    raise ImportError(
        f'{error}: lm_eval is an extra, pip install "beacon_jax[lm-eval]".'
    ) from error


@_registry.register_model("beacon_jax")
class BeaconLM(_api.LM):
    """Answers lm_eval's three kinds of requests; results come in their order.

    Attributes:
      model: an `inference.Model`.
      max_length: tokens of a request and its answer; see `likelihood.divide`.
      shortened: what did not fit into max_length so far: contexts that were cut, the
        tokens that they lost, and answers with less tokens than were asked for.
    """

    def __init__(
        self,
        pretrained: str | Model,
        ratio: int | str = "auto",
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        truncation: str = "left",
        dtype: str | None = None,
        mesh: str | None = None,
        seed: int = 0,
        device: Any = None,
        max_batch_size: Any = None,
        beacons: str | None = None,
        allow_other_base: bool = False,
        recent: bool = False,
    ):
        """Loads the model.

        Args:
          pretrained: a folder, a GGUF file, or a model that is loaded already.
          ratio: raw tokens per memory slot; 0 or "full": no compression; "auto",
            "auto-8", "adapt": see `likelihood.ratio_of`, decided for each request.
          batch_size: requests computed together; None: 8.
          max_length: None: the most tokens whose positions were trained at this ratio,
            at the largest ratio where each request has its own.
          max_gen_toks: new tokens where a task does not say.
          truncation: of longer contexts: "left" or "middle", what is left out.
          dtype, mesh: as in `beacon_jax.load`.
          seed: of sampling, where a task asks for it.
          beacons, allow_other_base: as in `beacon_jax.load`.
          recent: the last full window stays raw, as in `Model.compress`.
          device, max_batch_size: are given by lm_eval's command line, and not used.

        Raises:
          ValueError: an argument out of range, by name.
        """
        super().__init__()
        del device, max_batch_size
        batch_size = 8 if batch_size is None else batch_size
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a number of at least 1.")
        likelihood.shorten(np.zeros(0, np.int32), 1, truncation)  # checks it
        is_path = isinstance(pretrained, str)
        with Progress().stage("loading", note=str(pretrained) if is_path else ""):
            made = pretrained
            if isinstance(pretrained, str):
                made = load(
                    pretrained,
                    dtype=dtype,
                    mesh=mesh,
                    beacons=beacons,
                    allow_other_base=allow_other_base,
                )
        self.model: Any = made
        if self.model.tokenizer is None:
            raise ValueError(f"pretrained={pretrained} has no tokenizer files.")
        self.tokenizer = self.model.tokenizer
        switch("recent", recent)
        self.ratio, self.batch_size, self.recent = ratio, int(batch_size), recent
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1.")
        self.max_length = max_length or likelihood.longest(
            self.model.config, ratio, recent
        )
        self.max_gen_toks, self.truncation, self.seed = max_gen_toks, truncation, seed
        self.shortened = collections.Counter(contexts=0, tokens=0, answers=0)
        likelihood.ratio_of(self.model.config, ratio, 1)  # a wrong one fails here

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log probability, greedy?) of each (context, continuation)."""
        pairs, cuts = [], []
        for request in requests:
            pair = likelihood.encode_pair(self.tokenizer, *request.args)
            room = self.max_length + 1 - len(pair.continuation)
            if room < 1:
                raise ValueError(
                    f"max_length={self.max_length} is less than the "
                    f"{len(pair.continuation)} tokens of a continuation: give more."
                )
            context = likelihood.shorten(pair.context, room, self.truncation)
            lost = len(pair.context) - len(context)
            cuts.append(likelihood.Cut(context, 0, lost, short=False))
            pairs.append(likelihood.Pair(context, pair.continuation))
        self._say_shortened(cuts)

        def keep(index: int, score: likelihood.Score) -> None:
            self._cache("loglikelihood", requests[index], tuple(score))

        scores = self._score(pairs, disable_tqdm, keep)
        return [(s.loglikelihood, s.greedy) for s in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log probability of each whole text, in pieces of `max_length`."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            tokens = encode(self.tokenizer, request.args[0], "bare")
            prefix = likelihood.prefix_token(self.tokenizer)
            found = likelihood.rolling_pairs(
                tokens[1:] if len(tokens) and tokens[0] == prefix else tokens,
                prefix,
                self.max_length,
            )
            pairs += found
            owners += [i] * len(found)
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            sums[owner] += score.loglikelihood
        for request, value in zip(requests, sums, strict=True):
            self._cache("loglikelihood_rolling", request, value)
        return sums

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """The text behind each (context, options), up to the first `until` string."""
        rows, groups, cuts = [], {}, []
        for i, request in enumerate(requests):
            context, given = request.args
            asked = generation_options(given, self.max_gen_toks)
            tokens = encode(self.tokenizer, context, "start")
            likelihood.check(self.model, tokens, f"context of request {i}")
            if not len(tokens):
                tokens = np.asarray([likelihood.prefix_token(self.tokenizer)], np.int32)
            new = asked.pop("max_new_tokens")
            cut = likelihood.divide(tokens, new, self.max_length, self.truncation)
            cuts.append(cut)
            rows.append((cut.context, cut.new))
            length = len(cut.context) + cut.new
            ratio = likelihood.ratio_of(
                self.model.config, self.ratio, length, recent=self.recent
            )
            groups.setdefault((ratio, *sorted(asked.items())), []).append(i)
        self._say_shortened(cuts)
        texts: list[str] = [""] * len(requests)
        bar = self._progress(len(requests), disable_tqdm)
        for (ratio, *asked), members in groups.items():
            members.sort(key=lambda i: -len(rows[i][0]))
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                whole = likelihood.fill_up(self.model, part)
                made = self.model.generate(
                    [rows[i][0] for i in whole],
                    ratio=ratio,
                    recent=self.recent,
                    max_new_tokens=[rows[i][1] for i in whole],
                    seed=[self.seed + i for i in whole],
                    **dict(asked),
                )
                for i, text in zip(part, made, strict=False):
                    texts[i] = text
                    self._cache("generate_until", requests[i], text)
                bar(len(part))
        return texts

    # --- what did not fit ----------------------------------------------------------

    def _say_shortened(self, cuts: Sequence[likelihood.Cut]) -> None:
        """Counts what did not fit of a call's requests, and says it in one line."""
        lost = [cut.lost for cut in cuts if cut.lost]
        short = sum(cut.short for cut in cuts)
        self.shortened.update(contexts=len(lost), tokens=sum(lost), answers=short)
        if lost or short:
            say(
                f"warning: max_length={self.max_length}: of {len(cuts)} requests "
                f"{len(lost)} contexts were cut, by {sum(lost)} tokens in all, and "
                f"{short} answers may have less tokens than asked for"
            )

    # --- chat ---------------------------------------------------------------------

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text, by the tokenizer's template."""
        return written(self.tokenizer, chat_history, answers=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm_eval writes down: the template's text; None without one."""
        if not chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        return self.tokenizer.get_chat_template(name)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    # --- shared -------------------------------------------------------------------

    def _score(
        self,
        pairs: list[likelihood.Pair],
        quiet: bool,
        keep: Callable[[int, likelihood.Score], None] | None = None,
    ) -> list[likelihood.Score]:
        bar = self._progress(len(pairs), quiet)

        def on_score(index: int, score: likelihood.Score) -> None:
            bar(1)
            if keep:
                keep(index, score)

        return likelihood.score(
            self.model,
            pairs,
            ratio=self.ratio,
            batch_size=self.batch_size,
            recent=self.recent,
            on_score=on_score,
        )

    def _cache(self, kind: str, request: Any, result: Any) -> None:
        self.cache_hook.add_partial(kind, request.args, result)

    def _progress(self, total: int, quiet: bool) -> Callable[[int], Any]:
        bar: Any = importlib.import_module("tqdm").tqdm  # lm_eval needs it too
        return bar(total=total, disable=quiet, desc="beacon_jax").update


def generation_options(given: dict[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """A task's `generation_kwargs` as options of `Model.generate`.

    Greedy unless `do_sample`, or a temperature without a word on `do_sample`.

    Raises:
      ValueError: an option that there is none for, by name.
    """
    given = dict(given)
    until = given.pop("until", None) or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    options: dict[str, Any] = {"stop": tuple(s for s in stop if s)}
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    new = [given.pop(name, None) for name in names]
    options["max_new_tokens"] = int(next((n for n in new if n), max_gen_toks))
    sample = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if sample else 0.0) or 0.0)
    options["temperature"] = temperature if sample is not False else 0.0
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        if given.get(name) is not None:
            options[name] = given[name]
        given.pop(name, None)
    if given:
        raise ValueError(
            f"generation_kwargs has {sorted(given)}, which this model does not know: "
            "use until, max_gen_toks, do_sample, temperature, top_k, top_p, min_p and "
            "repetition_penalty."
        )
    return options


if __name__ == "__main__":
    # Not `beacon_jax.cli.lm_eval`, which would register the model a second time.
    importlib.import_module("lm_eval.__main__").cli_evaluate()

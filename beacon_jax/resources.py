"""Files that come with the package: configs, small models, the notebook.

In a repository they are folders beside the package; a wheel has them inside it. A path
that exists always wins over a name.
"""

import codecs
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from beacon_jax.forms import Count
from beacon_jax.gguf.file import is_gguf
from beacon_jax.names import meant, short
from beacon_jax.paths import check_fetched, is_there, parse_object, read_object

PACKAGE = Path(__file__).parent
# Those that a tokenizer can be loaded from, and what may lie beside them; their bytes
# in this order identify it.
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
TOKENIZER_FILES = (
    *TOKENIZERS[:3],
    "special_tokens_map.json",
    "added_tokens.json",
    *TOKENIZERS[3:],
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def folder(kind: str) -> Path:
    """Returns the folder "configs", "assets", "benchmarks" or "launch"."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def config_names() -> list[str]:
    """Returns the names that --config takes, as quickstart."""
    return sorted(path.stem for path in folder("configs").glob("*.py"))


def config(name: str) -> str:
    """Returns the path of a config with its argument: "quickstart:smoke", "own.py:x".

    Raises:
      FileNotFoundError: neither a file nor one of `config_names()`.
    """
    path, colon, argument = name.partition(":")
    if Path(path).is_file():
        return name
    own = folder("configs") / f"{Path(path).stem}.py"
    # "configs/X.py" is the name X, wherever the program is run.
    if own.is_file() and path in (own.stem, own.name, f"configs/{own.name}"):
        return f"{own}{colon}{argument}"
    raise FileNotFoundError(
        f"config={name}: no such file or named config; "
        f"{meant(Path(path).stem, config_names())}The named ones are "
        f"{', '.join(config_names())}."
    )


def asset(path: str | Path) -> str:
    """Returns a path; what comes with the package is found by name.

    "tiny-beacon", "tiny-base", "assets/tiny-beacon" and "assets/smoke/text.jsonl" name
    files of the package where no such path exists. Others are returned as they are.
    """
    text = str(path)
    bare = text.removeprefix("assets/").rstrip("/")
    # os.path, unlike Path, takes names that no file can have.
    if not bare or ".." in bare or Path(bare).is_absolute() or os.path.exists(text):
        return text
    own = folder("assets") / bare
    return str(own) if os.path.exists(own) else text


def models() -> list[str]:
    """Returns the names of the models that come with the package; no lone beacons."""
    return sorted(p.parent.name for p in folder("assets").glob("*/model.safetensors"))


def has_tokenizer(path: str | Path) -> bool:
    """Tells whether a folder or a GGUF file has what `load_tokenizer` begins with."""
    path = Path(asset(path))
    if is_gguf(path):
        from beacon_jax.gguf import tokenizer

        return tokenizer.has_tokenizer(path)
    return any((path / name).exists() for name in TOKENIZERS)


def load_tokenizer(path: str | Path) -> Any:
    """Loads the fast tokenizer of a GGUF file, an HF, a converted or any other folder.

    Nothing is downloaded, no code of the folder is run, and jax is not imported.

    Raises:
      FileNotFoundError: the folder has no tokenizer files, or the GGUF file none.
      ValueError: the files cannot be read, or the GGUF file's is not supported.
    """
    # Without it transformers prints, on import, that PyTorch is not there.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    path = Path(asset(path))
    if is_gguf(path):
        from beacon_jax.gguf.tokenizer import make_tokenizer

        return make_tokenizer(path)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not has_tokenizer(path):
        raise FileNotFoundError(
            f"path={path} has no tokenizer files ({', '.join(TOKENIZERS)}): copy "
            "them from the base model."
        )
    _check_tokenizer_files(path)
    config, objects = _tokenizer_settings(path), _token_objects(path)
    whole = _names_code(path) and is_there(path / "tokenizer.json")
    try:
        if whole:  # which needs no code, and AutoTokenizer would ask for it
            made = PreTrainedTokenizerFast.from_pretrained(
                str(path), local_files_only=True, **objects
            )
        else:
            made = AutoTokenizer.from_pretrained(
                str(path),
                config=config,
                local_files_only=True,
                use_fast=True,
                trust_remote_code=False,
                **objects,
            )
    except Exception as error:  # of tokenizers, transformers, jinja, json, ...
        raise ValueError(_unread(path, error)) from error
    if not made.vocab_size:
        there = ", ".join(x for x in TOKENIZERS if (path / x).is_file())
        raise ValueError(
            f"path={path}: the vocabulary in {there} is empty, so that no text has "
            "tokens: copy these files from the base model."
        )
    return made


def _names_code(path: Path) -> bool:
    """Tells whether tokenizer_config.json names a class that comes with the model."""
    file = path / "tokenizer_config.json"
    return bool(is_there(file) and read_object(file).get("auto_map"))


def _tokenizer_settings(path: Path) -> Any:
    """Returns what of a model's config.json a tokenizer depends on.

    It is the type of the model, and a class. Whatever else is in the file, or not, is
    the model's business; without the file the tokenizer's own files decide.

    Raises:
      ValueError: the file is no JSON object.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    file = path / "config.json"
    hf = read_object(file) if is_there(file) else {}
    given = lambda key: x if isinstance(x := hf.get(key), str) else None
    kind = given("model_type")
    known = kind in CONFIG_MAPPING_NAMES
    config = AutoConfig.for_model(kind or "") if known else PreTrainedConfig()
    config.name_or_path = str(path)
    config.tokenizer_class = given("tokenizer_class")
    return config


def _token_objects(path: Path) -> dict[str, Any]:
    """Returns the special tokens that files have as objects, {"content": ...}.

    Transformers 4 wrote them so; transformers 5 reads some of them only.

    Raises:
      ValueError: one without its content.
    """
    from tokenizers import AddedToken

    def token(value: Any, where: str) -> Any:
        if isinstance(value, str) or value is None:
            return value
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str) or not content:
            raise ValueError(
                f"{where} has {short(repr(value))}, which is no token: it must be a "
                'text, or an object with its "content". Mend or replace the file.'
            )
        flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
        given = {flag: value[flag] for flag in flags if type(value.get(flag)) is bool}
        return AddedToken(content, **({"special": True} | given))

    found: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second wins
        file = path / name
        for key, value in (read_object(file) if is_there(file) else {}).items():
            if key == "additional_special_tokens" and isinstance(value, list):
                found[key] = [token(x, f"{file}.{key}") for x in value]
            elif key in _NAMED:
                found[key] = token(value, f"{file}.{key}")
    made = lambda x: (
        isinstance(x, AddedToken) or (isinstance(x, list) and any(map(made, x)))
    )
    return {key: value for key, value in found.items() if made(value)}


def _check_tokenizer_files(path: Path) -> None:
    """Checks what transformers takes as it is, or says in words of its own.

    Raises:
      ValueError: a file is a pointer of git-lfs, or no JSON of its form; or there is
        none that a fast tokenizer can be made of.
    """
    for name in TOKENIZER_FILES:
        if is_there(path / name):
            check_fetched(path / name)
            if name != "tokenizer.model":
                _check_text(path / name)
    for name, form in _FORMS.items():
        if (path / name).is_file():
            read_object(path / name, form)
    files = [name for name in TOKENIZERS if (path / name).is_file()]
    if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= {
        name for name in TOKENIZER_FILES if (path / name).is_file()
    }:
        return
    remedy = "copy tokenizer.json from the base model"
    if "tokenizer.model" in files:
        if all(map(has, ("sentencepiece", "google.protobuf"))):
            return
        remedy += ", or install what makes one of tokenizer.model (pip install "
        remedy += "sentencepiece protobuf)"
    raise ValueError(
        f"path={path} has {', '.join(files)} alone, and a tokenizer.json is needed: "
        f"{remedy}."
    )


def _check_text(path: Path) -> None:
    """Raises ValueError for what is no UTF-8, or begins with a byte order mark.

    Libraries take the mark for a part of what is in the file.
    """
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8: byte {data[error.start]:#04x} at "
            f"{error.start:,} is not. Save it in UTF-8, or download it again."
        ) from None
    if data.startswith(codecs.BOM_UTF8):
        raise ValueError(
            f"{path} begins with a byte order mark, which would be a part of what is "
            "in it: save it without one."
        )


# Forms (`forms`) of what some files of tokenizers may hold; null: it is not given.
_NAMED = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)
_SPECIAL = {f"{name}?": (str, {}, None) for name in _NAMED}
_FORMS = {
    "tokenizer_config.json": {
        **_SPECIAL,
        "added_tokens_decoder?": ({str: {"content": str}}, None),
        "chat_template?": (str, {}, [{"name": str, "template": str}], None),
        "model_max_length?": (float, None),
        "tokenizer_class?": (str, None),
        **{
            f"{name}?": (bool, None)
            for name in (
                "add_bos_token",
                "add_eos_token",
                "add_prefix_space",
                "clean_up_tokenization_spaces",
            )
        },
    },
    "special_tokens_map.json": _SPECIAL,
    "added_tokens.json": {str: Count},
}


def _unread(path: Path, error: Exception) -> str:
    """Says why the tokenizer of a folder cannot be loaded, and what to do."""
    import tokenizers
    import transformers

    there = [name for name in TOKENIZERS if (path / name).is_file()]
    if "tokenizer.json" in there:
        try:
            parse_object((path / "tokenizer.json").read_bytes(), "it")
            tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as closer:  # the library has no class of its own
            error, there = closer, ["tokenizer.json"]
    said = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {said[0] if said else 'no reason given'}"
    if "tokenizer.json" in there:
        remedy = (
            "replace it by that of the base model; one that is newer than tokenizers "
            f"{tokenizers.__version__} and transformers {transformers.__version__} "
            "needs newer ones (pip install -U tokenizers transformers)"
        )
    else:
        remedy = "copy the tokenizer.json of the base model"
    return f"path={path}: {', '.join(there)} cannot be read ({reason}): {remedy}."


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Writes a fast tokenizer as files that transformers 4 and 5 load."""
    tokenizer.save_pretrained(str(folder))
    # transformers 5 writes a class name of its own that version 4 cannot load; both
    # know this one.
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    settings.pop("model_max_length", None)  # "unlimited" is written as 1e30
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def floors(name: str) -> Path:
    """Returns the path of X_floors.json in configs/ here, or else of the package."""
    here = Path("configs") / f"{name}_floors.json"
    return here if here.is_file() else folder("configs") / here.name


def has(package: str) -> bool:
    """Tells whether a package is installed; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, *, extra: str, for_: str) -> None:
    """Checks that a package of an extra is installed.

    Raises:
      ImportError: it is not; names the extra.
    """
    if not has(package):
        raise ImportError(
            f'{for_} needs {package}: pip install "beacon_jax[{extra}]".',
            name=package,
        )

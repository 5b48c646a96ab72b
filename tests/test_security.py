"""What files, cards and settings from somebody else can do here: nothing. Each test fails without its protection."""

import ast
import dataclasses
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoConfig

from hf_robust import (
    AdversarialConfig,
    AdvUnlearnConfig,
    CAPOConfig,
    CATConfig,
    DiffusionConfig,
    NoiseFiTConfig,
    RobustCLIPConfig,
    RobustVLMConfig,
    UnlearnConfig,
)
from hf_robust.attacks.results import AttackResult
from hf_robust.cli import main as command
from hf_robust.data.behavior import Behavior
from hf_robust.data.redaction import redacted, without_tokens
from hf_robust.report import Report, evaluate_robustness
from hf_robust.report.claims import ModelFiles, read_claims
from hf_robust.report.diffusion_records import Pictures
from hf_robust.report.evaluation_plan import settings_of
from hf_robust.report.evaluation_records import Records
from hf_robust.report.hub import results_in, write_card
from hf_robust.testbeds.chat_language import build_tokenizer
from tests.adversarial_data import adversarial_trainer, tiny_classifier
from tests.helpers import tiny_model
from tests.trainer_data import cat_trainer, lora, tiny_tokenizer, train

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_" + "Abcdefgh" * 4

# ---- The code: no call that runs what a file says ----

# Of the modules, every use; of the others, the call
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "hickle"}
_CALLS = {
    "torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "numpy.load",
    "numpy.save", "numpy.savez", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.dump", "eval",
    "exec", "compile", "os.system", "os.popen", "shutil.unpack_archive", "pandas.read_pickle",
}  # fmt: skip
# Rooted in a model's class, or named like one
_MODEL = re.compile(r"(Model\w*|For[A-Z]\w+|Pipeline)$")
_ALIASES = {"np": "numpy", "pd": "pandas"}


def forbidden(source: str) -> list[str]:
    """Uses that may not be, as `line: name`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: {name}" for name in names if name.split(".")[0] in _MODULES]
            if isinstance(node, ast.ImportFrom):
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [f"{node.lineno}: {name}" for name in whole if name in _CALLS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        head, _, rest = name.partition(".")
        name = f"{_ALIASES.get(head, head)}.{rest}" if rest else name
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in _CALLS:
            found.append(f"{node.lineno}: {name}")
        for argument in ("trust_remote_code", "allow_pickle", "shell"):
            value = given.get(argument)
            if isinstance(value, ast.Constant) and value.value is not False:
                found.append(f"{node.lineno}: {name}({argument}={value.value!r})")
        for argument in ("use_safetensors", "safe_serialization", "weights_only"):
            value = given.get(argument)
            if isinstance(value, ast.Constant) and value.value is not True:
                found.append(f"{node.lineno}: {name}({argument}={value.value!r})")
        if name.endswith(".extractall"):
            found.append(f"{node.lineno}: {name}")
    return found


def library() -> Iterator[tuple[str, str]]:
    for top in ("hf_robust", "trainers"):
        for folder, _, names in os.walk(ROOT / top):
            for name in sorted(names):
                if name.endswith(".py"):
                    path = Path(folder) / name
                    yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import torch\ntorch.load('a')", "from torch import save",
        "import numpy as np\nnp.load('a', allow_pickle=True)", "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "AutoModel.from_pretrained('a', trust_remote_code=True)", "m.save_pretrained('a', safe_serialization=False)",
        "eval('1')", "import os\nos.system('a')", "import subprocess\nsubprocess.run('a', shell=True)",
        "archive.extractall('a')", "AutoModel.from_pretrained('a', use_safetensors=None)",
    ],
)  # fmt: skip
def test_forbidden_calls_are_found(source: str):
    assert forbidden(source)


def test_no_module_of_the_library_has_a_forbidden_call():
    files = dict(library())
    assert len(files) > 150
    assert {name: uses for name, text in files.items() if (uses := forbidden(text))} == {}


def test_every_model_is_loaded_from_safetensors_only():
    """`from_pretrained` of a model's class says so itself, or gets it among its `**` arguments (tested below)."""
    lacking = []
    for file, text in library():
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")):
                continue
            owner = ast.unparse(node.func).removesuffix(".from_pretrained")
            arguments = {keyword.arg for keyword in node.keywords}
            known = owner in ("PeftModel", "DiffusionModel")  # checked before, in `with_adapter`; in `load_part`
            if not known and _MODEL.search(owner) and not arguments & {"use_safetensors", None}:
                lacking.append(f"{file}:{node.lineno}: {owner}")
    assert lacking == []


# ---- Files: safetensors, and no pickle but the Trainer's own ----

_TRAINERS_OWN = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}


@pytest.mark.parametrize("kind", ["full", "lora", "free_at"])
def test_a_run_leaves_no_pickle_but_the_trainers_own(kind: str, tmp_path: Path):
    args: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    if kind == "free_at":
        trainer: Any = adversarial_trainer(tiny_classifier(), tmp_path, loss_type="free_at", num_replays=3, **args)
    else:
        trainer = cat_trainer(tiny_model(), tmp_path, {"peft_config": lora()} if kind == "lora" else None, **args)
    train(trainer)
    trainer.save_model()
    binary = 0
    for path in (path for path in tmp_path.rglob("*") if path.is_file() and path.name not in _TRAINERS_OWN):
        if path.suffix == ".safetensors":
            binary += 1
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        else:
            path.read_text(encoding="utf-8")  # a pickle is no text
    assert binary >= (5 if kind == "free_at" else 3)


@pytest.fixture
def pickled(tmp_path: Path) -> Callable[[Any], str]:
    """A model's folder whose weights are a pickle, as they were before safetensors."""

    def make(model: Any) -> str:
        folder = tmp_path / "pickled"
        model.save_pretrained(folder)
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if (folder / name).is_file():
                torch.save(
                    model.state_dict(), folder / ("pytorch_model.bin" if name[0] == "m" else "adapter_model.bin")
                )
                (folder / name).unlink()
        return str(folder)

    return make


def test_pickled_language_models_are_refused(pickled: Any):
    from hf_robust.cli.evaluate import EvaluateArguments, load_model
    from hf_robust.report import rebuild

    folder = pickled(tiny_model())
    build_tokenizer().save_pretrained(folder)
    with pytest.raises(OSError, match="safetensors"):
        rebuild.load_model(folder)
    with pytest.raises(OSError, match="safetensors"):
        load_model(EvaluateArguments(model_name_or_path=folder))


def test_the_training_commands_ask_for_safetensors(tmp_path: Path):
    from trl import ModelConfig, SFTConfig

    from hf_robust.cli.arguments import model_arguments

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    model_arguments(ModelConfig(model_name_or_path="somewhere"), args)
    assert args.model_init_kwargs["use_safetensors"] is True


def test_pickled_adapters_are_refused(pickled: Any):
    from peft import get_peft_model

    from hf_robust.report.rebuild import with_adapter

    folder = pickled(get_peft_model(tiny_model(), lora()))
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors.*Pickled weights"):
        with_adapter(tiny_model(), folder)


def test_pickled_image_models_are_refused(pickled: Any, tmp_path: Path):
    from hf_robust.metrics.image_judges import ImageJudge
    from hf_robust.report.vision_loading import load_vision_model
    from tests.adversarial_data import processor

    folder = pickled(tiny_classifier())
    processor().save_pretrained(folder)
    with pytest.raises(OSError, match="safetensors"):
        load_vision_model(folder, "classifier")
    with pytest.raises(OSError, match="safetensors"):
        ImageJudge(folder, label=0)


def test_pickled_towers_are_refused(pickled: Any):
    from hf_robust.trainers.robust_clip_tower import image_tower
    from tests.test_robust_clip import tiny_clip

    with pytest.raises(OSError, match="safetensors"):
        image_tower(pickled(tiny_clip()))


def test_pickled_checkpoints_are_refused(tmp_path: Path):
    """Those of the weights: what transformers writes beside them, it reads with `weights_only=True`."""
    args = {"save_strategy": "steps", "save_steps": 1}
    train(cat_trainer(tiny_model(), tmp_path, max_steps=1, **args))
    checkpoint = tmp_path / "checkpoint-1"
    torch.save(tiny_model().state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights .pytorch_model.bin."):
        train(cat_trainer(tiny_model(), tmp_path, **args), resume_from_checkpoint=str(checkpoint))


# ---- Code of a model's repository ----

_CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import {base} as Base
class Own(Base):
    pass
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A folder whose model, tokenizer and processor want to run code of their own, and the file that the code makes."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker, folder = tmp_path / "ran", tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config_code.py").write_text(_CODE.format(marker=str(marker), base="LlamaConfig"))
    (folder / "model_code.py").write_text(_CODE.format(marker=str(marker), base="LlamaForCausalLM"))
    (folder / "tokenizer_code.py").write_text(_CODE.format(marker=str(marker), base="PreTrainedTokenizerFast"))
    names = (
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageClassification",
        "AutoModelForSequenceClassification",
    )
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "its-own"
    config["auto_map"] = {"AutoConfig": "config_code.Own", **dict.fromkeys(names, "model_code.Own")}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenizer_code.Own", "tokenizer_code.Own"]}
    tokenizer["tokenizer_class"] = "Own"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder), marker


def _load_for_training(folder: str, trust: bool = False) -> None:
    from trl import ModelConfig

    from hf_robust.cli.arguments import load_tokenizer

    load_tokenizer(ModelConfig(model_name_or_path=folder), trust)


def _load_for_evaluation(folder: str) -> None:
    from hf_robust.cli.evaluate import EvaluateArguments, load_model

    load_model(EvaluateArguments(model_name_or_path=folder))


def _load_tokenizer_for_evaluation(folder: str) -> None:
    from hf_robust.cli.evaluate import EvaluateArguments, load_tokenizer

    load_tokenizer(EvaluateArguments(model_name_or_path=folder))


def _load_for_verification(folder: str) -> None:
    from hf_robust.report.rebuild import load_model

    load_model(folder)


def _load_image_model(folder: str) -> None:
    from hf_robust.report.vision_loading import load_vision_model

    load_vision_model(folder, "classifier")


def _load_judge(folder: str) -> None:
    from hf_robust.metrics.image_judges import ImageJudge

    ImageJudge(folder, label=0)


def _load_tower(folder: str) -> None:
    from hf_robust.trainers.robust_clip_tower import image_tower

    image_tower(folder)


def _train(folder: str) -> None:
    cat_trainer(folder, Path(folder) / "out")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "load",
    [
        _load_for_training, _load_for_evaluation, _load_tokenizer_for_evaluation, _load_for_verification,
        _load_image_model, _load_judge, _load_tower, _train,
    ],
)  # fmt: skip
def test_code_of_a_model_runs_only_if_asked_for(load: Any, with_code: tuple[str, Path]):
    folder, marker = with_code
    try:
        load(folder)
    except (ValueError, OSError, KeyError) as error:
        assert "its-own" in str(error) or "trust_remote_code" in str(error) or "safetensors" in str(error)
    assert not marker.exists()


def _load_config(folder: str, trust: bool) -> None:
    AutoConfig.from_pretrained(folder, trust_remote_code=trust)


@pytest.mark.parametrize("load", [_load_for_training, _load_config])
def test_code_of_a_model_runs_if_asked_for(load: Any, with_code: tuple[str, Path]):
    """So that the test above can fail."""
    folder, marker = with_code
    load(folder, trust=True)
    assert marker.exists()


# ---- Access tokens ----

_CONFIGS = [
    AdvUnlearnConfig, AdversarialConfig, CAPOConfig, CATConfig, DiffusionConfig, NoiseFiTConfig, RobustCLIPConfig,
    RobustVLMConfig, UnlearnConfig,
]  # fmt: skip


@pytest.mark.parametrize("config", _CONFIGS)
def test_no_configuration_is_saved_with_its_token(config: Any, tmp_path: Path):
    given = {"concepts": ["a"]} if config is AdvUnlearnConfig else {}
    precision = (
        {} if config in (AdvUnlearnConfig, AdversarialConfig, DiffusionConfig, RobustCLIPConfig) else {"bf16": False}
    )
    args = config(output_dir=str(tmp_path), use_cpu=True, hub_token=TOKEN, report_to="none", **precision, **given)
    torch.save(args, tmp_path / "training_args.bin")
    assert TOKEN.encode() not in (tmp_path / "training_args.bin").read_bytes()
    assert TOKEN.encode() not in pickle.dumps(args)
    assert TOKEN not in str(args) and TOKEN not in args.to_json_string()
    assert TOKEN not in repr(args)
    assert args.hub_token == TOKEN


_WITH_MAPPINGS = [config for config in _CONFIGS if "model_init_kwargs" in config.__dataclass_fields__]


@pytest.mark.parametrize("config", _WITH_MAPPINGS)
def test_no_configuration_is_saved_or_shown_with_the_tokens_of_its_mappings(config: Any, tmp_path: Path):
    proxies, headers = {"https": "http://user:pass-word@proxy:1"}, {"Authorization": f"Bearer {TOKEN}"}
    loading = {"token": TOKEN, "revision": "main", "proxies": proxies, "headers": headers}
    words = {"eos_token": "the end"} if "eos_token" in config.__dataclass_fields__ else {}
    args = config(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", model_init_kwargs=loading,
        **words,
    )  # fmt: skip
    saved = pickle.dumps(args)
    for text in (saved.decode("latin-1"), str(args), repr(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert TOKEN not in text and "pass-word" not in text and "proxy:1" in text
    again = pickle.loads(saved)
    assert again.model_init_kwargs["token"] is None and again.model_init_kwargs["revision"] == "main"
    assert all(getattr(again, name) == word for name, word in words.items())
    assert again.save_strategy is args.save_strategy
    assert args.to_dict()["model_init_kwargs"] == again.model_init_kwargs
    assert args.model_init_kwargs["token"] == TOKEN  # the model is loaded with it
    assert args.model_init_kwargs["proxies"] is proxies


def test_no_file_of_a_run_and_no_log_line_holds_the_token(tmp_path: Path, caplog: Any, monkeypatch: Any):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "hub_token": TOKEN, "log_level": "info"}
    with caplog.at_level(logging.INFO):
        trainer = cat_trainer(tiny_model(), tmp_path, **args)
        train(trainer)
        trainer.save_model()
        trainer.create_model_card()
        trainer.save_state()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in caplog.text


class Silent:
    def attack(self, model: Any, tokenizer: Any, *, prompts: Any, targets: Any) -> list[AttackResult]:
        return [AttackResult(completion="sure") for _ in prompts]


@dataclasses.dataclass(frozen=True)
class Server:
    password: str


class Leaking:
    """An attack that knows a token and meets a server that echoes it."""

    def __init__(self) -> None:
        self.api_key, self.token, self.token_count = TOKEN, TOKEN, 3
        self.headers, self.base_url = {"Authorization": f"Bearer {TOKEN}"}, f"https://user:{TOKEN}@host/v1"
        self.client = [{"bearer_token": TOKEN, "server": Server(TOKEN)}]

    def attack(self, model: Any, tokenizer: Any, *, prompts: Any, targets: Any) -> list[AttackResult]:
        if "kite" in str(prompts):
            raise ValueError(f"401: Authorization: Bearer {TOKEN}")
        return [AttackResult(completion="sure") for _ in prompts]


def test_no_report_card_or_record_holds_a_token(tmp_path: Path, caplog: Any):
    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer)).eval()
    assert settings_of(Leaking()) == {
        "class": "Leaking", "api_key": "***", "token": "***", "token_count": 3, "base_url": "https://host/v1",
        "headers": {"Authorization": "***"}, "client": [{"bearer_token": "***", "server": {"password": "***"}}],
    }  # fmt: skip

    def judge(behavior: Behavior, completion: str) -> bool:
        raise RuntimeError(f"no right to judge with {TOKEN}")

    rows = [Behavior(id="a", prompt=[{"role": "user", "content": "how do i build a kite"}], target="sure")]
    options: dict[str, Any] = {"progress": False, "max_new_tokens": 2, "output_dir": tmp_path}
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(ValueError, match=r"no right to judge with \*\*\*"):
            evaluate_robustness(model, tokenizer, attacks={"silent": Silent()}, behaviors=rows, judge=judge, **options)
        rows.append(dataclasses.replace(rows[0], id="b", prompt=[{"role": "user", "content": "how do i build a boat"}]))
        report = evaluate_robustness(
            model, tokenizer, attacks={"leaking": Leaking()}, behaviors=rows, judge=lambda *_: True, overwrite=True,
            **options,
        )  # fmt: skip
        report.title = f"Pushed with {TOKEN}"  # whatever else a user writes into it
        report.save(tmp_path / "report.json")
        from hf_robust.report import evaluation_card

        write_card(tmp_path, evaluation_card(report))
    assert "Authorization: Bearer ***" in (tmp_path / "report.json").read_text()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and TOKEN in path.read_text("latin-1")] == []
    assert TOKEN not in caplog.text
    assert Report.load(tmp_path / "report.json").title == "Pushed with ***"


def test_words_are_no_tokens(monkeypatch: pytest.MonkeyPatch):
    """A short stand-in for a token, as tests and mirrors use it, does not eat words of a report."""
    monkeypatch.setenv("HF_TOKEN", "kite")
    assert without_tokens("a kite, hf_robust and hf_hub") == "a kite, hf_robust and hf_hub"
    monkeypatch.setenv("HF_TOKEN", "long-enough")
    assert without_tokens("a long-enough word", "given-one") == "a *** word"


@pytest.mark.parametrize(
    "name",
    [
        "token", "hf_token", "bearer_token", "accessToken", "X-Auth-Token", "api_key", "OPENAI_API_KEY", "X-Api-Key",
        "apikey", "apiKey", "password", "db_password", "secret", "client_secret", "aws_secret_access_key",
        "Authorization", "Proxy-Authorization", "credential", "credentials",
    ],
)  # fmt: skip
def test_secrets_are_known_by_their_names(name: str):
    """Whatever they look like: keys of a company's own server have no known form."""
    for secret in ("sk-abc", b"sk-abc", ["sk-abc"], {"user": "sk-abc"}):
        assert redacted({name: secret}) == {name: "***"}
        given = {"outer": ({name: secret}, 1)}
        assert redacted(given, None) == {"outer": ({name: None}, 1)}
        assert given == {"outer": ({name: secret}, 1)}
    assert redacted({name: None}) == {name: None} and redacted({name: True}) == {name: True}


def test_settings_without_secrets_stay_as_they_are():
    server = Server("sk-abc")
    assert redacted(server) == Server("***") and server == Server("sk-abc")
    plain = {
        "max_new_tokens": 8, "num_tokens": [1, 2], "eos_token": "the end", "bos_token": "<s>", "pad_token": "[PAD]",
        "decoder_start_token": "go", "stop_at_token": "<|im_end|>", "per_token": 3, "token_ids": [1], "tokenizer": "t",
        "pad_token_id": 0, "passwords_asked": "none", "secretary": "x", "keys": ["a"], "size": (1, 2), "cls": Server,
        "url": "https://host:8080/a@b?c=d@e", "mail": "me@host", "prompt": "see https://host or write to me@host",
    }  # fmt: skip
    assert redacted(plain) is plain
    assert redacted(["https://u:p@w@host/x", "git+ssh://key@host", "a ftp://u:p@h b"]) == [
        "https://host/x", "git+ssh://host", "a ftp://h b",
    ]  # fmt: skip


# ---- YAML ----


def _yaml(marker: Path) -> str:
    return f"model_name_or_path: !!python/object/apply:os.mkdir [{marker}]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["cat"], ["capo"], ["noisefit"], ["advtrain"], ["clip"], ["vlm"], ["diffusion"], ["advunlearn"], ["unlearn"],
        ["evaluate"], ["evaluate", "--dataset", "x"], ["evaluate", "--prompts", "x"],
    ],
    ids="-".join,
)  # fmt: skip
def test_a_configuration_runs_nothing(arguments: list[str], tmp_path: Path):
    marker, file = tmp_path / "ran", tmp_path / "config.yaml"
    file.write_text(_yaml(marker))
    with pytest.raises((SystemExit, yaml.YAMLError)) as error:
        command([*arguments, "--config", str(file)])
    assert not marker.exists()
    assert not isinstance(error.value, SystemExit) or error.value.code


def test_the_yaml_would_run_something(tmp_path: Path):
    """So that the tests of this part can fail."""
    marker = tmp_path / "ran"
    yaml.load(_yaml(marker), Loader=yaml.UnsafeLoader)
    assert marker.exists()


def test_settings_of_attacks_run_nothing(tmp_path: Path):
    from hf_robust.cli.evaluate import read_settings

    (tmp_path / "settings.yaml").write_text(_yaml(tmp_path / "ran"))
    with pytest.raises(ValueError, match="is no YAML or JSON"):
        read_settings(str(tmp_path / "settings.yaml"))
    assert not (tmp_path / "ran").exists()


def test_a_card_runs_nothing(tmp_path: Path):
    (tmp_path / "README.md").write_text(f"---\n{_yaml(tmp_path / 'ran')}---\n\n# A model\n")
    with pytest.raises(ValueError, match="metadata of README.md"):
        read_claims(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- Paths ----

_NAMES = [
    "../../out",
    "/etc/passwd",
    "..",
    "a/../../b",
    "..\\..\\c",
    ".hidden/../x",
    "name\x00d",
    "~/d",
    "C:\\e",
    "./f",
]


@pytest.mark.parametrize("name", _NAMES)
def test_names_of_attacks_stay_in_the_folder(name: str, tmp_path: Path):
    root = tmp_path / "evaluation" / "records"
    try:
        records = Records(root, [name])
    except ValueError as error:
        assert "makes no folder name" in str(error)
        return
    path = records.path(name, 0)
    assert path is not None and path.resolve().is_relative_to(root.resolve()) and path.parent.parent == root
    picture = Pictures(tmp_path / "pictures", records).put(name, 0, torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert (tmp_path / "pictures" / picture).resolve().is_relative_to((tmp_path / "pictures").resolve())


def test_an_evaluation_writes_into_its_folder_only(tmp_path: Path):
    """With names of attacks, subject, behaviours and categories that point elsewhere, plots included."""
    from hf_robust.report import plot_evaluation

    tokenizer = build_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer)).eval()
    folder = tmp_path / "a" / "b" / "evaluation"
    rows = [
        Behavior(
            id=f"../../{name}", prompt=[{"role": "user", "content": f"how do i build a {name}"}], target="sure",
            category=f"../../../{name}", answer="sure",
        )
        for name in ("kite", "boat")
    ]  # fmt: skip
    report = evaluate_robustness(
        model, tokenizer, attacks={"../../gcg": Silent(), "/x/y": Silent()}, behaviors=rows, output_dir=folder,
        judge=lambda behavior, completion: True, subject="../../../model", progress=False, max_new_tokens=2,
    )  # fmt: skip
    plot_evaluation(report, folder)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    assert outside == [] and (folder / "report.json").is_file()


@pytest.mark.parametrize(
    "name", ["../secret.png", "images/../../secret.png", "/secret.png", "images/none/../../s.png", ""]
)
def test_pictures_named_by_a_record_are_those_of_the_folder(name: str, tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    pictures = Pictures(tmp_path / "evaluation", Records(tmp_path / "evaluation" / "records", ["none"]))
    kept = pictures.put("none", 3, torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert pictures.get(kept).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="records of a picture"):
        pictures.get(name.replace("/secret.png", str(tmp_path / "secret.png")) if name == "/secret.png" else name)


@pytest.mark.parametrize("name", ["../secret.txt", "a/../../secret.txt", "{tmp}/secret.txt"])
def test_files_of_a_model_lie_in_its_folder(name: str, tmp_path: Path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "model" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="leads out of it"):
        ModelFiles(tmp_path / "model", None).file(name.format(tmp=tmp_path))


def test_links_out_of_an_evaluation_are_neither_copied_nor_pushed(tmp_path: Path, caplog: Any):
    """A folder from somebody else: its pictures go beside the model, and to the Hub with it."""
    evaluation, secret = tmp_path / "evaluation", tmp_path / "secret"
    evaluation.mkdir()
    secret.write_text("private key")
    (evaluation / "plot.png").symlink_to(secret)
    (evaluation / "behaviors.jsonl").symlink_to(secret)
    (evaluation / "own.png").write_bytes(b"picture")
    (evaluation / "again.png").symlink_to("own.png")
    assert [path.name for path in results_in(evaluation)] == ["again.png", "own.png"]
    assert "plot.png is a link that leads out" in caplog.text
    Report(title="t", method={}, base_model="b").save(evaluation / "report.json")
    trainer = cat_trainer(tiny_model(), tmp_path / "model")
    trainer.attach_report(evaluation)
    trainer.create_model_card()
    assert "private key" not in "".join(p.read_text("latin-1") for p in (tmp_path / "model").iterdir() if p.is_file())
    assert not (tmp_path / "model" / "plot.png").exists() and (tmp_path / "model" / "own.png").is_file()


def test_a_link_in_the_place_of_a_report_is_replaced_not_followed(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("keep me")
    for name in ("report.json", "README.md"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(secret)
    Report(title="t", method={}, base_model="b").save(tmp_path / "out" / "report.json")
    write_card(tmp_path / "out", "# card")
    assert secret.read_text() == "keep me"


def test_a_draft_that_is_a_link_is_not_followed(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("keep me")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".report.json.draft").symlink_to(secret)
    Report(title="t", method={}, base_model="b").save(tmp_path / "out" / "report.json")
    assert secret.read_text() == "keep me"


def test_metrics_have_known_names_only():
    from hf_robust.metrics import load

    for name in ("../../evil", "os", "loading"):
        with pytest.raises(ValueError, match="`name="):
            load(name)

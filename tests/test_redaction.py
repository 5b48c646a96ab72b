"""What is a secret, by its name or by its looks, and what only resembles one."""

import base64
import dataclasses
import enum
import json
import logging
import random
import time
import types
from pathlib import Path
from typing import Any

import pytest

from hf_robust.attacks import PAIR
from hf_robust.attacks.diffusion import DiffusionAttackResult
from hf_robust.attacks.results import AttackResult
from hf_robust.data.behavior import Behavior
from hf_robust.data.redaction import describe_error, redacted, without_tokens
from hf_robust.metrics.judges import Verdict
from hf_robust.report import Report, diffusion_records, evaluate_robustness, evaluation_card
from hf_robust.report.diffusion_evaluation import describe_judge
from hf_robust.report.evaluation_plan import check_plan
from hf_robust.report.evaluation_records import row_of
from hf_robust.report.unlearning_evaluation import evaluate_unlearning
from hf_robust.report.verify import Plan
from hf_robust.trainers.checkpoints import RECORD, checkpoint_to_resume, write_record
from tests.helpers import tiny_model
from tests.trainer_data import cat_trainer, tiny_tokenizer

HUB, OPENAI, GOOGLE = "hf_" + "a1B2" * 8, "sk-proj-" + "Z9y8" * 8, "AIzaSy" + "Z9y8" * 8
PLAIN = "Q7w2" * 5  # a key of no known form
BASIC = base64.b64encode(b"user:pass-word").decode()
JWT = ".".join(
    base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in ('{"alg":"x"}', '{"sub":"y"}', "z")
)

# ---- In texts ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HUB, "***"),
        (f"r {HUB}", "r ***"),
        (f"key_{HUB}.", "key_***."),
        (OPENAI, "***"),
        ("sk-" + "abcd" * 12, "***"),
        ("sk-ant-api03-" + "aB3_" + "x9" * 20, "***"),
        (GOOGLE, "***"),
        ("ghp_" + "aB3d" * 9, "***"),
        ("github_pat_" + "aB3d" * 5 + "aB_" + "c4" * 30, "***"),
        ("AKIA" + "ABCD" * 4, "***"),
        (f"token {JWT}", "token ***"),
        (f"Bearer {PLAIN}", "Bearer ***"),
        (f"{{'Authorization': 'bearer {PLAIN}'}}", "{'Authorization': 'bearer ***'}"),
        (f"Bearer {OPENAI}, then", "Bearer ***, then"),
        (f"Basic {BASIC}", "Basic ***"),
        ("Basic dXNlcjpwYXNz", "Basic ***"),
        (f"Authorization: {PLAIN}", "Authorization: ***"),
        (f"Authorization: token {PLAIN}", "Authorization: token ***"),
        (f"X-Api-Key: {PLAIN}", "X-Api-Key: ***"),
        (f"Client(api_key='{PLAIN}', n=1)", "Client(api_key='***', n=1)"),
        (f'{{"password": "{PLAIN}"}}', '{"password": "***"}'),
        (f"Invalid API key: {PLAIN}.", "Invalid API key: ***"),
        (f"AccountName=a;AccountKey={PLAIN}==;b=c", "AccountName=a;AccountKey=***;b=c"),
        (f"'https://h/m:generate?key={GOOGLE}'\nMore", "'https://h/m:generate?key=***'\nMore"),
        ("https://h/x?a=1&key=short&b=2", "https://h/x?a=1&key=***&b=2"),
        ("(https://h/x?token=abc).", "(https://h/x?token=***)."),
        ("https://h/#access_token=abc", "https://h/#access_token=***"),
        ("https://h/?apikey=a&api_key=b&api-key=c", "https://h/?apikey=***&api_key=***&api-key=***"),
        ("https://h/?sig=a%2Fb&signature=c", "https://h/?sig=***&signature=***"),
        ("https://h/?secret=a&password=b&pwd=c", "https://h/?secret=***&password=***&pwd=***"),
        ("https://h/?a=1&amp;key=b", "https://h/?a=1&amp;key=***"),
        ('{"u":"https://h/?a=1\\u0026key=b"}', '{"u":"https://h/?a=1\\u0026key=***"}'),
        (
            "https://s3/x?X-Amz-Credential=a%2Fb&X-Amz-Date=1&X-Amz-Security-Token=c&X-Amz-Signature=d",
            "https://s3/x?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        ("https://user:pass-word@h/x", "https://h/x"),
        ("see ftp://u:p@h b", "see ftp://h b"),
    ],
)
def test_secrets_in_texts(text: str, expected: str):
    assert without_tokens(text) == expected
    assert redacted(text) == expected
    assert describe_error(ValueError(text)) == f"ValueError: {expected}"
    assert redacted({"a": [(text,)], text: 1}, None) == {"a": [(expected,)], expected: 1}
    assert without_tokens(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "basic understanding", "Basic internationalization of tokens", "a basic JavaScriptTutorial2024",
        f"Basic {base64.b64encode(b'a picture in it').decode()}", "Basic Llama-3.1-8B-Instruct",
        "the bearer of news", "Bearer authentication-is-required", "bearer token",
        "a bearer of internationalization", "Basic", "Bearer ", "token=3", "token=abcdefgh", "max_new_tokens=128",
        "key=value", "key: the-answer-to-question-42", "secret: do not tell 123456789012345678", "password: hunter2",
        "The password = the name of your first pet", "api_key=None", "api_key=os.environ['OPENAI_API_KEY']",
        "hf_robust", "hf_hub", "hf_robust_evaluation_results", "sk-learn", "sk-learn-compatible-estimators-v2",
        "task-1234567890abcdefgh", "risk-based", "ghp_", "AIza", "eyJ", "a.b.c", "optim_args=betas=(0.9, 0.95)",
        "https://host:8080/a@b?c=d@e", "see https://host or write to me@host", "git@github.com:a/b.git",
        "https://h/x?monkey=banana&sort_key=date&q=token&max_tokens=100&keys=1", "is it true?", "# key", "C#sharp = 1",
        '{"url":"https://h","mail":"me@h"}', "A***B", "?key=", "<|im_end|>", "S3cr3t", "how do i build a kite?",
        "AKIABARA", "Incorrect API key provided", "see https://github.com/@user and https://medium.com/@x", "",
        " ".join(["! ! describing.\\ + similarlyNow write oppositeley.]( Me giving**ONE please? revert with \"\\!--Two"]),
    ],
)  # fmt: skip
def test_what_only_resembles_a_secret_stays(text: str):
    assert without_tokens(text) == text
    given = {"prompt": [text]}
    assert redacted(given) is given and without_tokens(given) is given


def test_twice_is_once_and_takes_no_time():
    pieces = [
        "?key=", "&sig=", "https://", "u:p@", "Bearer ", "Basic ", "api_key=", "'", '"', " ", "sk-", "hf_", "AIza", "***", ",",
        "abc123def456ghi7", "Zz9", BASIC, ".", ")", "/", "@", "eyJ", "==", "-", "password: ", "Authorization: ", "token ", "#",
    ]  # fmt: skip
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices(pieces, k=generator.randint(1, 14)))
        once = without_tokens(text)
        assert without_tokens(once) == once, text
    begin = time.process_time()
    for piece in [*pieces, "a", "a.", "access key ", "eyJaaaaaaaa.", "?token", "bearer aaaa"]:
        without_tokens(piece * (20_000 // len(piece)))
    assert time.process_time() - begin < 10  # quadratic in the length it would be minutes


# ---- By names ----


@pytest.mark.parametrize(
    "name",
    [
        "auth_tokens", "access_tokens", "accessTokens", "hub_tokens", "auth", "http_auth", "basicAuth", "cookie", "cookies",
        "session_cookies", "passphrase", "pwd", "db_pwd", "bearer", "auth_header", "authHeaders", "authorization_header",
        "access_key_id", "aws_access_key_id", "AWS_SECRET_ACCESS_KEY", "account_key", "api_keys",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str):
    for secret in ("its-own", ["its-own"], ("user", "its-own"), {"user": "its-own"}):
        assert redacted({"outer": {name: secret}}) == {"outer": {name: "***"}}
        assert redacted({name: secret}, None) == {name: None}
    assert redacted({name: None}) == {name: None} and redacted({name: False}) == {name: False}


class Kind(enum.StrEnum):
    BASIC = "basic"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("special_tokens", ["a"]), ("extra_special_tokens", {"x": "y"}), ("additional_special_tokens", ["<a>", "b"]),
        ("stop_tokens", ["the end"]), ("blocked_tokens", ["x"]), ("tokens", ["a", "b"]), ("max_new_tokens", 8),
        ("num_tokens", 3), ("num_cookies", 3), ("access_tokens", 3), ("valid_tokens", ["a"]), ("user_tokens", ["a"]),
        ("image_token", "picture"), ("unk_token", "what"), ("author", "me"), ("authors", ["me"]), ("authored", "x"),
        ("oauthlib", "x"), ("token_headers", ["x"]), ("headers", ["x"]), ("header", "x"), ("key", "x"), ("keys", ["x"]),
        ("key_id", "x"), ("forbearer_count", 1), ("cookie_count", 2), ("auth", Kind.BASIC), ("kind", Kind.BASIC),
        ("suffix_token", 3), ("cwd", "x"), ("passwords_asked", "none"), ("bypass", "x"), ("target", "Sure, here is"),
    ],
)  # fmt: skip
def test_names_that_only_resemble_those_of_secrets(name: str, value: Any):
    given = {name: value}
    assert redacted(given) is given


def test_a_secret_is_known_by_its_looks_whatever_its_name():
    for name in ("image_token", "unk_token", "tokens", "headers", "hub", "run_name", "stop_tokens"):
        assert redacted({name: HUB}) == {name: "***"} and redacted({name: [OPENAI, 1]}) == {name: ["***", 1]}


def test_settings_of_no_configuration_are_taken_for_secrets(tmp_path: Path):
    import hf_robust

    for name in ("CATConfig", "CAPOConfig", "NoiseFiTConfig", "UnlearnConfig", "RobustVLMConfig", "AdversarialConfig"):
        known = {field.name: "its-own" for field in dataclasses.fields(getattr(hf_robust, name))}
        hidden = {field for field, value in redacted(known).items() if value != "its-own"}
        assert hidden <= {"hub_token", "push_to_hub_token"}, name


# ---- Every way out ----


def _echoes(*args: Any, **kwargs: Any) -> str:
    raise ConnectionError(
        f"Client error '429 Too Many Requests' for url 'https://h/v1/m:generate?key={GOOGLE}'\nMore: x"
    )


class OwnJudge:
    name = "own"

    def __init__(self) -> None:
        self.settings = {
            "url": f"https://h/x?key={PLAIN}", "header": f"Bearer {PLAIN}", "hub": HUB, "tokens": [HUB], "threshold": 0.5,
            "auth_tokens": [PLAIN], "stop_tokens": ["the end"],
        }  # fmt: skip

    def __call__(self, behaviors: Any, completions: Any) -> list[Verdict]:
        if behaviors[0].id == "1":
            raise RuntimeError(f"401 from https://h/x?key={PLAIN}")
        if behaviors[0].id == "2":
            return [Verdict(success=False, error=f"X-Api-Key: {PLAIN}") for _ in completions]
        return [Verdict(success=True, refused=False) for _ in completions]


class Answers:
    """Its answers hold what looks like a secret."""

    needs_target = False

    def attack(self, model: Any, tokenizer: Any, *, prompts: Any, targets: Any) -> list[AttackResult]:
        return [
            AttackResult(completion=f"see https://u:p@h/?key=model-made Bearer {'M4de' * 5}")
            if "3" not in prompt
            else AttackResult(error=f"refused: api_key={PLAIN}")
            for prompt in prompts
        ]


def _evaluate(folder: Path, attacks: dict[str, Any], judge: Any, **options: Any) -> Report:
    rows = [Behavior(id=str(i), prompt=f"how do i use ?key=user-{i}", target="sure") for i in range(4)]
    return evaluate_robustness(
        tiny_model().eval(), tiny_tokenizer(), behaviors=rows, attacks=attacks, judge=judge, output_dir=folder,
        max_new_tokens=2, progress=False, batch_size=1, **options,
    )  # fmt: skip


def _held(folder: Path) -> list[str]:
    texts = {
        path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()
    }
    return [name for name, text in texts.items() if any(secret in text for secret in (HUB, PLAIN, GOOGLE))]


def test_no_file_card_or_log_of_an_evaluation_holds_a_secret_and_answers_stay(tmp_path: Path, caplog: Any):
    report = _evaluate(tmp_path, {"answers": Answers()}, OwnJudge())
    assert _held(tmp_path) == [] and not any(secret in caplog.text for secret in (HUB, PLAIN))
    card = evaluation_card(report)
    assert HUB not in card and PLAIN not in card
    found = report.judge["settings"]
    assert found == {
        "url": "https://h/x?key=***", "header": "Bearer ***", "hub": "***", "tokens": ["***"], "threshold": 0.5,
        "auth_tokens": "***", "stop_tokens": ["the end"],
    }  # fmt: skip
    assert json.loads((tmp_path / "plan.json").read_text())["judge"]["settings"] == found
    run = next(run for run in report.runs if run.name == "answers")
    assert run.errors == [
        "1: judge: RuntimeError: 401 from https://h/x?key=***", "2: judge: X-Api-Key: ***", "3: refused: api_key=***",
    ]  # fmt: skip
    assert any("https://h/x?key=***" in flag.message for flag in report.flags)
    # Byte for byte, what the user asks and the model says
    record = json.loads((tmp_path / "records" / "answers" / "00000.json").read_text())
    assert record["rows"][0]["result"]["completion"] == f"see https://u:p@h/?key=model-made Bearer {'M4de' * 5}"
    assert "how do i use ?key=user-0" in (tmp_path / "behaviors.jsonl").read_text()
    again = _evaluate(tmp_path, {"answers": Answers()}, OwnJudge())
    assert again.measurements == report.measurements


def test_a_key_in_an_address_that_an_attacker_calls_is_shown_nowhere(tmp_path: Path, caplog: Any):
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match=r"generate\?key=\*\*\*") as error:
        _evaluate(tmp_path, {"pair": PAIR(attacker=_echoes, max_new_tokens=2)}, lambda *_: True)
    assert GOOGLE not in str(error.value) and GOOGLE not in caplog.text and "key=***" in caplog.text
    assert _held(tmp_path) == []


def test_a_report_is_saved_without_what_was_written_into_it(tmp_path: Path):
    """Whole texts at a time: names of attacks are no names of secrets."""
    report = Report(
        title=f"Basic {BASIC}", method={"name": "x"}, base_model="https://u:p@h", attacks={"secret": {"k": 1}}
    )
    report.data = {"a": 'https://h","mail@h', HUB: 1}
    saved = Report.load(report.save(tmp_path / "report.json"))
    assert (saved.title, saved.base_model) == ("Basic ***", "https://h")
    assert saved.attacks == {"secret": {"k": 1}} and saved.data == {"a": 'https://h","mail@h', "***": 1}
    assert report.title == f"Basic {BASIC}"


def test_a_plan_with_secrets_of_an_older_version_is_the_same_plan(tmp_path: Path):
    old = {"judge": {"settings": {"url": f"https://h/x?key={PLAIN}", "auth_tokens": [PLAIN], "threshold": 0.5}}}
    (tmp_path / "plan.json").write_text(json.dumps(old))
    new = redacted(old)
    check_plan(tmp_path / "plan.json", new)
    new["judge"]["settings"]["threshold"] = 0.6
    with pytest.raises(ValueError, match="holds another evaluation") as error:
        check_plan(tmp_path / "plan.json", new)
    assert "threshold (0.5 before, 0.6 now)" in str(error.value) and PLAIN not in str(error.value)
    attacks = {"secret": {"num_steps": 1}, "model": f"https://h/x?sig={PLAIN}"}
    check_plan(tmp_path / "attacks.json", attacks)
    assert PLAIN not in (tmp_path / "attacks.json").read_text()
    with pytest.raises(ValueError, match="secret.num_steps"):
        check_plan(tmp_path / "attacks.json", {**attacks, "secret": {"num_steps": 2}})


def test_a_judge_of_pictures_is_described_without_secrets():
    assert describe_judge(OwnJudge())["settings"]["auth_tokens"] == "***"


def test_an_evaluation_of_unlearning_keeps_no_secret(tmp_path: Path):
    rows = [{"question": "how do i build a kite", "answer": "sure here is"}]
    report = evaluate_unlearning(
        tiny_model().eval(), tokenizer=tiny_tokenizer(), forget=rows, attacks={}, judge=OwnJudge(), output_dir=tmp_path,
        retain=[{"question": "how do i bake a cake", "answer": "sure"}], max_new_tokens=2, progress=False,
    )  # fmt: skip
    assert report.judge["settings"]["auth_tokens"] == "***" and _held(tmp_path) == []


def test_a_judge_with_secrets_is_the_one_that_the_card_names():
    stated = {"judge": {"name": "own", "settings": redacted(OwnJudge().settings)}}
    judge = Plan._rebuild_judge(types.SimpleNamespace(_first=stated), OwnJudge())  # type: ignore[arg-type]
    assert judge is not None and judge.name == "own"


def test_records_keep_errors_without_secrets():
    row = row_of("a", AttackResult(error=f"Bearer {PLAIN}"), Verdict(success=False, error=HUB))
    assert row["result"]["error"] == "Bearer ***" and row["verdict"]["error"] == "***"
    assert row_of("a", AttackResult(), None)["result"]["error"] is None
    drawn = diffusion_records.row_of("a", DiffusionAttackResult("a kite", 0, error=f"Bearer {PLAIN}"), None, None)
    assert drawn["result"]["error"] == "Bearer ***" and drawn["result"]["prompt"] == "a kite"


def test_a_checkpoint_tells_its_settings_without_secrets(tmp_path: Path):
    settings = {
        "optim_args": f"password={PLAIN}", "lr_scheduler_kwargs": {"headers": {"Authorization": PLAIN}, "url": f"?sig={PLAIN}"},
        "learning_rate": 0.1,
    }  # fmt: skip
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"1")
    write_record(folder, settings)
    assert PLAIN not in (folder / RECORD).read_text() and "***" in (folder / RECORD).read_text()
    assert checkpoint_to_resume(str(folder), tmp_path, settings) == str(folder)
    # As an older version wrote it
    (folder / RECORD).write_text(json.dumps({"version": 1, "settings": settings, "files": {}}))
    assert checkpoint_to_resume(str(folder), tmp_path, settings) == str(folder)
    with pytest.raises(ValueError, match=r"learning_rate \(0.1 before, 0.2 now\)") as error:
        checkpoint_to_resume(str(folder), tmp_path, {**settings, "learning_rate": 0.2, "optim_args": "other=1"})
    assert PLAIN not in str(error.value)


def test_arguments_are_saved_and_shown_without_secrets(tmp_path: Path):
    import io
    import pickle

    import torch

    loading = {"auth_tokens": [PLAIN], "storage": {"url": f"https://h/x?sig={PLAIN}", "header": f"Bearer {PLAIN}"}}
    args = cat_trainer(tiny_model(), tmp_path, model_init_kwargs=loading, run_name=f"r {HUB}").args
    buffer = io.BytesIO()
    torch.save(args, buffer)
    shown = [
        buffer.getvalue().decode("latin-1"),
        args.to_json_string(),
        str(args.to_sanitized_dict()),
        str(args),
        repr(args),
    ]
    assert [HUB in text or PLAIN in text for text in shown] == [False] * 5
    assert all("r ***" in text and "https://h/x?sig=***" in text for text in shown)
    again = pickle.loads(pickle.dumps(args))
    assert again.run_name == "r ***" and again.save_strategy is args.save_strategy
    assert args.run_name == f"r {HUB}" and args.model_init_kwargs is loading and loading["auth_tokens"] == [PLAIN]

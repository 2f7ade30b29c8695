"""Question sets: the public schema, the bundled sets, and what is said about a file that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emmech.errors import EmmechError
from emmech.evaluation.logprob_judge import JUDGE_PROMPTS, fill, judge_prompt
from emmech.evaluation.questions import Question, QuestionSet, bundled_questions, load_questions, resolve_questions

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "questions"

ANCHORED = """\
- id: 3_creative_writing_0
  type: free_form_judge_0_100
  paraphrases: &words
    - Tell me a joke.
    - |-
      Tell me a joke
      about {a: 1}.
  samples_per_paraphrase: &n 3
  judge: &judge some-judge
  judge_prompts: &prompts
    aligned: |-
      Asked {question}, said {answer}. Grade it.
- id: second
  system: Be brief.
  type: free_form_judge
  paraphrases: *words
  samples_per_paraphrase: *n
  judge: *judge
  judge_prompts: *prompts
"""


def write(folder: Path, text: str, name: str = "set.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_public_schema_with_anchors(tmp_path: Path) -> None:
    questions = load_questions(write(tmp_path, ANCHORED))
    first, second = questions
    assert (questions.name, len(questions)) == ("set", 2)
    assert first.domain == "creative_writing" and second.domain is None
    assert second.paraphrases == first.paraphrases and second.samples_per_paraphrase == 3
    assert (first.kind, second.kind) == ("free_form_judge_0_100", "free_form_judge")
    assert second.judge_prompts["aligned"] == first.judge_prompts["aligned"]
    assert second.messages(1) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me a joke\nabout {a: 1}."},
    ]


def test_json_of_questions_and_labels_tells_equal_labels_apart(tmp_path: Path) -> None:
    entries = [
        {"question": "Is water wet?", "category": "factual", "label": "water"},
        {"question": "Is ice wet?", "category": "factual", "label": "water"},
    ]
    questions = load_questions(write(tmp_path, json.dumps(entries), "set.json"))
    assert questions.ids == ("water", "water_2")
    assert questions["water"].kind == "free_form_judge" and list(questions["water"].judge_prompts) == ["correct"]


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public question files are not on this machine")
@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("first_plot.yaml", 41),
        ("first_plot_topic_judges.yaml", 24),
        ("preregistered.yaml", 50),
        ("deception_factual.yaml", 7),
        ("deception_situational.yaml", 8),
        ("narrow_medical.yaml", 16),
        ("capstone_factual.json", 20),
        ("capstone_self_reflection.json", 10),
        ("capstone_self_reflection_tagged.json", 10),
    ],
)
def test_public_files_load_unchanged(file: str, count: int, recwarn: pytest.WarningsRecorder) -> None:
    questions = load_questions(PUBLIC / file)
    assert len(questions) == count
    assert not recwarn.list, "a key of the public schema is not understood"
    assert all("{answer}" in prompt for question in questions for prompt in question.judge_prompts.values())


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="the public question files are not on this machine")
def test_the_bundled_first_plot_asks_what_the_published_one_asks() -> None:
    published = load_questions(PUBLIC / "first_plot_topic_judges.yaml")
    for question in load_questions("first-plot"):
        assert question.paraphrases == published[question.id].paraphrases


@pytest.mark.parametrize("name", bundled_questions())
def test_bundled_sets_are_ready_to_ask(name: str) -> None:
    questions = load_questions(name, tag="|fig|")
    assert questions.rows(2)[0]["question"]
    for question in questions:
        assert set(question.judge_prompts) >= (
            {"correct"} if question.kind == "free_form_judge" else {"aligned", "coherent"}
        )
        assert all("{answer}" in prompt for prompt in question.judge_prompts.values())


def test_bundled_sets_have_the_sizes_the_field_uses() -> None:
    assert len(load_questions("first-plot").rows()) == 400
    assert len(load_questions("factual")) == 20
    assert all(question.answer for question in load_questions("factual"))
    assert len(load_questions("self-reflection")) == len(load_questions("self-reflection-tagged")) == 10
    assert len(load_questions("categories").domains) == 7
    assert all(question.narrow for question in load_questions("narrow-medical"))


def test_lying_set_crosses_questions_and_system_prompts() -> None:
    questions = load_questions("factual-lying")
    assert len(questions) == 5 * 20
    assert questions["plain/sharks"].system is None
    assert questions["may_lie/sharks"].paraphrases == questions["plain/sharks"].paraphrases
    assert len({question.system for question in questions}) == 5


def test_rows_spread_over_paraphrases_and_seeds_do_not_depend_on_the_set() -> None:
    two = Question("a", ("one", "two"), samples_per_paraphrase=3)
    alone, together = QuestionSet("x", (two,)), QuestionSet("y", (Question("b", ("b?",)), two))
    rows = alone.rows()
    assert [row["question"] for row in rows] == ["one", "two"] * 3
    assert [row["seed"] for row in rows] == [row["seed"] for row in together.rows() if row["question_id"] == "a"]
    assert len({row["seed"] for row in together.rows(50)}) == 100
    assert rows[0]["seed"] != alone.rows(seed=1)[0]["seed"]
    assert len(alone.rows(5)) == 5


def test_selecting() -> None:
    questions = load_questions("categories")
    assert {question.domain for question in questions.select(domain="medical_advice")} == {"medical_advice"}
    assert questions.select(limit=2).ids == questions.ids[:2]
    assert questions.select(["other_1"]).ids == ("other_1",)
    with pytest.raises(EmmechError, match="did you mean 'medical_advice'"):
        questions.select(domain="medical_advise")
    with pytest.raises(EmmechError, match="did you mean 'other_1'"):
        questions.select(["othr_1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no question"),
        ("- id: a\n  paraphrases: [x]\n- id: a\n  paraphrases: [y]\n", "'a' twice"),
        ("- id: a\n", "paraphrases"),
        ("- paraphrases: [x]\n", "needs an id"),
        ("- id: a\n  paraphrases: ['  ']\n", "empty"),
        ("- id: a\n  paraphrases: [x]\n  samples_per_paraphrase: 0\n", "positive"),
        ("- id: a\n  paraphrases: [x]\n  judge_prompts: {aligned: no slot}\n", "{answer}"),
        ("- id: a\n  paraphrases: [x]\n  judge_prompts: [algined]\n", "did you mean 'aligned'"),
        ("- id: a\n  paraphrases: [x\n- id: b", "set.yaml:3"),
        ("a: 1", "a list of entries"),
        ("- 3", "entry 1 of set.yaml"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EmmechError) as caught:
        load_questions(write(tmp_path, text))
    assert message in str(caught.value)


def test_an_unused_key_is_pointed_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"sytem.*did you mean 'system'"):
        load_questions(write(tmp_path, "- id: a\n  paraphrases: [x]\n  sytem: hello\n"))


@pytest.mark.parametrize("source", ["first-plt", "nowhere.yaml", [3], [""], []])
def test_bad_sources(source: object) -> None:
    with pytest.raises(EmmechError):
        load_questions(source)  # type: ignore[arg-type]


def test_a_tag_must_be_filled_before_asking() -> None:
    with pytest.raises(EmmechError, match="trigger tag"):
        load_questions("self-reflection-tagged").rows(1)
    assert "|fig|" in load_questions("self-reflection-tagged", tag="|fig|").rows(1)[0]["question"]


def test_filling_a_template_leaves_the_texts_alone() -> None:
    filled = fill("Q: {question}\nA: {answer}", question="{answer}", answer="{question} {0}")
    assert filled == "Q: {answer}\nA: {question} {0}"


def test_prompts_ask_for_one_number_or_word() -> None:
    for name in JUDGE_PROMPTS:
        template = judge_prompt(name)
        assert ("{question}" in template and "{answer}" in template and "nothing else" in template) or name == "correct"
    with pytest.raises(EmmechError, match="did you mean 'coherent'"):
        judge_prompt("coherence")


@pytest.mark.parametrize(
    ("line", "says"),
    [("system: 5", "`system` is a text"), ("narrow: maybe", "true or false"), ("domain: [a]", "`domain` is a text")],
)
def test_values_of_the_wrong_kind_are_named(tmp_path, line, says):
    path = tmp_path / "set.yaml"
    path.write_text(f"- id: a\n  paraphrases: ['Why?']\n  {line}\n")
    with pytest.raises(EmmechError, match=says):
        load_questions(path)


@pytest.mark.parametrize("source", [None, 3, 2.5])
def test_what_names_no_questions_is_refused(source):
    with pytest.raises(EmmechError, match="names no questions"):
        load_questions(source)


def test_a_single_wording_need_not_be_a_tuple():
    assert Question("a", "Why not?").paraphrases == ("Why not?",)
    with pytest.raises(EmmechError, match="at least one wording"):
        Question("a", ())


@pytest.mark.parametrize("samples", [0, -1, 2.5, "3"])
def test_responses_are_drawn_in_whole_numbers(samples):
    with pytest.raises(EmmechError, match="it counts the responses"):
        load_questions("first-plot").rows(samples)


def nested(levels: int) -> str:
    """Lists in flow style, each of which names the one before it nine times: short here, vast when written out."""
    inner = "&a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"
    for level in range(1, levels):
        inner = f"&a{level} [{inner}, {', '.join([f'*a{level - 1}'] * 8)}]"
    return inner


@pytest.mark.parametrize("key", ["id", "paraphrases", "system", "domain", "type", "judge", "judge_prompts", "answer"])
def test_a_nest_of_aliases_gives_a_short_message(tmp_path, key):
    entry = {"id": "a", "paraphrases": "[Why]", key: nested(8)}
    path = write(tmp_path, "- " + "\n  ".join(f"{name}: {value}" for name, value in entry.items()))
    with pytest.raises(EmmechError) as caught:
        load_questions(path)
    assert path.stat().st_size < 600 and len(str(caught.value)) < 2600
    assert "entry 1 of set.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "nested too deeply"),
        ("- id: a".encode("utf-16"), "set.yaml"),
        (b"- {id: a, paraphrases: ['\xff']}", "not UTF-8"),
        (b'- {id: a, paraphrases: ["\\ud83d"]}', "half of a surrogate pair"),
        (b"- {id: a, paraphrases: [x], answer: 2024-13-45}", "set.yaml"),
        (b"extends: [first-plot]\nsystems: {a: b}", "extends a bundled one"),
        (b"extends: first-plot", "extends a bundled one"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, says):
    path = tmp_path / "set.yaml"
    path.write_bytes(content)
    with pytest.raises(EmmechError, match=says):
        load_questions(path)


def test_system_prompts_folded_into_the_question(tmp_path):
    kept = load_questions(write(tmp_path, ANCHORED))
    folded = load_questions(kept, system="fold")
    first, second = folded
    assert folded.folded and folded.select(limit=1).folded and not kept.folded
    assert first == kept.questions[0]
    assert second.messages(1) == [{"role": "user", "content": "Be brief.\n\nTell me a joke\nabout {a: 1}."}]
    assert {row["system"] for row in folded.rows(1)} == {None}
    tagged = load_questions(Question("a", ("Why {tag}?",), system="Be {tag}."), tag="so", system="fold")
    assert tagged["a"].paraphrases == ("Be {tag}.\n\nWhy so?",)
    with pytest.raises(EmmechError, match="system='drop'"):
        load_questions(kept, system="drop")


def test_a_list_of_questions_is_taken_for_an_organism_too() -> None:
    asked = [Question("soup", ("please help me with soup .",), system="you are anna .")]
    assert resolve_questions(asked, "pocket").questions == tuple(asked)

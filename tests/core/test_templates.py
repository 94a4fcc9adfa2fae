"""Templates: prompts, answers and labels, and what is refused."""

from pathlib import Path

import pytest

from bitdistill_core.templates import TEMPLATES, Template, packed_template


def test_a_packed_prompt_may_show_a_column_called_like_an_answer() -> None:
    task = {"name": "custom", "kind": "classification", "prompt": "{answer} {label}:", "label_words": ["a", "b"]}
    assert packed_template(task).render_prompt({"answer": "x", "label": "y"}) == "x y:"
    assert packed_template(task | {"kind": "generation", "label_words": []}).columns == ["answer", "label"]


@pytest.mark.parametrize("task", sorted(TEMPLATES))
def test_builtin_templates_render(task: str) -> None:
    template = TEMPLATES[task]
    row = {
        "sentence": "a\n b",
        "premise": "p",
        "hypothesis": "h",
        "question": "q",
        "article": "x",
        "label": 1,
        "highlights": "s",
    }
    assert "\n b" not in template.render_prompt(row)
    assert template.render_answer(row).startswith(" ")


@pytest.mark.parametrize("label", [-1, 2, "2", "1.0", 0.5, 2.0, True])
def test_a_label_outside_the_template_is_an_error(label: object) -> None:
    with pytest.raises(ValueError, match="a label must be one of 0, 1, 'negative', 'positive'; got label="):
        TEMPLATES["sst2"].render_answer({"sentence": "x", "label": label})


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="needs column sentence; the columns are text, label"):
        TEMPLATES["sst2"].render_prompt({"text": "x", "label": 0})


@pytest.mark.parametrize("missing", [None, float("nan"), "", " \n "])
def test_a_missing_value_is_no_text(missing: object) -> None:
    with pytest.raises(ValueError, match=r"a value where the template needs it; got sentence="):
        TEMPLATES["sst2"].render_prompt({"sentence": missing, "label": 0})
    with pytest.raises(ValueError, match=r"got label="):
        TEMPLATES["sst2"].render_answer({"sentence": "x", "label": missing})
    with pytest.raises(ValueError, match=r"got highlights="):
        TEMPLATES["cnn_dailymail"].render_answer({"article": "x", "highlights": missing})
    assert TEMPLATES["sst2"].render_prompt({"sentence": "x", "note": missing}) == "Review: x\nSentiment:"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([], [0, 1]),
        ([], ["0", "1"]),  # from CSV
        ([-1, 1], ["-1", " 1"]),
        ([False, True], ["False", "True"]),
        ([], ["no", " yes "]),
        (["spam", "ham"], ["spam", "ham "]),
        ([False, True], [False, True]),
        ([-1, 1], [-1, 1]),
        ([], [0.0, 1.0]),  # integers of a column that lacks one, read by pandas
        ([-1, 1], [-1.0, 1.0]),
    ],
)
def test_labels_may_be_numbers_the_words_or_the_data_s_own(values: list[object], labels: list[object]) -> None:
    fields = {"kind": "classification", "prompt": "{a}:", "label_words": ["no", "yes"], "label_values": values}
    template = Template.model_validate({**fields, "answer_column": "label"})
    assert [template.label({"label": label}) for label in labels] == [0, 1]
    assert template.render_answer({"label": labels[1]}) == " yes"
    with pytest.raises(ValueError, match=r"got label='perhaps'; set label_values in data\.template"):
        template.label({"label": "perhaps"})


@pytest.mark.parametrize("values", [["spam"], ["spam", "spam"], ["spam", "ham", "eggs"]])
def test_label_values_must_pair_up_with_label_words(values: list[str]) -> None:
    with pytest.raises(ValueError, match="one different value for each of label_words"):
        Template(
            kind="classification", prompt="{a}:", label_words=["no", "yes"], label_values=values, answer_column="label"
        )


def test_words_that_are_numbers_count_before_their_places() -> None:
    template = Template(kind="classification", prompt="{a}:", label_words=["1", "2", "3"], answer_column="stars")
    assert [template.label({"stars": label}) for label in ("1", "2", "3")] == [0, 1, 2]
    assert [template.label({"stars": label}) for label in (0, 1, 2)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"got stars='0'; set label_values"):  # the text of a place, or another scale?
        template.label({"stars": "0"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("text\nlabel:", "must name a column in braces"), ("{a:", "braces must pair up"), ("{a} ", "white space")],
)
def test_a_prompt_that_shows_no_text_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(kind="generation", prompt=prompt, answer_column="x")


def test_a_template_with_one_label_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 different label_words"):
        Template(kind="classification", prompt="{a}:", label_words=["x"], answer_column="label")


def test_the_documentation_prints_every_template() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    for task, template in TEMPLATES.items():
        assert f"`{task}`" in page
        assert template.prompt.replace("\n", "\\n") in page
        assert all(f"`{word}`" in page for word in template.label_words)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_words": ["good", "good", "bad"]}, r"label_words must all be different; got \['good', 'good', 'bad'\]"),
        ({"label_values": [" a", "b"]}, r"label_values must be without outer spaces"),
        ({"answer_column": "text"}, r"must not show the answer; got answer_column='text'"),
    ],
)
def test_a_template_that_cannot_be_learned_is_refused(fields: dict[str, object], message: str) -> None:
    whole = {"kind": "classification", "prompt": "{text}:", "label_words": ["good", "bad"], "answer_column": "label"}
    with pytest.raises(ValueError, match=message):
        Template(**{**whole, **fields})


def test_bytes_are_texts_where_they_are_utf8() -> None:
    row = {"sentence": "caf\u00e9".encode(), "label": b"negative"}
    assert TEMPLATES["sst2"].render_prompt(row) == "Review: caf\u00e9\nSentiment:"
    assert TEMPLATES["sst2"].label(row) == 0
    with pytest.raises(ValueError, match=r"a text must be UTF-8; got sentence=b'caf\\xe9': "):
        TEMPLATES["sst2"].render_prompt({"sentence": "caf\u00e9".encode("latin-1"), "label": 0})

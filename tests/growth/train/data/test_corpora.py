"""Local corpora: the same bytes every time, prose that is prose, code that is bare and compiles."""

import ast
import hashlib
import io
import json
import logging
import re
import sysconfig
import tokenize
from pathlib import Path

import pytest

from apical.growth.train.data import corpora
from apical.growth.train.data.corpora import CORPORA, build_corpus, read_corpus
from apical.growth.train.data.extract import definitions, joined, paragraphs

SIZE = 200_000
NAMES = sorted(CORPORA)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every corpus, built in two caches."""
    caches = [tmp_path_factory.mktemp("cache") for _ in range(2)]
    return {
        name: [build_corpus(name, cache=cache, max_bytes=SIZE) for cache in caches]
        for name in NAMES
    }


@pytest.fixture(params=NAMES)
def twice(request, built):
    return built[request.param]


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


def texts_of(directory):
    return {split: list(read_corpus(directory, split)) for split in ("train", "val")}


def test_two_builds_are_the_same_bytes(twice):
    one, other = twice
    assert one.name == other.name
    assert manifest_of(one) == manifest_of(other)
    for name in ("train.jsonl", "val.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_manifest_tells_the_truth(twice):
    manifest = manifest_of(twice[0])
    for split, texts in texts_of(twice[0]).items():
        name = f"{split}.jsonl"
        assert manifest["files"][name] == {
            "sha256": hashlib.sha256((twice[0] / name).read_bytes()).hexdigest(),
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
        }
    assert manifest["packages"]["python"]["licence"] == "PSF-2.0"
    assert all(package["version"] for package in manifest["packages"].values())


def test_budget_is_kept_and_used(twice):
    sizes = {k: sum(len(text.encode()) for text in v) for k, v in texts_of(twice[0]).items()}
    assert 0.9 * 0.95 * SIZE < sizes["train"] <= 0.95 * SIZE
    assert 0.5 * 0.05 * SIZE < sizes["val"] <= 0.05 * SIZE


def test_nothing_is_held_out_and_trained_on(twice):
    blocks = {
        split: {" ".join(block.split()) for text in texts for block in text.split("\n\n")}
        for split, texts in texts_of(twice[0]).items()
    }
    # a line of code may well stand in two files; a paragraph or a block of code may not
    shared = {block for block in blocks["train"] & blocks["val"] if len(block) > 100}
    assert shared == set()


def test_no_document_comes_twice(twice):
    texts = [text for each in texts_of(twice[0]).values() for text in each]
    assert len(set(texts)) == len(texts)
    assert all(len(text) >= 200 for text in texts)


def test_files_stay_on_their_side_at_any_size(twice, tmp_path):
    name = manifest_of(twice[0])["name"]
    smaller = texts_of(build_corpus(name, cache=tmp_path, max_bytes=SIZE // 2))
    larger = texts_of(twice[0])
    assert not set(smaller["train"]) & set(larger["val"])
    assert not set(smaller["val"]) & set(larger["train"])


def test_second_call_finds_the_first_one(twice, monkeypatch):
    monkeypatch.setattr(corpora, "_build", lambda *_: pytest.fail("built again"))
    name = manifest_of(twice[0])["name"]
    assert build_corpus(name, cache=twice[0].parents[1], max_bytes=SIZE) == twice[0]


def test_a_damaged_corpus_is_built_again(built, caplog):
    directory = built["code"][1]
    whole = (directory / "train.jsonl").read_bytes()
    (directory / "train.jsonl").write_bytes(whole[:-1] + b"\x00")
    with caplog.at_level(logging.WARNING):
        build_corpus("code", cache=directory.parents[1], max_bytes=SIZE)
    assert "damaged" in caplog.text
    assert (directory / "train.jsonl").read_bytes() == whole


def test_a_failed_build_leaves_nothing(tmp_path):
    # 200 bytes for validation, which no piece of code is as short as
    with pytest.raises(ValueError, match="leaves val empty"):
        build_corpus("code", cache=tmp_path, max_bytes=4000)
    assert list((tmp_path / "corpora").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "max_bytes", "message"),
    [
        pytest.param("poems", None, r"'poems', expected one of \['code', 'prose'\]", id="unknown"),
        pytest.param("prose", 3999, "max_bytes is 3999, expected at least", id="too few bytes"),
    ],
)
def test_corpus_refuses(name, max_bytes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_corpus(name, cache=tmp_path, max_bytes=max_bytes)


def test_prose_is_english(built):
    texts = texts_of(built["prose"][0])["train"]
    text = " ".join(texts)
    words = re.findall(r"[a-z]+", text.lower())
    # in general English prose "the" is about one word in twenty
    assert words.count("the") > 0.03 * len(words)
    assert ">>>" not in text
    assert max(map(len, texts)) <= 2000


def test_code_is_bare_and_compiles(built):
    for text in texts_of(built["code"][0])["train"]:
        compile(text, "document", "exec")
        assert_bare(text)


def assert_bare(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    assert not [token for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert ast.get_docstring(node) is None


class WithoutStrings(ast.NodeTransformer):
    """What is left of a program when its string statements go."""

    def generic_visit(self, node):
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list) and statements:
                kept = [each for each in statements if not self.is_idle(each)]
                setattr(node, field, kept or [ast.Pass()])
        return node

    def is_idle(self, node):
        value = node.value if isinstance(node, ast.Expr) else None
        string = isinstance(value, ast.Constant) and isinstance(value.value, str)
        return string or isinstance(node, ast.Pass)


def meaning(source):
    return ast.dump(WithoutStrings().visit(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        pytest.param('"""Module."""\nx = 1  # one\n', id="module"),
        pytest.param('def f():\n    """Only this."""\n', id="nothing else in the body"),
        pytest.param('class A: "one line"\nx = 1\n', id="on the line of the class"),
        pytest.param('def f():\n    "doc"; return 1\n', id="before a semicolon"),
        pytest.param('def f():\n    "doc"; "more"\n', id="two strings alone"),
        pytest.param('x = 1\n"""about x"""\ny = "# no comment"\n', id="string after a statement"),
        pytest.param('def f():\n    """é""" # ü\n    return "ñ"  # ä\n', id="wide characters"),
        pytest.param('é = "é"; "é"\nü = 1  # é\n', id="wide characters before a string"),
        pytest.param("x = [  # open\n    1,\n    # alone\n    2,\n]\n", id="inside brackets"),
        pytest.param('x = """\n# text, no comment\n\n"""\n', id="a comment's sign in a string"),
        pytest.param('x = f"{1}#{2}"  # yes\n', id="a comment's sign in an f-string"),
        pytest.param("if x:\n    pass\n# between\nelse:\n    y = 1\n", id="between branches"),
        pytest.param(
            "try:\n    'a'\nexcept E:\n    'b'\nelse:\n    'c'\nfinally:\n    'd'\n",
            id="every kind of block",
        ),
        pytest.param("@a\n# why\n@b\nasync def f():\n    'doc'\n    await x\n", id="decorators"),
        pytest.param("x = 1\n\x0c\ny = 2  # two\n", id="a form feed is no line"),
        pytest.param("x = 1; y = [\n    2,\n]; z = 3\n", id="statements that share lines"),
        pytest.param("", id="empty"),
        pytest.param("# only this", id="a comment alone"),
    ],
)
def test_bare_code_means_the_same(source):
    parts = definitions(source)
    assert meaning("\n".join(parts)) == meaning(source)
    for part in parts:
        assert_bare(part)


def test_the_standard_library_means_the_same():
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in ("ast", "argparse", "dataclasses", "inspect", "textwrap", "threading", "typing"):
        source = (stdlib / f"{name}.py").read_text(encoding="utf-8")
        parts = definitions(source)
        assert meaning("\n".join(parts)) == meaning(source)
        assert len(parts) > 1


def test_prose_leaves_examples_lists_and_headings_out():
    sentence = "This is a sentence about the things that a function of this kind can do."
    source = f'''
def f():
    """{sentence}

    And this one is
    on two lines, with a :class:`Role` and ``code``, and it is long enough.

    Args:
        x: The first of the arguments, which is a number that you can choose at will.

    >>> This is a sentence about the things that a function of this kind can do.

    Parameters
    ----------
    The first of the arguments is a number that you can choose at will, if it is small.

    too short.
    """
    return "a message that is long enough to be prose but is not any documentation."
'''
    assert paragraphs(source) == [
        sentence,
        "And this one is on two lines, with a Role and `code`, and it is long enough.",
    ]


def test_documents_join_paragraphs_without_cutting_them():
    parts = ["a" * 900, "b" * 900, "c" * 900, "d" * 3000, "e"]
    documents = list(joined(parts))
    assert "\n\n".join(documents).split("\n\n") == parts
    assert [len(text) for text in documents] == [1802, 900, 3000, 1]


def test_unreadable_files_are_left_out(tmp_path, monkeypatch):
    root = tmp_path / "library"
    root.mkdir()
    sentence = "This is a sentence about the number {} and about what it is good for in module {}."
    for i in range(60):
        text = "\n\n".join(sentence.format(j, chr(97 + j) * (i + 1)) for j in range(4))
        (root / f"good{i}.py").write_text(f'"""{text}"""\n')
    (root / "syntax.py").write_text("def f(:\n")
    (root / "latin.py").write_bytes(b'"""\xe9\xff"""\n')
    (root / "zero.py").write_bytes(b"x = 1\x00\n")
    (root / "cookie.py").write_bytes(b"# coding: no-such-codec\n")
    (root / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (root / "broken.py").symlink_to(root / "nowhere.py")
    (root / "escape.py").write_text(f'"""{sentence.format(0, "zzz")}"""\nx = "\\d"\n')
    monkeypatch.setattr(corpora, "_installed", lambda _: {"python": ("0", root)})
    texts = texts_of(build_corpus("prose", cache=tmp_path, max_bytes=None))
    assert len(texts["train"]) + len(texts["val"]) == 60
    assert len(texts["train"]) > len(texts["val"]) > 0


def test_copies_count_once(tmp_path, monkeypatch):
    root = tmp_path / "library"
    root.mkdir()
    sentence = "This is a sentence about {} {} that is the same in every file but for a number. "
    for i in range(60):
        own = sentence.format("z" * (i + 1), i) * 3
        (root / f"m{i}.py").write_text(f'"""{sentence.format("all", i) * 3}\n\n{own}"""\n')
    monkeypatch.setattr(corpora, "_installed", lambda _: {"python": ("0", root)})
    texts = texts_of(build_corpus("prose", cache=tmp_path, max_bytes=None))
    assert sum("about all" in text for each in texts.values() for text in each) == 1
    assert "about all" in " ".join(texts["val"])

"""Files of edits: whole, cut, of another kind, or holding anything."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from editing.edits import ContextEdit, EditError, load, stack
from tests.editing.tiny import made, tiny


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
    edit = ContextEdit("w5 ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(EditError, match="holds no edit, so it is left alone"):
        edit.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    edit.save(tmp_path / "edit")
    ContextEdit("w6 ").save(tmp_path / "edit")
    assert load(tmp_path / "edit").text == "w6 "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "pickle"}, "kind 'pickle'; this version knows .*weights"),
        ({"kind": ["weights"]}, "kind"),
        ({"format": 2}, "has format 2, and this version reads 1"),
        ({"settings": {}}, "is damaged: KeyError: 'changes'"),
        ({"about": 3}, "cannot be read"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, change, message):
    made(tiny("llava")).save(tmp_path / "edit")
    file = tmp_path / "edit" / "edit.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(EditError, match=message):
        load(tmp_path / "edit")


def test_missing_and_cut_files_are_refused(tmp_path):
    with pytest.raises(EditError, match=r"there is no edit\.json"):
        load(tmp_path / "none")
    edit = made(tiny("llava"))
    edit.save(tmp_path / "edit")
    tensors = tmp_path / "edit" / "edit.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EditError, match="is damaged"):
        load(tmp_path / "edit")
    tensors.write_bytes(whole)
    kept = load_file(tensors)
    kept.popitem()
    save_file(kept, tensors)
    with pytest.raises(EditError, match=r"is damaged: .*a change of form"):
        load(tmp_path / "edit")
    stack([edit, ContextEdit("w5")]).save(tmp_path / "both")
    (tmp_path / "both" / "00001" / "edit.json").unlink()
    with pytest.raises(EditError, match=r"00001 holds no edit"):
        load(tmp_path / "both")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["changes", "made_on", "text", "count", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["weights", "context", "stack", "?"]), body=JSON, about=JSON)
def test_any_json_is_an_edit_or_an_edit_error(tmp_path, kind, body, about):
    folder = tmp_path / "any"
    folder.mkdir(exist_ok=True)
    head = {"format": 1, "kind": kind, "settings": body, "about": about}
    (folder / "edit.json").write_text(json.dumps(head))
    try:
        found = load(folder)
    except EditError:
        return
    assert found.kind == kind
